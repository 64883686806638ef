"""The gradient of `−A_rc` with respect to the normalised keys of its rows."""

from __future__ import annotations

import functools

import jax

from pallas_kernels.mosaic_tpu import rectangle, tile
from pallas_kernels.mosaic_tpu.tiles import Tiles
from pallas_kernels.scaling import key_gradient_scale


def cross_key_gradient(
    rows: jax.Array,
    x: jax.Array,
    columns: jax.Array,
    x_columns: jax.Array,
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
    """Returns `k̂̄` of the rows of `−A_rc`, whose cotangent at (i, j) is `x_i·x_j`.

    Args:
      rows: `k̃ [M,S,W]`.
      x: `[M,S,W]`.
      columns: `k̃ [M,P,W]`.
      x_columns: `[M,P,W]`.
      row_segments: int32 `[B,S/R,1,R]`, or None.
      column_segments: int32 `[B,P/C,1,C]`, or None.
      first: int32 `[B,S/R]`, the first tile of columns of each block of rows.
      end: int32 `[B,S/R]`, one past the last tile.
      ranges: As in `rectangle.call`.
      d: D.
      tiles: Tile sizes.
      interpret: As in `pallas_call`.

    Returns:
      `k̂̄ [M,S,W]`, float32.
    """
    return rectangle.call(
        functools.partial(_kernel, scale=key_gradient_scale(d)),
        [rows, x],
        [columns, x_columns],
        row_segments,
        column_segments,
        first,
        end,
        ranges,
        d=d,
        tiles=tiles,
        products=3,
        interpret=interpret,
        name="lucid_cross_key_gradient",
    )


def _kernel(
    k_ref,  # [R,W]
    x_ref,  # [R,W]
    columns_ref,  # [C,W]
    x_j,  # [C,W], loaded
    row_ids,  # [R,1] or None
    column_ids,  # [1,C] or None
    out_ref,  # [R,W] float32
    *,
    scale: float,
):
    k_j = columns_ref[...]
    a = tile.powers(k_ref[...], k_j, row_ids, column_ids)
    weight = a * tile.dot(x_ref[...], x_j, (1, 1))
    out_ref[...] += scale * tile.dot(weight.astype(k_j.dtype), k_j)
