"""Compute the order of the rows: which row is number n of a run, at the cost of a few multiplications for any n.

Pass 0 takes the rows in their order on disk; each later pass (and pass 0 too, with shuffling) has its own permutation.
A permutation of N rows is a Feistel network over pairs (left, right) of numbers below a = ceil(sqrt(N)): each round
adds a keyed hash of one half to the other modulo a. This can be inverted, so the network permutes 0 … a²-1 for any
hash. Results outside 0 … N-1 go through the network again until they are inside ("cycle walking"; Black & Rogaway
2002); a² exceeds N by less than 2 sqrt(N) + 1, so there are few. Nothing is stored.
"""

from __future__ import annotations

import math

import numpy as np

from picolm.seeds import derive

_ROUNDS = 8


def permute(indices: np.ndarray, size: int, seed: int, purpose: str, *position: int) -> np.ndarray:
    """Permute `indices` (below `size`) and return the images, int64.

    (seed, purpose, *position) select the permutation of 0 … size-1.
    """
    side = np.uint64(math.isqrt(max(size - 1, 0)) + 1)  # ceil(sqrt(size)), at least 1
    keys = [np.uint64(derive(seed, purpose, *position, turn)) for turn in range(_ROUNDS)]
    images: np.ndarray = _network(np.asarray(indices, dtype=np.uint64), side, keys)
    while (outside := np.flatnonzero(images >= size)).size:
        images[outside] = _network(images[outside], side, keys)
    return images.astype(np.int64)


def _network(numbers: np.ndarray, side: np.uint64, keys: list[np.uint64]) -> np.ndarray:
    left: np.ndarray = numbers // side
    right: np.ndarray = numbers % side
    for key in keys:
        left, right = right, (left + _mix(right ^ key) % side) % side
    return left * side + right


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply the finalizer of splitmix64 (Steele, Lea & Flood 2014): each input bit affects every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def rows_in_order(positions: np.ndarray, size: int, *, seed: int, shuffle: bool) -> np.ndarray:
    """Return the row (0 … size-1) at each position (0, 1, … over all passes) of the order, int64."""
    positions = np.asarray(positions, dtype=np.int64)
    passes, rows = positions // size, positions % size
    for number in np.unique(passes):
        if number > 0 or shuffle:
            here = passes == number
            rows[here] = permute(rows[here], size, seed, "order", int(number))
    return rows
