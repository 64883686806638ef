"""The inverses of the diagonal blocks of `A`, all in parallel."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.call import pallas_call
from pallas_kernels.mosaic_tpu import tile
from pallas_kernels.mosaic_tpu.tile import BLOCK
from pallas_kernels.mosaic_tpu.tiles import Tiles, compiler_params
from pallas_kernels.scaling import entry_scale
from pallas_kernels.triangular_inverse import invert_block


def diagonal_inverses(
    k_hat: jax.Array,
    segments: jax.Array | None,
    root_beta: jax.Array | None = None,
    *,
    d: int,
    tiles: Tiles,
    transposed: bool,
    interpret: tile.Interpret = False,
) -> jax.Array:
    """Returns `A_bb⁻¹` of every block of 128 rows, or its transpose.

    Args:
      k_hat: `k̃ [M,S,W]`.
      segments: int32 `[B,S/R,1,R]`, or None.
      root_beta: `√β [M,S/R,1,R]`, float32. Given it, the blocks are those of
        `diag(1/β) + stril(A)`.
      d: D.
      tiles: Tile sizes, of which R is used.
      transposed: Whether to return `A_bb⁻ᵀ`.
      interpret: As in `pallas_call`.

    Returns:
      float32 `[M,S,128]`, the rows of one block after another.
    """
    (m, s, w), rows = k_hat.shape, tiles.rows
    heads = 1 if segments is None else m // segments.shape[0]
    return pallas_call(
        functools.partial(_kernel, d=d, transposed=transposed),
        grid=(m, s // rows),
        in_specs=[
            tile.rows_spec(rows, w),
            None if segments is None else tile.segments_spec(rows, heads),
            None if root_beta is None else tile.segments_spec(rows, 1),
        ],
        out_specs=tile.rows_spec(rows, BLOCK),
        out_shape=jax.ShapeDtypeStruct((m, s, BLOCK), jnp.float32),
        compiler_params=compiler_params(
            "lucid_diagonal_inverses",
            tiles,
            k_hat.dtype,
            d,
            parallel=2,
            sequential=0,
            interpret=interpret,
        ),
        cost_estimate=pl.CostEstimate(
            flops=m * s * 2 * BLOCK**2 * products(k_hat.dtype),
            transcendentals=m * s * BLOCK,
            bytes_accessed=m * s * (w * k_hat.dtype.itemsize + 4 * BLOCK),
        ),
        interpret=interpret,
        name="lucid_diagonal_inverses",
    )(k_hat, segments, root_beta)


def products(dtype: jnp.dtype) -> int:
    """Returns the bfloat16 products of a block: two a doubling, each split into 3 or 6."""
    doublings = BLOCK.bit_length() - 2
    return 2 * doublings * (6 if dtype == jnp.float32 else 3)


def _kernel(k_ref, segments_ref, roots_ref, out_ref, *, d: int, transposed: bool):
    scale = entry_scale(d)
    segments, roots = tile.Segments(segments_ref), tile.Segments(roots_ref)
    dot = functools.partial(tile.dot_split, dtype=k_ref.dtype)
    for start in range(0, k_ref.shape[0], BLOCK):
        rows = slice(start, start + BLOCK)
        a = scale * tile.powers(k_ref[rows], k_ref[rows], *segments.pair(rows, rows))
        column, row = roots.pair(rows, rows)
        inverse = invert_block(a, column, row, dot)
        out_ref[rows] = inverse.T if transposed else inverse
