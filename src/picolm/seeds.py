"""Derive seeds by position: a seed for (run seed, purpose, step, row, …), the same on every machine and process."""

import hashlib


def derive(seed: int, purpose: str, *position: int) -> int:
    """Return a 63-bit seed, a pure function of the arguments (sha-256), so that no generator state has to be stored."""
    text = ":".join([str(seed), purpose, *map(str, position)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
