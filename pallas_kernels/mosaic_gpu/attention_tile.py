"""Helpers of the attention kernels: masks, rows that are dropped, and results."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import tile

# A finite lower bound of the largest product of a query, and of that product with the scale, so
# that a row without a visible key stays zero.
LOWEST = -3e38


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
