"""Sums over the columns of a rectangle of `A`: the grid of `product` and `cross_key_gradient`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.call import pallas_call
from pallas_kernels.mosaic_tpu import tile
from pallas_kernels.mosaic_tpu.tiles import Tiles, compiler_params


def call(
    body: Callable[..., None],
    rows: Sequence[jax.Array],
    columns: Sequence[jax.Array],
    row_segments: jax.Array | None,
    column_segments: jax.Array | None,
    first: jax.Array,
    end: jax.Array,
    ranges: tuple[jax.Array, jax.Array] | None,
    *,
    d: int,
    tiles: Tiles,
    products: int,
    interpret: tile.Interpret,
    name: str,
) -> jax.Array:
    """Calls `body` for every tile within bounds and returns the sums of its results.

    Args:
      body: Takes a block of each of `rows` and of `columns`, the last one loaded, their segment
        ids `[R,1]` and `[1,C]` (or None), and the block of the output, to which it adds. It
        multiplies by the last one, so that zeros there leave columns out.
      rows: Arrays `[M,S,W]`.
      columns: Arrays `[M,P,W]`.
      row_segments: int32 `[B,S/R,1,R]`, or None.
      column_segments: int32 `[B,P/C,1,C]`, or None.
      first: int32 `[B,S/R]`, the first tile of columns of each block of rows.
      end: int32 `[B,S/R]`, one past the last tile.
      ranges: Two arrays int32 `[S/R]`, the first column of each block of rows and one past the
        last, which may lie inside a tile; None takes whole tiles.
      d: D.
      tiles: Tile sizes.
      products: Matrix products per tile, for the cost estimate.
      interpret: As in `pallas_call`.
      name: Name of the kernel.

    Returns:
      `[M,S,W]`, float32.
    """
    m, s, w = rows[0].shape
    p, r, c = columns[0].shape[1], tiles.rows, tiles.columns
    heads, size = m // first.shape[0], rows[0].dtype.itemsize

    def column_tile(m, i, t, first, end, *_):
        # A step out of bounds computes nothing; with the same tile as before it copies nothing.
        b = m // heads
        visited = jnp.clip(t, first[b, i], jnp.maximum(end[b, i] - 1, first[b, i]))
        # Bounds of an empty range may lie beyond the last tile.
        return jnp.minimum(visited, p // c - 1)

    row_spec = tile.rows_spec(r, w)
    column_spec = pl.BlockSpec((None, c, w), lambda m, i, t, *b: (m, column_tile(m, i, t, *b), 0))
    scalars = first, end, *(ranges or ())
    row_segments_spec = column_segments_spec = None
    if row_segments is not None:
        row_segments_spec = tile.segments_spec(r, heads)
        column_segments_spec = pl.BlockSpec(
            (None, None, 1, c),
            lambda m, i, t, *b: (m // heads, column_tile(m, i, t, *b), 0, 0),
        )
    return pallas_call(
        functools.partial(_kernel, body, len(rows), len(columns), heads, len(scalars)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(m, s // r, p // c),
            in_specs=[
                *[row_spec] * len(rows),
                *[column_spec] * len(columns),
                row_segments_spec,
                column_segments_spec,
            ],
            out_specs=row_spec,
        ),
        out_shape=jax.ShapeDtypeStruct((m, s, w), jnp.float32),
        compiler_params=compiler_params(
            name,
            tiles,
            rows[0].dtype,
            d,
            parallel=2,
            sequential=1,
            interpret=interpret,
        ),
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * m * s * p * w,
            transcendentals=m * s * p,
            bytes_accessed=m * w * (len(columns) * p * (s // r) * size + s * (2 * size + 4)),
        ),
        interpret=interpret,
        name=name,
    )(*scalars, *rows, *columns, row_segments, column_segments)


def _kernel(body, num_rows: int, num_columns: int, heads: int, num_scalars: int, *refs):
    first_ref, end_ref, *range_refs = refs[:num_scalars]
    *arrays, row_segments_ref, column_segments_ref, out_ref = refs[num_scalars:]
    assert len(arrays) == num_rows + num_columns
    b, i, t = pl.program_id(0) // heads, pl.program_id(1), pl.program_id(2)

    @pl.when(t == 0)
    def clear():
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when((first_ref[b, i] <= t) & (t < end_ref[b, i]))
    def visit():
        row_ids = tile.Segments(row_segments_ref).column
        column_ids = None if column_segments_ref is None else column_segments_ref[...]
        values = arrays[-1][...]
        if range_refs:
            # Columns out of range count with a value of zero.
            low, high = (ref[i] for ref in range_refs)
            c = values.shape[0]
            column = t * c + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
            values = jnp.where((low <= column) & (column < high), values, 0)
        body(*arrays[:-1], values, row_ids, column_ids, out_ref)
