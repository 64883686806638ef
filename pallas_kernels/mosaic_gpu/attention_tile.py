"""Helpers of the attention kernels: masks, rows that are dropped, and results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import tile

# A finite lower bound of the largest product of a query, and of that product with the scale, so
# that a row without a visible key stays zero.
LOWEST = -3e38


def turns_for(w: int) -> Any:
    """Returns the type of the barriers of turns for heads of W; heads of 128 are faster without."""
    return tile.barriers(tile.GROUPS) if w < 128 else None


class QueryBlock(NamedTuple):
    """The block of queries of a program, and the tiles of keys that it visits.

    First come those before the block that need no mask, then others before it, then its own.

    Attributes:
      first_row: Its first row.
      first_tile: The first tile of the sequence that it visits.
      plain: The number of tiles that need no mask.
      before: The number of tiles before the block.
      visits: The number of all tiles.
      size: How many of its rows belong to the document that enters it.
    """

    first_row: jax.Array
    first_tile: jax.Array
    plain: jax.Array
    before: jax.Array
    visits: jax.Array
    size: jax.Array

    def locate(self, t: jax.Array) -> jax.Array:
        """Returns which tile of the sequence a visit is for."""
        masked = self.before - self.plain
        moved = jnp.where(t < self.plain, masked + t, t - self.plain)
        return self.first_tile + jnp.where(t < self.before, moved, t)

    def drop(self, total: Any, t: jax.Array, group: jax.Array) -> None:
        """Drops at the first tile of the block what rows of later documents have summed up."""
        when = (t == self.before) & (self.size < tile.ROWS)
        drop_rows(total, when, group, 0, self.size)


def query_block(limits_ref: Any, b: jax.Array, length: int, columns: int) -> QueryBlock:
    """Returns the block of this program, whose place along the second axis counts backwards.

    The last blocks have the most keys, so they start first.

    Args:
      limits_ref: The limits of `attend` `[B,S/R,3]`, or None.
      b: The sequence.
      length: S.
      columns: Columns of a tile.
    """
    one = jnp.int32(1)
    block = length // tile.ROWS - 1 - jax.lax.axis_index("axis1")
    first_row = block * tile.ROWS
    start, unmasked, size = 0 * one, 0 * one, tile.ROWS * one
    if limits_ref is not None:
        start, unmasked, size = (limits_ref[b, block, i] for i in range(3))
    first_tile, own_tile = (jax.lax.div(x, columns * one) for x in (start, first_row))
    before = own_tile - first_tile
    first_plain = jax.lax.div(unmasked + columns - 1, columns * one)
    plain = jnp.clip(own_tile - first_plain, 0, before)
    return QueryBlock(first_row, first_tile, plain, before, before + tile.ROWS // columns, size)


def mask_where(is_masked: bool | jax.Array, mask: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Returns `mask(*arrays)` where `is_masked`, and the arrays, or the only one, elsewhere."""
    if is_masked is True:
        return mask(*arrays)
    unmasked = arrays if len(arrays) > 1 else arrays[0]
    if is_masked is False:
        return unmasked
    return jax.lax.cond(is_masked, mask, lambda *x: x if len(x) > 1 else x[0], *arrays)


def visit_all(visit: Callable[..., Any], plain: jax.Array, visits: jax.Array, carry: Any) -> Any:
    """Calls `carry = visit(is_masked, n, carry)` for all visits but the last, in two loops.

    The call prepares visit `n + 1`. The first loop has no mask, because a choice takes registers.

    Args:
      visit: The function.
      plain: The number of visits that need no mask; they are the first.
      visits: The number of visits.
      carry: What the function gets first, prepared for visit 0.
    """
    zero = jnp.int32(0)
    carry = jax.lax.fori_loop(zero, plain - 1, functools.partial(visit, False), carry)
    begin = jnp.maximum(plain - 1, 0)
    return jax.lax.fori_loop(begin, visits - 1, functools.partial(visit, True), carry)


def rows_of_head(
    begin: jax.Array, width: int, row: jax.Array, size: int, head: jax.Array
) -> tuple[Any, Any]:
    """Returns rows of the sequence that begins at a row of `[B·S,H·W]`, and columns of a head."""
    return pl.ds(begin + row, size), pl.ds(head * width, width)


def sees(
    segments_ref: Any,
    b: jax.Array,
    row: jax.Array,
    column: jax.Array,
    shape: tuple[int, ...],
    *,
    transposed: bool = False,
) -> jax.Array:
    """Returns which tokens from `row` on see which from `column` on, or which are seen by which.

    Args:
      segments_ref: int32 `[B,S]`, or None.
      b: The sequence.
      row: The first row.
      column: The first column.
      shape: Rows and columns.
      transposed: Whether rows are keys, and columns queries.
    """
    ahead = tile.iota(shape, 0) - tile.iota(shape, 1) + (row - column)
    found = ahead <= 0 if transposed else ahead >= 0
    if segments_ref is not None:
        found &= tile.same_segment(segments_ref, b, row, column, shape)
    return found


def drop_rows(
    total: Any, when: jax.Array, group: jax.Array, begin: jax.Array | int, end: jax.Array | int
) -> None:
    """Zeroes the rows of a total that are not from `begin` to `end` of the block."""

    @pl.when(when)
    def _():
        i = tile.iota(total.shape, 0) + group * tile.HALF
        total[...] = jnp.where((i >= begin) & (i < end), total[...], 0.0)


def store_rows(x: jax.Array, own: Any, ref: Any) -> None:
    """Stores the rows of a group in global memory, by way of its rows in shared memory."""
    own[...] = x.astype(own.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own, ref)
    plgpu.wait_smem_to_gmem(0)
