"""Pico: the laboratory in which people watch language models learn."""

__version__ = "0.1.0"
