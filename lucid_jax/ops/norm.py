"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array | float, eps: float) -> jax.Array:
    """Computes `x·scale/√(mean(x²) + eps)` over the last axis, in float32.

    Args:
      x: `[...,E]`.
      scale: `[E]`, or one number.
      eps: Keeps the result finite for zeros.

    Returns:
      `[...,E]`, dtype of `x`.
    """
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (wide * inverse * scale).astype(x.dtype)
