"""Capture records a real training step: activations of chosen modules and gradients of their parameters.

It changes nothing: hooks only read, no random numbers are drawn from a shared generator, and recorded tensors are
copies. So a run with capture and a run without it end with the same bytes of weights.
"""

from picolm.capture.taps import Taps, capture

__all__ = ["Taps", "capture"]
