"""`dot_product_attention`: LUCID attention by the arguments of `jax.nn.dot_product_attention`."""

from __future__ import annotations

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.ops import check
from lucid_jax.ops.attention import softmax_attention
from lucid_jax.ops.lucid_attention import softmax_implementation
from lucid_jax.ops.masks import segments_of_mask
from lucid_jax.ops.precondition import precondition


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | jax.Array | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    segment_ids: jax.Array | None = None,
    precision: str | None = None,
) -> jax.Array:
    """Computes LUCID attention by the arguments of `jax.nn.dot_product_attention`.

    It is `jax.nn.dot_product_attention` of the values `precondition(key, value)`, causal, within
    segments. A query is the token of its key, so what hides a key from its own query makes it
    padding: no other token sees it, and its own result is zero.

    Args:
      query: `[B,S,H,D]` or `[S,H,D]`, after RoPE.
      key: `[B,S,K,D]` or `[S,K,D]` of the same dtype; K divides H.
      value: The shape and dtype of `key`.
      bias: Must be None: the solve has no logits to add it to.
      mask: bool, broadcastable to `[B,H,S,S]`: whether a query sees a key. It must be causal, or
        be so with `is_causal`, and may also keep segments apart or hide padding; its entries are
        read, so under `jax.jit` it must be a constant.
      scale: Factor of the softmax's logits, positive; None is `1/√D`. `A` does not depend on it.
      is_causal: Must be True unless `mask` is causal.
      query_seq_lengths: Integers `[B]`: tokens behind them are padding.
      key_value_seq_lengths: Integers `[B]`, likewise.
      local_window_size: Must be None: the bound on `A⁻¹` does not hold for a sliding window.
      implementation: As in `lucid_attention`.
      return_residual: Must be False.
      segment_ids: As in `lucid_attention`; instead of `mask`.
      precision: As in `lucid_attention`.

    Returns:
      The shape and dtype of `query`.

    Raises:
      TypeError: a dtype that is not supported or does not match.
      ValueError: an argument that LUCID attention cannot follow, shapes that do not match, or an
        implementation that is unknown or cannot run the call.
    """
    refused = {
        "bias": bias is not None,
        "local_window_size": local_window_size is not None,
        "return_residual": return_residual,
    }
    for name, given in refused.items():
        if given:
            raise ValueError(f"LUCID attention does not support {name}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        check.array(name, x)
    q, k, v = (x[None] if x.ndim == 3 else x for x in (query, key, value))
    check.attention_inputs(q, k, v, segment_ids)
    b, s, h, d = q.shape
    hidden: list[jax.Array] = []
    if mask is not None:
        if segment_ids is not None:
            raise ValueError("mask and segment_ids cannot be given together")
        if mask.dtype != bool:
            raise TypeError(f"mask must have dtype bool; got {mask.dtype.name}")
        ids = segments_of_mask(mask, is_causal, (b, h, s, s))
        hidden.append(jnp.asarray(ids < 0))
        # Causality alone hides padding at the end, and more backends take one segment.
        if (ids[:, 0] != 0).any() or (np.diff(ids) > 0).any():
            segment_ids = jnp.asarray(ids)
    elif not is_causal:
        raise ValueError("LUCID attention is causal: pass is_causal=True, or a causal mask")
    lengths = {
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
    }
    for name, length in lengths.items():
        if length is not None:
            length = check.integers(name, length, "B", (b,))
            hidden.append(jnp.arange(s, dtype=jnp.int32)[None] >= length[:, None])
    y = precondition(
        k, v, segment_ids=segment_ids, implementation=implementation, precision=precision
    )
    o = softmax_attention(
        q, k, y, segment_ids=segment_ids, temperature=_temperature(scale, d),
        implementation=softmax_implementation(implementation), precision=precision,
    )  # fmt: skip
    for is_padding in hidden:
        o = jnp.where(is_padding[:, :, None, None], 0, o)
    return o.reshape(query.shape)


def _temperature(scale: float | jax.Array | None, d: int) -> float | jax.Array:
    if scale is None:
        return 1.0
    if isinstance(scale, numbers.Real | np.ndarray) and not scale > 0:
        raise ValueError(f"scale must be positive; got {scale}")
    return 1 / (scale * math.sqrt(d))
