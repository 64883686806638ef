"""The scale of keys at which the entries of `A` are powers of two; every kernel uses it.

Kernels take keys normalised and scaled, `k̃ = k̂·√(log₂e/√D)`, so that
`A_ij = 2^(k̃_i·k̃_j − c)` with `c = √D·log₂e`, which is the largest exponent.
"""

from __future__ import annotations

import math

_LOG2E = math.log2(math.e)


def key_scale(d: int) -> float:
    """`k̃ / k̂`."""
    return math.sqrt(_LOG2E / math.sqrt(d))


def largest_exponent(d: int) -> float:
    """`c`: `A_ij = 2^(k̃_i·k̃_j − c)`."""
    return _LOG2E * math.sqrt(d)
