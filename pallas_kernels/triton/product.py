"""`A_rc x` for rows and columns of different token ranges, such as a chunk and its prefix."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.call import pallas_call
from pallas_kernels.scaling import entry_scale
from pallas_kernels.triton import tile
from pallas_kernels.triton.parts import zero_tile
from pallas_kernels.triton.tiles import Tiles


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def product(
    rows: jax.Array,
    columns: jax.Array,
    x: jax.Array,
    row_segments: jax.Array | None,
    column_segments: jax.Array | None,
    first: jax.Array,
    end: jax.Array,
    *,
    tiles: Tiles,
    interpret: bool = False,
) -> jax.Array:
    """Returns `A_rc x` of every row and every column of the same segment.

    Args:
      rows: `k̃ [B,K,N·R,W]`.
      columns: `k̃ [B,K,M·C,W]`.
      x: `[B,P,K,D]`, P ≤ M·C.
      row_segments: int32 `[B,N·R]`, or None.
      column_segments: int32 `[B,M·C]`, or None.
      first: int32 `[B,N]`, the first tile of columns of each block of rows.
      end: int32 `[B,N]`, one past the last tile.
      tiles: Tile sizes.
      interpret: Whether to run in Pallas' interpreter.

    Returns:
      `[B,N·R,K,D]`, float32.
    """
    b, _, heads, d = x.shape
    padded = rows.shape[2]
    return pallas_call(
        functools.partial(_kernel, d=d, tiles=tiles, interpret=interpret),
        grid=(padded // tiles.rows, b, heads),
        out_shape=jax.ShapeDtypeStruct((b, padded, heads, d), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="lucid_product",
    )(rows, columns, x, row_segments, column_segments, first, end)


def _kernel(
    rows_ref,  # [B,K,N·R,W]
    columns_ref,  # [B,K,M·C,W]
    x_ref,  # [B,P,K,D]
    row_segments_ref,  # [B,N·R] or None
    column_segments_ref,  # [B,M·C] or None
    first_ref,  # [B,N]
    end_ref,  # [B,N]
    out_ref,  # [B,N·R,K,D]
    *,
    d: int,
    tiles: Tiles,
    interpret: bool,
):
    block, b, h = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    r, c, dtype = tiles.rows, tiles.columns, rows_ref.dtype
    shift = tile.exponent_shift(dtype, d)
    s = None if x_ref.shape[1] == columns_ref.shape[2] else x_ref.shape[1]
    k_i = tile.load_keys(rows_ref, b, h, block * r, r)
    segments_i = tile.load_segments(row_segments_ref, b, block * r, r)

    def visit(t, total):
        k_j = tile.load_keys(columns_ref, b, h, t * c, c)
        segments_j = tile.load_segments(column_segments_ref, b, t * c, c)
        a = tile.gram(k_i, k_j, segments_i, segments_j, shift, interpret).astype(dtype)
        return total + tile.dot(a, tile.load_rows(x_ref, b, t * c, c, h, s).astype(dtype))

    first, end = (plgpu.load(ref.at[b, block]) for ref in (first_ref, end_ref))
    total = jax.lax.fori_loop(first, end, visit, zero_tile(r, d))
    tile.store_rows(out_ref, b, block * r, r, h, total * entry_scale(d, shift), None)
