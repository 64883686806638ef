"""The scaling of keys that makes the entries of `A` powers of two; every kernel uses it.

Kernels take keys that are normalised and scaled, `k̃ = k̂·√(log₂e/√D)`, so that
`A_ij = 2^(k̃_i·k̃_j − c)`, where `c = √D·log₂e` is the largest exponent. A kernel may subtract
another number from the exponents, the shift, and multiply the sum by the factor that is missing.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

LOG2E = math.log2(math.e)


def key_scale(d: int) -> float:
    """Returns `k̃ / k̂`."""
    return math.sqrt(LOG2E / math.sqrt(d))


def largest_exponent(d: int) -> float:
    """Returns `c`, the largest `k̃_i·k̃_j`."""
    return LOG2E * math.sqrt(d)


def entry_scale(d: int, shift: float = 0.0) -> float:
    """Returns the factor from `2^(k̃_i·k̃_j − shift)` to `A_ij`."""
    return math.exp2(shift - largest_exponent(d))


def key_gradient_scale(d: int, shift: float = 0.0) -> float:
    """Returns the factor from `Σ_j 2^(k̃_i·k̃_j − shift) w_ij k̃_j` to `−Σ_j A_ij w_ij k̂_j / √D`."""
    return -entry_scale(d, shift) / (key_scale(d) * math.sqrt(d))


def select_range(largest: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `x` times the power of two that makes the square of a key a normal number.

    The product is exact. In float32 the factor is 2⁻⁹⁰ for keys above 2⁴⁰, 2⁹⁰ for keys below
    2⁻⁴⁰, and 1 otherwise.

    Args:
      largest: The largest absolute entry of each key, float32 or float64.
      x: The keys, or 1.
    """
    bits, number = jnp.finfo(x.dtype).maxexp, x.dtype.type
    bound, scale = 2.0 ** (bits * 5 // 16), 2.0 ** (bits * 45 // 64)
    small = jnp.where(largest < number(1 / bound), x * number(scale), x)
    return jnp.where(largest > number(bound), x * number(1 / scale), small)
