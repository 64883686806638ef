"""Rotary position embeddings (Su et al., arXiv 2104.09864), with scaling to longer contexts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

# The "llama3" rule blends frequencies of 1 to 4 turns within the original length.
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0


def frequencies(
    head_dim: int, base: float, scaling: str, factor: float, original_length: int
) -> np.ndarray:
    """Computes the angular frequencies `[D/2]`, radians a position, float64.

    Args:
      head_dim: Head width D.
      base: The longest wavelength is about `2π·base` positions.
      scaling: `"none"`; `"linear"`: positions shrink by `factor`; `"ntk"`: the base
        grows so that the lowest frequency shrinks by `factor` and the highest stays;
        `"llama3"`: wavelengths beyond `original_length` are stretched by `factor`, those
        under a quarter of it stay, and those between are blended (Llama 3.1).
      factor: The ratio of the new context to the original one.
      original_length: The length that the model was trained at before; read by `"llama3"`.
    """
    if scaling == "ntk":
        base = ntk_base(head_dim, base, factor)
    frequency = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling == "linear":
        return frequency / factor
    if scaling == "llama3":
        turns = original_length * frequency / (2 * math.pi)
        keep = np.clip((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0, 1)
        return frequency * (keep + (1 - keep) / factor)
    return frequency


def ntk_base(head_dim: int, base: float, factor: float) -> float:
    """Returns the base after the `"ntk"` rule."""
    return base * factor ** (head_dim / (head_dim - 2))


def rotations(positions: jax.Array, frequency: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Computes cosine and sine `[B,S,1,D/2]` in float32, exact to 1e-9 radians a position.

    The float32 product of position 131072 and a frequency is off by up to 0.008 radians. Counted
    in turns, as fractions of 2³², the product wraps in integers without error.

    Args:
      positions: int32 `[B,S]`.
      frequency: Radians a position, `[D/2]`.
    """
    turns = np.round(frequency / (2 * math.pi) * 2.0**32).astype(np.uint64).astype(np.uint32)
    phase = positions.astype(jnp.uint32)[..., None, None] * turns
    angle = jax.lax.bitcast_convert_type(phase, jnp.int32).astype(jnp.float32)
    angle = angle * (2 * math.pi / 2.0**32)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the two halves of the last axis as pairs, in float32.

    Args:
      x: `[B,S,H,D]`; entry `i` pairs with entry `i + D/2`, as in Hugging Face's Llama.
      cos: `[B,S,1,D/2]`.
      sin: `[B,S,1,D/2]`.

    Returns:
      `[B,S,H,D]`, dtype of `x`.
    """
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
