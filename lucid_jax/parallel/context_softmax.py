"""Softmax attention of sequences that are sharded over devices; see `context_attention`."""

import functools
from collections.abc import Callable

import jax

from lucid_jax.ops.attention.api import SubsetBackend, choose_backend, choose_subset_backend
from lucid_jax.ops.blocks import take
from lucid_jax.ops.query_positions import QueryPositions
from lucid_jax.parallel.context_shard import ContextShard


def choose_softmax(
    shard: ContextShard,
    implementation: str | None,
    q: jax.Array,
    k: jax.Array,
    segment_ids: jax.Array | None,
) -> SubsetBackend:
    """Chooses how this device's queries attend to all keys.

    Backends that support no subset of the queries take whole sequences of this device's query
    heads, if the heads divide. The arrays are those of `context_attention.lucid_attention`.

    Raises:
      ValueError: an implementation that is unknown, cannot run the call, or needs whole
        sequences where the heads do not divide.
    """
    whole = jax.eval_shape(shard.gather, q)
    backend = choose_backend(implementation, whole, segment_ids, None)
    if backend.subset is not None:
        return backend.subset
    if shard.divides_query_heads(q, k):
        attend = functools.partial(_attend_by_query_heads, shard, backend.attention)
        return SubsetBackend.from_differentiable(attend)
    if implementation is None:
        return choose_subset_backend(None, q)
    raise ValueError(
        f"implementation={implementation!r} needs whole sequences: the number of devices must"
        f" divide K, or divide H and be a multiple of K; got {shard.stripes.shards} devices,"
        f" H={q.shape[2]}, K={k.shape[2]}"
    )


def _attend_by_query_heads(
    shard: ContextShard,
    attention: Callable[..., jax.Array],
    scale: float,
    precision: jax.lax.Precision | None,
    at: QueryPositions,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> jax.Array:
    """Attends with whole sequences of H/C query heads, which share a KV head: `[B,S/C,H,D]`."""
    head = jax.lax.axis_index(shard.axis) * k.shape[2] // shard.stripes.shards
    k, v = take(k, head, 1, 2), take(v, head, 1, 2)
    o = attention(shard.to_heads(q), k, v, at.key_segment_ids, scale, precision)
    return shard.to_tokens(o.astype(q.dtype))
