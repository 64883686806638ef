"""How correlated the keys are: the largest entry of `A` below its diagonal."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import panel_bounds, panel_width, round_up
from lucid_jax.ops.precondition.gram import Keys, gram_tile


def largest_off_diagonal(k: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """`max_{j<i} A_ij`, 0 where no row sees another; half the cost of a forward solve.

    Near 1 two keys point the same way and `A` mixes their values with full weight; near
    `exp(−√D)` all keys are orthogonal and `A` is close to the identity.

    Args:
      k: Keys `[B,S,K,D]`, after RoPE.
      segment_ids: int32 `[B,S]`, or None for one segment.

    Returns:
      `[B,K]` in the accumulator dtype.
    """
    length = k.shape[1]
    r = min(panel_width(), round_up(length, 16))
    keys = Keys.of(k, segment_ids, r)
    first, _ = panel_bounds(
        keys.segment_ids, keys.segment_ids, r, r, num_rows=keys.length, num_columns=keys.length
    )
    row = jnp.arange(r)

    def visit_block(i, largest):
        block = keys.take(i * r, r)

        def visit(j, largest):
            a = gram_tile(block, keys.take(j * r, r), None)
            rows, columns = i * r + row[:, None], j * r + row[None, :]
            a = jnp.where((columns < rows) & (rows < length), a, 0)
            return jnp.maximum(largest, a.max((-2, -1)))

        return jax.lax.fori_loop(first[i], i + 1, visit, largest)

    tile = jax.eval_shape(gram_tile, keys, keys, None)
    return jax.lax.fori_loop(
        0, math.ceil(length / r), visit_block, jnp.zeros(tile.shape[:2], tile.dtype)
    )
