"""Attention masks that LUCID attention can take: causal ones of segments and padding.

`A` is masked like the softmax, and the bound on its inverse holds where tokens fall into segments
that do not see each other. A mask of any other kind is refused.
"""

from __future__ import annotations

import jax
import numpy as np


def segments_of_mask(
    mask: jax.Array, is_causal: bool, shape: tuple[int, int, int, int]
) -> np.ndarray:
    """Finds the segment ids that a mask stands for.

    Args:
      mask: `[B,H,S,S]`, or fewer axes, or 1 in place of any of these sizes: whether a query sees a
        key. Not traced, because its entries are read.
      is_causal: Whether the mask is combined with a causal one.
      shape: B, H, S, S.

    Returns:
      int32 `[B,S]`; -1 for padding, the tokens that do not see themselves.

    Raises:
      ValueError: the mask is traced, or of another kind.
    """
    if isinstance(mask, jax.core.Tracer):
        raise ValueError(
            "mask must be known before compilation to be recognised; under jit pass is_causal=True,"
            " and segment_ids or query_seq_lengths for what else it hides"
        )
    # In numpy, since under jit an operation of jax.numpy would trace a constant.
    sees = np.asarray(mask) != 0
    sees = sees[(None,) * (4 - sees.ndim)]
    if sees.ndim != 4 or any(size not in (1, n) for size, n in zip(sees.shape, shape)):
        raise ValueError(f"mask must be broadcastable to [B,H,S,S] = {shape}; got {sees.shape}")
    if (sees != sees[:, :1]).any():
        raise ValueError("mask must be the same for all heads")
    batch, _, length, _ = shape
    # All sequences alike are looked at once.
    sees = np.broadcast_to(sees[:, 0], (sees.shape[0], length, length))
    if is_causal:
        sees = np.tril(sees)
    is_token, first = np.einsum("bss->bs", sees), sees.argmax(2).astype(np.int32)
    # A segment is known by its first token, which all its tokens see.
    ids = np.where(is_token, np.take_along_axis(first, first, 1), -1)
    expected = np.tril(ids[:, :, None] == ids[:, None])
    wrong = (sees != expected) & is_token[:, :, None]
    if wrong.any():
        sequence, query, key = np.argwhere(wrong)[0]
        verb = "sees" if sees[sequence, query, key] else "does not see"
        raise ValueError(
            "mask must be causal, alone or within segments, and may hide padding; but query"
            f" {query} of sequence {sequence} {verb} key {key}"
        )
    return np.broadcast_to(ids, (batch, length))
