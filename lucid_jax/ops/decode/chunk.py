"""Attention of several new tokens of each sequence to a KV cache and to themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.ops.attention.api import choose_subset_backend, logits_scale
from lucid_jax.ops.decode.new_token import LayerCache
from lucid_jax.ops.per_device import per_device
from lucid_jax.ops.precondition import Prefix, precondition
from lucid_jax.ops.query_positions import QueryPositions


def chunk_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cached: LayerCache,
    start: jax.Array,
    *,
    beta: jax.Array | None = None,
    temperature: float = 1.0,
    implementation: str | None = None,
) -> tuple[jax.Array, LayerCache]:
    """Attends with T new tokens of each sequence to its cache and to themselves.

    Args:
      q: Queries `[B,T,H,D]` after RoPE; K divides H.
      k: The new keys `[B,T,K,D]` of the same dtype.
      v: The new values `[B,T,K,D]` of the same dtype.
      cached: The cache of the layer, P places of the same dtype; with norms for LUCID attention,
        without for softmax attention.
      start: int32 `[]`, the number of cached tokens of every sequence, at most P − T.
      beta: β of the new tokens `[B,T,K]`, as in `precondition`, for LUCID attention. None is 1.
      temperature: As in `decode_attention`.
      implementation: As in `precondition`; `"mosaic_gpu"`, which takes no prefix, is None here.

    Returns:
      `o [B,T,H,D]`, dtype of `q`, and the cache with the new tokens.
    """
    y = v
    if cached.inverse_norms is not None:
        # Segment ids rather than a prefix length, because the solve skips the tiles of other
        # segments.
        is_solved = jnp.arange(cached.k.shape[2]) < start
        ids = jnp.broadcast_to(is_solved.astype(jnp.int32), (k.shape[0], is_solved.size))
        prefix = Prefix(cached.k.swapaxes(1, 2), cached.y.swapaxes(1, 2), ids)
        own_ids = jnp.ones(k.shape[:2], jnp.int32)
        solve = None if implementation == "mosaic_gpu" else implementation
        y = precondition(k, v, segment_ids=own_ids, prefix=prefix, beta=beta, implementation=solve)
    elif beta is not None:
        raise ValueError("beta is for LUCID attention; got a cache without inverse_norms")
    cached = cached.with_tokens(k, y, start)
    # The reference softmax takes whole sequences only.
    softmax = choose_subset_backend("xla" if implementation in ("reference", "xla") else None, q)
    scale = logits_scale(temperature, q.shape[-1])

    def attend(q, k, y, positions):
        return softmax.forward(scale, None, q, k, y, QueryPositions(positions, None, None))[0]

    positions = start + jnp.arange(q.shape[1], dtype=jnp.int32)
    keys, values = (x.swapaxes(1, 2) for x in (cached.k, cached.y))
    axes = "BTHD", "BSKD", "BSKD", "T"
    return per_device(attend, axes, "BTHD", q, keys, values, positions), cached
