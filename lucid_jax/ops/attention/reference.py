"""Dense causal softmax attention, straight from the definition. Memory is quadratic in S."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import same_segment
from lucid_jax.ops.numerics import accumulator_dtype


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    precision: jax.lax.Precision | None,
) -> jax.Array:
    """Computes `softmax(scale·q kᵀ + causal) v`; shapes as in the public op."""
    del precision  # Everything is in the accumulator dtype and full precision.
    b, s, h, d = q.shape
    dtype, highest = accumulator_dtype(q.dtype), jax.lax.Precision.HIGHEST
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    q = q.reshape(b, s, k.shape[2], -1, d)
    logits = jnp.einsum("btkgd,bskd->bkgts", q, k, precision=highest) * scale
    mask = jnp.tril(jnp.ones((s, s), bool))
    if segment_ids is not None:
        mask = mask & same_segment(segment_ids, segment_ids)[:, :, None]
    weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), -1)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v, precision=highest).reshape(b, s, h, d)
