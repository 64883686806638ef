"""A diagnostic of how correlated the keys are: entries of `A` below its diagonal, in a sample."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.ops.precondition.gram import Keys, gram_tile
from lucid_jax.ops.query_positions import QueryPositions

# Rows of `A` in the sample; all take as long as a small part of a solve, a few next to nothing.
_ROWS = 32


def sampled_off_diagonal(k: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Computes the largest `A_ij` with `j < i` in the rows of a fixed sample.

    Near 1 two keys point the same way and `A` mixes their values with full weight; near
    `exp(−√D)` all keys are orthogonal and `A` is close to the identity. It is 0 where no token of
    the sample sees another.

    Args:
      k: Keys `[B,S,K,D]`, after RoPE.
      segment_ids: int32 `[B,S]`, or None for one segment.

    Returns:
      `[B,K]` in the accumulator dtype.
    """
    return sampled_off_diagonal_among(k, k, QueryPositions.whole_sequence(k.shape[1], segment_ids))


def sampled_off_diagonal_among(
    rows: jax.Array, columns: jax.Array, at: QueryPositions
) -> jax.Array:
    """`sampled_off_diagonal` with a sample of some tokens as rows.

    Args:
      rows: Their keys `[B,T,K,D]`.
      columns: All keys `[B,S,K,D]`.
      at: The positions of the rows among the columns.
    """
    sample = sampled_rows(rows.shape[1])
    ids = None if at.segment_ids is None else at.segment_ids[:, sample]
    keys = Keys.normalize(rows[:, sample], ids, 1)
    a = gram_tile(keys, Keys.normalize(columns, at.key_segment_ids, 1), None)
    earlier = jnp.arange(columns.shape[1]) < at.positions[sample][:, None]
    return jnp.where(earlier, a, 0).max((-2, -1))


def sampled_rows(length: int) -> np.ndarray:
    """Returns the tokens of the sample, evenly spaced and with the last: int `[T]`."""
    count = min(_ROWS, length)
    return (np.arange(count) + 1) * length // count - 1
