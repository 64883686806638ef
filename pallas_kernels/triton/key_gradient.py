"""The gradient of the keys, parallel in rows: it has no atomics, so it is bitwise reproducible.

Given `v̄ = A⁻ᵀ ȳ`, `k̂̄_i = Σ_j W_ij k̂_j / √D` with a symmetric `W`. Its entries are
`−A_ij (v̄_i·y_j)` for `j < i` and `−A_ij (v̄_j·y_i)` for `j > i`: the same tile with `y` and `v̄`
exchanged. One program adds up a block of rows and applies the gradient of the normalisation
`k̂ = k·√D/‖k‖`: `k̄ = (√D/‖k‖)(k̂̄ − k̂ (k̂·k̂̄)/D)`.

With float16 keys, the tiles left and right of a block's own take `y` and `v̄` from their scaled
copies (`scaled`). The tiles of its own block, where the copies may hold several documents, take
`y` and `v̄` themselves, and have weights with a power of two for each row.

A second kernel does the same for a rectangle of `A`, whose columns are other tokens, such as a
prefix.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.call import pallas_call
from pallas_kernels.scaling import key_gradient_scale, largest_exponent
from pallas_kernels.triton import scaled, tile
from pallas_kernels.triton.parts import Tile, map_parts, zero_tile
from pallas_kernels.triton.scaled import Scaled
from pallas_kernels.triton.tiles import Tiles


@functools.partial(jax.jit, static_argnames=("tiles", "dtype", "interpret"))
def key_gradient(
    k: jax.Array,
    k_hat: jax.Array,
    y: jax.Array,
    v_bar: jax.Array,
    segment_ids: jax.Array | None,
    start: jax.Array | None,
    end: jax.Array | None,
    *,
    tiles: Tiles,
    dtype: jax.typing.DTypeLike,
    y_scaled: Scaled | None = None,
    v_bar_scaled: Scaled | None = None,
    upper: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns `k̄` of `y = A⁻¹ v`.

    Args:
      k: Keys `[B,S,K,D]`, not normalised.
      k_hat: `k̃ [B,K,N·R,W]`, in the dtype of the products.
      y: `[B,S,K,D]`.
      v_bar: `v̄ [B,S,K,D]`.
      segment_ids: int32 `[B,N·R]`, or None.
      start: int32 `[B,N]`, the first column of each block of rows, or None for the first of all.
      end: int32 `[B,N]`, one past the last column, or None.
      tiles: Tile sizes.
      dtype: The dtype of the result.
      y_scaled: `y` scaled, with float16 keys only.
      v_bar_scaled: `v̄` scaled, with float16 keys only.
      upper: float32 `[B,S,K,D]`, the sums over the columns after each block of rows, if `solve`
        has computed them with blocks of the same size; otherwise None.
      interpret: Whether to run in Pallas' interpreter.

    Returns:
      `k̄ [B,S,K,D]`.
    """
    body = functools.partial(_triangular, tiles=tiles, interpret=interpret)
    arrays = (k_hat, y, v_bar, y_scaled, v_bar_scaled, segment_ids, start, end, upper)
    return _call(body, k, k_hat, arrays, tiles, dtype, interpret)


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def cross_key_gradient(
    k: jax.Array,
    k_hat: jax.Array,
    x: jax.Array,
    columns: jax.Array,
    x_columns: jax.Array,
    row_segments: jax.Array | None,
    column_segments: jax.Array | None,
    first: jax.Array,
    end: jax.Array,
    *,
    tiles: Tiles,
    interpret: bool = False,
) -> jax.Array:
    """Returns `k̄` of the rows of `−A_rc`, whose cotangent at (i, j) is `x_i·x_j`.

    Args:
      k: Keys of the rows `[B,S,K,D]`, not normalised.
      k_hat: `k̃ [B,K,N·R,W]` of the rows.
      x: `[B,S,K,D]`.
      columns: `k̃ [B,K,M·C,W]`.
      x_columns: `[B,P,K,D]`, P ≤ M·C.
      row_segments: int32 `[B,N·R]`, or None.
      column_segments: int32 `[B,M·C]`, or None.
      first: int32 `[B,N]`, the first tile of columns of each block of rows.
      end: int32 `[B,N]`, one past the last tile.
      tiles: Tile sizes.
      interpret: Whether to run in Pallas' interpreter.

    Returns:
      `k̄ [B,S,K,D]`, float32.
    """
    body = functools.partial(_rectangular, tiles=tiles, interpret=interpret)
    arrays = (k_hat, x, columns, x_columns, row_segments, column_segments, first, end)
    return _call(body, k, k_hat, arrays, tiles, jnp.float32, interpret)


def _call(body, k, k_hat, arrays, tiles: Tiles, dtype, interpret: bool):
    b, _, heads, _ = k.shape
    return pallas_call(
        body,
        # Heads last, so that programs that run together read columns of one head from the cache.
        grid=(k_hat.shape[2] // tiles.rows, b, heads),
        out_shape=jax.ShapeDtypeStruct(k.shape, dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="lucid_key_gradient",
    )(k, *arrays)


def _triangular(
    # Inputs.
    k_ref,  # [B,S,K,D]
    k_hat_ref,  # [B,K,N·R,W]
    y_ref,  # [B,S,K,D]
    v_bar_ref,  # [B,S,K,D]
    y_scaled_ref,  # [B,S,K,D] and [B,K,N], or None
    v_bar_scaled_ref,  # [B,S,K,D] and [B,K,N], or None
    segments_ref,  # [B,N·R] or None
    start_ref,  # [B,N] or None
    end_ref,  # [B,N] or None
    upper_ref,  # [B,S,K,D] or None
    # Output.
    out_ref,  # [B,S,K,D]
    # Static.
    *,
    tiles: Tiles,
    interpret: bool,
):
    block, b, h = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    if upper_ref is not None:
        # The last blocks have the most columns, so they start first.
        block = pl.num_programs(0) - 1 - block
    r, c, d = tiles.rows, tiles.columns, k_ref.shape[-1]
    padded, length = k_hat_ref.shape[2], k_ref.shape[1]
    row, per_block = block * r, r // c
    s = None if padded == length else length
    dtype = k_hat_ref.dtype
    shift = tile.exponent_shift(dtype, d)
    rows = _Rows(k_hat_ref, segments_ref, b, h, row, r, d, shift, interpret)

    def load(ref, start, size: int) -> Tile:
        return tile.load_rows(ref, b, start, size, h, s)

    def sum_products(x_i, ref, count, tile_at, total):
        """Adds the terms of `count` tiles of columns, which `tile_at` numbers."""

        def visit(step, total):
            t = tile_at(step)
            weight = tile.dot_rows(x_i, load(ref, t * c, c).astype(x_i.dtype))
            weight, k_j = rows.weigh(weight, k_hat_ref, segments_ref, t * c, c)
            return total + tile.dot(weight.astype(dtype), k_j)

        return jax.lax.fori_loop(0, count, visit, total)

    def sum_scaled(own: Scaled, other: Scaled, count, tile_at):
        """Returns the sum of the same terms from the scaled copies of both factors.

        The exponents of `other` must not fall from tile to tile.
        """
        size = padded // other.exponents.shape[2]

        def exponent_of(step):
            block = tile_at(step) * c // size
            return scaled.load_exponent(other.exponents, b, h, block)

        x_i, newest = load(own.values, row, r), exponent_of(jnp.maximum(count, 1) - 1)

        def visit_run(carry):
            done, unit, total = carry
            end, e = scaled.find_run(exponent_of, done, count, newest)
            total = sum_products(
                x_i, other.values, end - done, lambda step: tile_at(done + step),
                total * scaled.power(unit - e),
            )  # fmt: skip
            return end, e, total

        zero = block * 0
        _, unit, total = jax.lax.while_loop(
            lambda carry: carry[0] < count,
            visit_run,
            (zero, zero, zero_tile(r, d)),
        )
        row_exponents = jnp.zeros((r, 1), jnp.int32)
        for part in range(pl.cdiv(r, size)):
            e = scaled.load_exponent(own.exponents, b, h, row // size + part)
            row_exponents += jnp.where(jnp.arange(r)[:, None] // size == part, e, 0)
        return total * scaled.power(row_exponents + unit)

    if start_ref is None:
        first, end = jnp.int32(0), jnp.int32(padded // c)
    else:
        first = plgpu.load(start_ref.at[b, block]) // c
        end = (plgpu.load(end_ref.at[b, block]) + c - 1) // c
    before, after = block * per_block, (block + 1) * per_block
    # Exponents of the transposed solve rise towards the first block.
    lower = before - first, lambda step: first + step
    upper = end - after, lambda step: end - 1 - step
    if y_scaled_ref is None:
        zeros = zero_tile(r, d)
        total = sum_products(load(v_bar_ref, row, r), y_ref, *lower, zeros)
        if upper_ref is None:
            total = sum_products(load(y_ref, row, r), v_bar_ref, *upper, total)
    else:
        total = sum_scaled(v_bar_scaled_ref, y_scaled_ref, *lower)
        if upper_ref is None:
            total += sum_scaled(y_scaled_ref, v_bar_scaled_ref, *upper)
    if upper_ref is not None:
        total += load(upper_ref, row, r)

    y_i, v_bar_i = load(y_ref, row, r), load(v_bar_ref, row, r)
    for t in range(per_block):
        start = row + t * c
        y_j, v_bar_j = load(y_ref, start, c), load(v_bar_ref, start, c)
        i = jax.lax.broadcasted_iota(jnp.int32, (r, c), 0)
        j = jax.lax.broadcasted_iota(jnp.int32, (r, c), 1) + t * c
        lower_weight = tile.dot_rows(v_bar_i, y_j)
        upper_weight = tile.dot_rows(y_i, v_bar_j)
        weight = jnp.where(j < i, lower_weight, jnp.where(j > i, upper_weight, 0))
        weight, k_j = rows.weigh(weight, k_hat_ref, segments_ref, start, c)
        if y_scaled_ref is None:
            total += tile.dot(weight.astype(dtype), k_j)
        else:
            weight, e = scaled.scale_rows(weight)
            total += tile.dot(weight, k_j) * scaled.power(e)

    k_bar = rows.pull_back(tile.load_rows(k_ref, b, row, r, h, s), total)
    tile.store_rows(out_ref, b, row, r, h, k_bar, s)


def _rectangular(
    # Inputs.
    k_ref,  # [B,S,K,D]
    k_hat_ref,  # [B,K,N·R,W]
    x_ref,  # [B,S,K,D]
    columns_ref,  # [B,K,M·C,W]
    x_columns_ref,  # [B,P,K,D]
    row_segments_ref,  # [B,N·R] or None
    column_segments_ref,  # [B,M·C] or None
    first_ref,  # [B,N]
    end_ref,  # [B,N]
    # Output.
    out_ref,  # [B,S,K,D]
    # Static.
    *,
    tiles: Tiles,
    interpret: bool,
):
    block, b, h = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    r, c, d = tiles.rows, tiles.columns, k_ref.shape[-1]
    row = block * r
    s, p = k_ref.shape[1], x_columns_ref.shape[1]
    # In float16 only weights with the entries of `A` themselves, at most 1, do not overflow.
    shift = largest_exponent(d) if k_hat_ref.dtype == jnp.float16 else 0.0
    rows = _Rows(k_hat_ref, row_segments_ref, b, h, row, r, d, shift, interpret)
    x_i = tile.load_rows(x_ref, b, row, r, h, s).astype(rows.dtype)

    def visit(t, total):
        x_j = tile.load_rows(x_columns_ref, b, t * c, c, h, p).astype(rows.dtype)
        weight = tile.dot_rows(x_i, x_j)
        weight, k_j = rows.weigh(weight, columns_ref, column_segments_ref, t * c, c)
        return total + tile.dot(weight.astype(rows.dtype), k_j)

    first, end = (plgpu.load(ref.at[b, block]) for ref in (first_ref, end_ref))
    total = jax.lax.fori_loop(first, end, visit, zero_tile(r, d))
    k_bar = rows.pull_back(tile.load_rows(k_ref, b, row, r, h, s), total)
    tile.store_rows(out_ref, b, row, r, h, k_bar, s)


class _Rows:
    """A block of rows, and the tiles of `A` in these rows."""

    def __init__(self, k_hat_ref, segments_ref, b, h, row, r, d, shift, interpret):
        self.b, self.h, self.d, self.shift, self.interpret = b, h, d, shift, interpret
        self.dtype = k_hat_ref.dtype
        self.k_hat = tile.load_keys(k_hat_ref, b, h, row, r)
        self.segments = tile.load_segments(segments_ref, b, row, r)

    def weigh(self, weight, columns_ref, segments_ref, start, c: int):
        """Returns `2^(c − shift) A` times the weight `[R,C]`, and the keys of its columns `[C,W]`.

        The product is masked, not its factors: zero times NaN would pass a NaN on to another
        segment.
        """
        k_j = tile.load_keys(columns_ref, self.b, self.h, start, c)
        segments_j = tile.load_segments(segments_ref, self.b, start, c)
        a = tile.entries(self.k_hat, k_j, self.shift, self.interpret)
        return tile.mask(a * weight, self.segments, segments_j), k_j

    def pull_back(self, k: Tile, total: Tile) -> Tile:
        """Returns `k̄ [R,W]` from keys `k [R,W]` and the sum of the tiles; zero for zero keys."""
        k_hat_bar = total * key_gradient_scale(self.d, self.shift)
        u, scale, square = tile.in_range(k)
        along = tile.sum_of_rows(u * k_hat_bar) / square
        zero = tile.largest_of_rows(u) == 0
        factor = math.sqrt(self.d) * jax.lax.rsqrt(square) * scale
        k_bar = factor * (k_hat_bar - u * along)
        return map_parts(lambda x: jnp.where(zero, 0, x), k_bar)
