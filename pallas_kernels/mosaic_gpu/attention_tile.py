"""Helpers of the attention kernels: masks, rows that are dropped, and copies of tiles."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import tile


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


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
    ahead = _iota(shape, 0) - _iota(shape, 1) + (row - column)
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
        i = _iota(total.shape, 0) + group * tile.HALF
        total[...] = jnp.where((i >= begin) & (i < end), total[...], 0.0)


def load_vector(ref: Any, axis: int) -> jax.Array:
    """Loads a number for each row (axis 0) or column (1) of a tile."""
    load: Any = plgpu.load  # The type is that of jax 0.10, which these kernels do not take.
    return load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


def store_rows(x: jax.Array, own: Any, ref: Any) -> None:
    """Stores the rows of a group in global memory, by way of its rows in shared memory."""
    own[...] = x.astype(own.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own, ref)
    plgpu.wait_smem_to_gmem(0)


class Ring(NamedTuple):
    """Buffers that are filled one after the other.

    Attributes:
      source: The array.
      tiles: The buffers.
      full: The barriers of full buffers.
      free: The barriers of buffers that are free again.
      place: Returns the part of the array that a visit reads.
    """

    source: Any
    tiles: Any
    full: Any
    free: Any
    place: Callable[[jax.Array], Any]


def fill(rings: Sequence[Ring], visits: jax.Array) -> None:
    """Copies the tiles of all visits, each as soon as its buffer is free."""
    stages = rings[0].tiles.shape[0]

    @pl.loop(0, visits)
    def _(n):
        slot = jax.lax.rem(n, jnp.int32(stages))
        for ring in rings:
            pl.when(n >= stages)(functools.partial(plgpu.barrier_wait, ring.free.at[slot]))
            source = ring.source.at[ring.place(n)]
            plgpu.copy_gmem_to_smem(source, ring.tiles.at[slot], ring.full.at[slot])

    # A barrier must not end with a phase that nobody has waited for.
    @pl.loop(0, jnp.minimum(visits, stages))
    def _(slot):
        for ring in rings:
            plgpu.barrier_wait(ring.free.at[slot])
