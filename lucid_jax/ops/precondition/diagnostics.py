"""A diagnostic of how correlated the keys are: the largest entry of `A` below its diagonal."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.ops import check
from lucid_jax.ops.blocks import pad_axis, panel_bounds, panel_width, take
from lucid_jax.ops.numerics import round_up
from lucid_jax.ops.precondition.gram import Keys, gram_tile
from lucid_jax.ops.query_positions import QueryPositions


def largest_off_diagonal(k: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Computes `max_{j<i} A_ij`, 0 where no token sees another, at half the cost of a solve.

    Near 1 two keys point the same way and `A` mixes their values with full weight; near
    `exp(−√D)` all keys are orthogonal and `A` is close to the identity.

    Args:
      k: Keys `[B,S,K,D]`, after RoPE.
      segment_ids: Integers `[B,S]`, or None for one segment.

    Returns:
      `[B,K]` in the accumulator dtype.
    """
    positions = QueryPositions.whole_sequence(k.shape[1], check.segments(segment_ids, k))
    return largest_off_diagonal_among(k, k, positions)


def largest_off_diagonal_among(
    rows: jax.Array, columns: jax.Array, at: QueryPositions
) -> jax.Array:
    """`largest_off_diagonal` over some rows of `A`.

    Args:
      rows: Their keys `[B,T,K,D]`.
      columns: All keys `[B,S,K,D]`.
      at: The positions of the rows among the columns.
    """
    r = min(panel_width(), round_up(rows.shape[1], 16))
    keys = Keys.normalize(rows, at.segment_ids, r)
    others = Keys.normalize(columns, at.key_segment_ids, r)
    first, _ = panel_bounds(
        keys.segment_ids, others.segment_ids, r, r, num_rows=keys.length, num_columns=others.length
    )
    # Padding is at position 0, which no column comes before.
    positions = pad_axis(at.positions, 0, keys.length)
    end = positions.reshape(-1, r).max(1) // r + 1

    def visit_block(i, largest):
        block, position = keys.take(i * r, r), take(positions, i * r, r, 0)[:, None]

        def visit(j, largest):
            a = gram_tile(block, others.take(j * r, r), None)
            a = jnp.where(j * r + jnp.arange(r) < position, a, 0)
            return jnp.maximum(largest, a.max((-2, -1)))

        return jax.lax.fori_loop(first[i], end[i], visit, largest)

    tile = jax.eval_shape(gram_tile, keys, others, None)
    return jax.lax.fori_loop(
        0, keys.length // r, visit_block, jnp.zeros(tile.shape[:2], tile.dtype)
    )
