"""Capture watches a real training step and keeps what passes: activations of chosen modules, gradients of their parameters.

It never touches: hooks only read, nothing random is drawn from a shared generator, and what it keeps are copies. So a run
with capture and a run without end with the same bytes of weights.
"""

from picolm.capture.taps import Taps, capture

__all__ = ["Taps", "capture"]
