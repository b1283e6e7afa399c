"""Pico: train language models, record how they learn, and analyze it."""

__version__ = "0.1.0"
