"""Readers of other people's checkpoints: each makes a Run of them that every command reads, and adds nothing to it."""
