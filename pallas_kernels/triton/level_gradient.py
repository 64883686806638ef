"""The gradient of keys that `A` takes from a level of their own for each pair of blocks.

`solve` says what levels are. At level l a block meets the `2^l` blocks before it whose numbers lack
the bit l, if its own number has it, and otherwise the `2^l` blocks behind it that have it. So one
program adds up `c̄_i = −Σ_j A_ij (v̄_i·y_j) k̂_j / √D` over the columns of one block at one level, or
the same with `y` and `v̄` exchanged. Every pair of blocks is visited once from either side, and no
sum needs atomics.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.call import pallas_call
from pallas_kernels.scaling import key_gradient_scale, largest_exponent
from pallas_kernels.triton import tile
from pallas_kernels.triton.parts import Tile, zero_tile
from pallas_kernels.triton.tiles import Tiles


@functools.partial(jax.jit, static_argnames=("block", "tiles", "interpret"))
def level_gradient(
    k_hat: jax.Array,
    y: jax.Array,
    v_bar: jax.Array,
    segment_ids: jax.Array | None,
    start: jax.Array | None,
    end: jax.Array | None,
    *,
    block: int,
    tiles: Tiles,
    interpret: bool = False,
) -> jax.Array:
    """Returns the gradient of the keys at every level, before they were scaled.

    Args:
      k_hat: `k̃ [L·B,K,S',W]`, keys of L levels.
      y: `[B,S,K,D]`, the solution.
      v_bar: `v̄ [B,S,K,D]`.
      segment_ids: int32 `[B,S']`, or None.
      start: int32 `[B,S'/R]`, the first column of each block of R rows, or None for the first.
      end: int32 `[B,S'/R]`, one past the last column, or None.
      block: Rows of the blocks that levels number, a multiple of R.
      tiles: Tile sizes.
      interpret: Whether to run in Pallas' interpreter.

    Returns:
      float32 `[L·B,K,S',W]`.
    """
    (b, _, heads, d), length = y.shape, k_hat.shape[2]
    return pallas_call(
        functools.partial(_kernel, d=d, block=block, tiles=tiles, interpret=interpret),
        # Heads last, so that programs that run together read columns of one head from the cache.
        grid=(k_hat.shape[0] // b * (length // tiles.rows), b, heads),
        out_shape=jax.ShapeDtypeStruct(k_hat.shape, jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="lucid_level_gradient",
    )(k_hat, jnp.concatenate([y, v_bar]), segment_ids, start, end)


def _kernel(
    # Inputs.
    k_hat_ref,  # [L·B,K,S',W]
    values_ref,  # [2·B,S,K,D], y and v̄
    segments_ref,  # [B,S'] or None
    start_ref,  # [B,S'/R] or None
    end_ref,  # [B,S'/R] or None
    # Output.
    out_ref,  # [L·B,K,S',W]
    # Static.
    *,
    d: int,
    block: int,
    tiles: Tiles,
    interpret: bool,
):
    program, b, h = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    (planes, _, padded, _), dtype = k_hat_ref.shape, k_hat_ref.dtype
    r, c, batch, length = tiles.rows, tiles.columns, values_ref.shape[0] // 2, values_ref.shape[1]
    s = None if padded == length else length
    # The highest levels have the most columns, so they start first.
    level, at = tile.divide(program, padded // r)
    level = planes // batch - 1 - level
    row, plane = at * r, level * batch + b
    # In float16 only weights with the entries of `A` themselves, at most 1, do not overflow.
    shift = largest_exponent(d) if dtype == jnp.float16 else 0.0

    group = row // block >> level
    is_later = group & 1
    first = ((group + 1 - 2 * is_later) << level) * block
    end = jnp.minimum(first + (block << level), padded)
    if start_ref is not None:
        first = jnp.maximum(first, plgpu.load(start_ref.at[b, at]))
        end = jnp.minimum(end, plgpu.load(end_ref.at[b, at]))

    k_i = tile.load_keys(k_hat_ref, plane, h, row, r)
    segments_i = tile.load_segments(segments_ref, b, row, r)

    def load(is_v_bar, start, size: int) -> Tile:
        x = tile.load_rows(values_ref, is_v_bar * batch + b, start, size, h, s)
        return x.astype(dtype)

    x_i = load(is_later, row, r)

    def visit(t, total):
        k_j = tile.load_keys(k_hat_ref, plane, h, t * c, c)
        segments_j = tile.load_segments(segments_ref, b, t * c, c)
        weight = tile.dot_rows(x_i, load(1 - is_later, t * c, c))
        # The product is masked, not its factors: zero times NaN would be NaN.
        a = tile.entries(k_i, k_j, shift, interpret)
        weight = tile.mask(a * weight, segments_i, segments_j)
        return total + tile.dot(weight.astype(dtype), k_j)

    total = jax.lax.fori_loop(first // c, (end + c - 1) // c, visit, zero_tile(r, d))
    tile.store_keys(out_ref, plane, h, row, total * key_gradient_scale(d, shift))
