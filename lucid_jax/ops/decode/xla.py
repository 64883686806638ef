"""One pass over a cache in plain XLA: two products of a few rows, on every platform."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from lucid_jax.ops.decode.sums import Sums
from lucid_jax.ops.precondition.gram import accumulator_dtype


def attend(
    q: jax.Array,
    k: jax.Array,
    inverse_norm: jax.Array | None,
    cached_k: jax.Array,
    cached_y: jax.Array,
    cached_inverse_norms: jax.Array | None,
    length: jax.Array,
    scale: float,
) -> Sums:
    """The sums over the rows of a cache.

    Args:
      q: Queries `[B,K,G,D]`.
      k: The new key `[B,K,D]`.
      inverse_norm: Its `1/‖k‖` `[B,K]`, or None where values are not preconditioned.
      cached_k: `[B,K,P,D]`.
      cached_y: `[B,K,P,D]`.
      cached_inverse_norms: `[B,K,P]`, or None.
      length: int32 `[B]`, how many leading rows are valid.
      scale: Of the logits.
    """
    group, root = q.shape[2], math.sqrt(q.shape[3])
    valid = (jnp.arange(cached_k.shape[2]) < length[:, None])[:, None, None]
    rows = q if inverse_norm is None else jnp.concatenate([q, k[:, :, None]], 2)
    dots = _product("bkrd,bkpd->bkrp", rows, cached_k)
    logits = jnp.where(valid, scale * dots[:, :, :group], jnp.finfo(dots.dtype).min)
    largest = logits.max(-1)
    weights = jnp.where(valid, jnp.exp(logits - largest[..., None]), 0)
    norm = weights.sum(-1)
    if inverse_norm is None or cached_inverse_norms is None:
        return Sums(largest, norm, _product("bkgp,bkpd->bkgd", weights, cached_y), None)
    norms = inverse_norm[:, :, None] * cached_inverse_norms
    a = jnp.where(valid, jnp.exp(root * (dots[:, :, group:] * norms[:, :, None] - 1)), 0)
    both = _product("bkrp,bkpd->bkrd", jnp.concatenate([weights, a], 2), cached_y)
    return Sums(largest, norm, both[:, :, :group], both[:, :, group])


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = accumulator_dtype(b.dtype)
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=dtype)
