"""Multiplies by the inverse of one large diagonal block, or its transpose, stored in memory.

The inverse is read as square tiles on one side of the diagonal. The tiles of a row are shared out
among several programs, whose results the caller adds up. The block is one of many and is read in
place.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.call import pallas_call
from pallas_kernels.triton import tile
from pallas_kernels.triton.parts import zero_tile

# Rows and columns of a tile.
TILE = 64


@functools.partial(jax.jit, static_argnames=("parts", "transposed", "interpret"))
def apply_inverse(
    inverses: jax.Array,
    remainders: jax.Array,
    block: jax.Array,
    x: jax.Array,
    *,
    parts: int,
    transposed: bool,
    interpret: bool = False,
) -> jax.Array:
    """Returns `parts` summands of `A_bb⁻¹ x` or `A_bb⁻ᵀ x`.

    Args:
      inverses: `A_bb⁻¹ [B,K,N,R,R]` of N blocks, rounded to the dtype of the products.
      remainders: `[B,K,N,R/r,r,r]`, what rounding took off their diagonal blocks of r rows.
      block: int32 `[]`, the index of the block.
      x: `[B,R,K,D]`, which the kernel rounds.
      parts: Programs that share the tiles of a row.
      transposed: Whether to apply the transpose.
      interpret: Whether to run in Pallas' interpreter.

    Returns:
      `[parts,B,R,K,D]`, float32.
    """
    b, rows, heads, d = x.shape
    out = pallas_call(
        functools.partial(_kernel, parts=parts, transposed=transposed),
        grid=(rows // TILE * parts, b, heads),
        out_shape=jax.ShapeDtypeStruct((parts * b, rows, heads, d), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="lucid_solve_by_inverse",
    )(inverses, remainders, jnp.asarray(block, jnp.int32)[None], x)
    return out.reshape(parts, *x.shape)


def _kernel(
    inverses_ref,  # [B,K,N,R,R]
    remainders_ref,  # [B,K,N,R/r,r,r]
    block_ref,  # [1]
    x_ref,  # [B,R,K,D]
    out_ref,  # [parts·B,R,K,D]
    *,
    parts: int,
    transposed: bool,
):
    program, b, h = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    row, part = program // parts, program % parts
    batch, length, _, d = x_ref.shape
    tiles, dtype = length // TILE, inverses_ref.dtype
    # The interpreter loads from traced indices only.
    n = plgpu.load(block_ref.at[program * 0])

    def add(total, ref, index, i, j, start):
        """Adds the product of tile (i, j) of a matrix, or its transpose, and rows of `x`."""
        at = (pl.ds(t * TILE, TILE) for t in ((j, i) if transposed else (i, j)))
        inverse = plgpu.load(ref.at[b, h, n, *index, *at])
        x = tile.load_rows(x_ref, b, start, TILE, h, None).astype(dtype)
        return total + tile.dot(inverse.T if transposed else inverse, x)

    # Tiles on or below the diagonal; in the transpose, on or right of it.
    first, count = (row, tiles - row) if transposed else (0 * row, row + 1)

    def visit(step, total):
        j = first + part + step * parts
        return add(total, inverses_ref, (), row, j, j * TILE)

    steps = (count - part + parts - 1) // parts
    total = jax.lax.fori_loop(0, steps, visit, zero_tile(TILE, d))

    small = remainders_ref.shape[-1] // TILE
    index = row // small

    def visit_remainder(j, total):
        return add(total, remainders_ref, (index,), row % small, j, (index * small + j) * TILE)

    # The first of the programs that share a row also multiplies by the remainder.
    count = small * (part == 0).astype(jnp.int32)
    total = jax.lax.fori_loop(0, count, visit_remainder, total)
    tile.store_rows(out_ref, part * batch + b, row * TILE, TILE, h, total, None)
