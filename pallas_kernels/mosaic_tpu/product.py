"""`A_rc x` for rows and columns of different token ranges, such as a chunk and its prefix."""

from __future__ import annotations

import functools

import jax

from pallas_kernels.mosaic_tpu import rectangle, tile
from pallas_kernels.mosaic_tpu.tiles import Tiles
from pallas_kernels.scaling import entry_scale


def product(
    rows: jax.Array,
    columns: jax.Array,
    x: jax.Array,
    row_segments: jax.Array | None,
    column_segments: jax.Array | None,
    first: jax.Array,
    end: jax.Array,
    ranges: tuple[jax.Array, jax.Array] | None = None,
    *,
    d: int,
    tiles: Tiles,
    interpret: tile.Interpret = False,
) -> jax.Array:
    """Returns `A_rc x` of every row and every column of the same segment.

    Args:
      rows: `k̃ [M,S,W]`.
      columns: `k̃ [M,P,W]`.
      x: `[M,P,W]`.
      row_segments: int32 `[B,S/R,1,R]`, or None.
      column_segments: int32 `[B,P/C,1,C]`, or None.
      first: int32 `[B,S/R]`, the first tile of columns of each block of rows.
      end: int32 `[B,S/R]`, one past the last tile.
      ranges: As in `rectangle.call`.
      d: D.
      tiles: Tile sizes.
      interpret: As in `pallas_call`.

    Returns:
      `[M,S,W]`, float32.
    """
    return rectangle.call(
        functools.partial(_kernel, scale=entry_scale(d)),
        [rows],
        [columns, x],
        row_segments,
        column_segments,
        first,
        end,
        ranges,
        d=d,
        tiles=tiles,
        products=2,
        interpret=interpret,
        name="lucid_product",
    )


def _kernel(
    k_ref,  # [R,W]
    columns_ref,  # [C,W]
    x_j,  # [C,W], loaded
    row_ids,  # [R,1] or None
    column_ids,  # [1,C] or None
    out_ref,  # [R,W] float32
    *,
    scale: float,
):
    a = tile.powers(k_ref[...], columns_ref[...], row_ids, column_ids)
    out_ref[...] += scale * tile.dot(a.astype(k_ref.dtype), x_j)
