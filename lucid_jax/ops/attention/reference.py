"""Dense causal softmax attention, straight from the definition. Memory is quadratic in S."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import same_segment
from lucid_jax.ops.isolation import bad_tokens, clear, mark, spread
from lucid_jax.ops.numerics import accumulator_dtype, finite
from lucid_jax.ops.precondition.carry import dense_scores
from lucid_jax.ops.transitions import Transitions


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    precision: jax.lax.Precision | None,
    transitions: Transitions | None = None,
) -> jax.Array:
    """Computes `softmax(scale·q kᵀ + causal) v`; shapes as in the public op."""
    del precision  # Everything is in the accumulator dtype and full precision.
    b, s, h, d = q.shape
    dtype, highest = accumulator_dtype(q.dtype), jax.lax.Precision.HIGHEST
    bad_queries, bad = bad_tokens(q), bad_tokens(k, v)
    if transitions is not None:
        bad |= transitions.bad_tokens()
        transitions = transitions.map(clear, bad)
    q, k, v = clear(q, bad_queries), clear(k, bad), clear(v, bad)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    q = q.reshape(b, s, k.shape[2], -1, d)
    if transitions is None:
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k, precision=highest)
    else:
        transitions = jax.tree.map(lambda x: x.astype(dtype), transitions)
        scores = dense_scores(q, k, transitions, segment_ids)
    logits = finite(scores * scale)
    mask = jnp.tril(jnp.ones((s, s), bool))[None, None, None]
    if segment_ids is not None:
        mask = mask & same_segment(segment_ids, segment_ids)[:, :, None]
    weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), -1)
    o = jnp.einsum("bkgts,bskd->btkgd", weights, v, precision=highest).reshape(b, s, h, d)
    return mark(o, bad_queries | jnp.repeat(spread(bad, segment_ids), h // bad.shape[2], 2))
