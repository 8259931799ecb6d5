"""Randomness that a seed and a place decide, whatever ran before.

Every draw comes from a fresh generator of `(seed, what for, step, ...)`. So a resumed run draws what an uninterrupted
one would have drawn, every rank draws the same, and nobody's global generator moves.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *place: str | int) -> torch.Generator:
    """A CPU generator for one place in a run, e.g. `generator(seed, "ascent", step)`.

    Draw on the CPU and move: generators differ from device to device.
    """
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
