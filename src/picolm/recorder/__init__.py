"""A Pico run out of anybody's training loop: `Recorder`, and callbacks for the Trainer of transformers and for Lightning."""

from picolm.recorder.record import Recorder

__all__ = ["Recorder"]
