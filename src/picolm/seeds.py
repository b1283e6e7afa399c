"""Randomness by position: a seed for (run seed, what for, step, row, …), the same on every machine and in every process."""

import hashlib


def derive(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit seed that is a pure function of its arguments (sha-256), so that no generator has to be carried along."""
    text = ":".join([str(seed), purpose, *map(str, position)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
