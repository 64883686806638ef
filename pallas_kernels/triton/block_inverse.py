"""`A_bb⁻¹ x` of one large diagonal block whose inverse lies in memory, or of its transpose.

A program adds up products of R×C tiles on one side of the diagonal, every so manyth of its rows;
the sums of those that share a row are left to the caller. The block is one of many, and is read
where it lies.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.triton import tile

# Rows and columns of a tile.
TILE = 64


@functools.partial(jax.jit, static_argnames=("parts", "transposed", "interpret"))
def apply_inverse(
    whole: jax.Array,
    rest: jax.Array,
    block: jax.Array,
    x: jax.Array,
    *,
    parts: int,
    transposed: bool,
    interpret: bool = False,
) -> jax.Array:
    """Shares in `A_bb⁻¹ x` or `A_bb⁻ᵀ x`.

    Args:
      whole: `A_bb⁻¹ [B,K,N,R,R]`, in the dtype of products.
      rest: `[B,K,N,R/r,r,r]`, what is missing in its diagonal blocks of r rows.
      block: int32 `[]`: which of the N.
      x: `[B,R,K,D]`, which is rounded.
      parts: Programs that share the columns.
      transposed: Of the transpose.
      interpret: Runs in Pallas' interpreter.

    Returns:
      `[parts,B,R,K,D]`, float32.
    """
    b, rows, heads, d = x.shape
    out = pl.pallas_call(
        functools.partial(_kernel, parts=parts, transposed=transposed),
        grid=(rows // TILE * parts, b, heads),
        out_shape=jax.ShapeDtypeStruct((parts * b, rows, heads, d), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="lucid_solve_by_inverse",
    )(whole, rest, jnp.asarray(block, jnp.int32)[None], x)
    return out.reshape(parts, *x.shape)


def _kernel(
    whole_ref,  # [B,K,N,R,R]
    rest_ref,  # [B,K,N,R/r,r,r]
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
    tiles, w, dtype = length // TILE, tile.width(d), whole_ref.dtype
    # The interpreter loads from traced places only.
    n = plgpu.load(block_ref.at[program * 0])

    def add(total, ref, index, i, j, start):
        """With the tile (i, j) of a matrix, or of its transpose, and rows of `x` from a start."""
        at = (pl.ds(t * TILE, TILE) for t in ((j, i) if transposed else (i, j)))
        inverse = plgpu.load(ref.at[b, h, n, *index, *at])
        x = tile.load_rows(x_ref, b, start, TILE, h, w, None).astype(dtype)
        return total + tile.dot(inverse.T if transposed else inverse, x)

    # On or below the diagonal, or on or beside it in the transpose.
    first, count = (row, tiles - row) if transposed else (0 * row, row + 1)

    def visit(step, total):
        j = first + part + step * parts
        return add(total, whole_ref, (), row, j, j * TILE)

    steps = (count - part + parts - 1) // parts
    total = jax.lax.fori_loop(0, steps, visit, jnp.zeros((TILE, w), jnp.float32))

    small = rest_ref.shape[-1] // TILE
    corner = row // small

    def visit_rest(j, total):
        return add(total, rest_ref, (corner,), row % small, j, (corner * small + j) * TILE)

    # Where a row is shared, the first program has the rest.
    rests = small * (part == 0).astype(jnp.int32)
    total = jax.lax.fori_loop(0, rests, visit_rest, total)
    tile.store_rows(out_ref, part * batch + b, row * TILE, TILE, h, total, None)
