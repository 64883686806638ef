"""The key gradient of one document a sequence in Triton's own language, for jax-triton.

The algorithm is that of `pallas_kernels.triton.key_gradient`, with float16 keys, scaled copies of
`y` and `v̄`, and both halves of the sum. Head widths are powers of two of at least 16.
"""

from __future__ import annotations

import math

import jax
import jax_triton
import triton
import triton.language as tl

from experiments.jax_triton.inverse import normalize
from experiments.jax_triton.solve import OUT, exp2, power
from pallas_kernels.scaling import key_gradient_scale
from pallas_kernels.triton import tile
from pallas_kernels.triton.scaled import Scaled
from pallas_kernels.triton.tiles import Tiles


def key_gradient(
    k: jax.Array,
    k_hat: jax.Array,
    y: jax.Array,
    v_bar: jax.Array,
    y_scaled: Scaled,
    v_bar_scaled: Scaled,
    *,
    tiles: Tiles,
) -> jax.Array:
    """Returns `k̄` of `y = A⁻¹ v`, `[B,S,K,D]` in the dtype of `k`.

    Args:
      k: Keys `[B,S,K,D]`, bfloat16, not normalised.
      k_hat: `k̃ [B,K,N·R,D]`, float16.
      y: `[B,S,K,D]`, bfloat16.
      v_bar: `v̄ [B,S,K,D]`, bfloat16.
      y_scaled: `y` scaled, as the solve returns it.
      v_bar_scaled: `v̄` scaled.
      tiles: Tile sizes, of the same table as those of the Pallas kernel.
    """
    b, s, heads, d = k.shape
    length = k_hat.shape[2]
    shift = tile.exponent_shift(k_hat.dtype, d)
    out = {OUT: jax.ShapeDtypeStruct(k.shape, k.dtype)}
    # Three stages of such tiles take 240 KiB of shared memory, more than a Hopper GPU has.
    stages = min(tiles.stages, 2) if tiles.rows * d > 128 * 64 else tiles.stages
    return jax_triton.triton_call(
        k, k_hat, y, v_bar, *y_scaled, *v_bar_scaled, kernel=_kernel,
        grid=(b * heads * (length // tiles.rows),), name="lucid_key_gradient",
        num_warps=tiles.warps, num_stages=stages,
        S=s, HEADS=heads, D=d, LENGTH=length, R=tiles.rows, C=tiles.columns,
        SIZE=length // y_scaled.exponents.shape[2], SHIFT=shift,
        SCALE=key_gradient_scale(d, shift), ROOT=math.sqrt(d),
        **out,
    )  # fmt: skip


@triton.jit
def _sum_scaled(
    k_i, keys, own, own_exponents, other, other_exponents, row, first, count,
    S: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, LENGTH: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, SHIFT: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Sums the terms of `count` tiles, from `first` on or, if reversed, from `first` back."""
    rows, lanes = tl.arange(0, R), tl.arange(0, D)
    x_i = own + (row + rows)[:, None] * (HEADS * D) + lanes[None, :]
    x_i = tl.load(x_i, mask=(row + rows < S)[:, None], other=0)
    total = tl.zeros((R, D), tl.float32)
    sign = -1 if REVERSE else 1
    newest = tl.load(other_exponents + (first + sign * (tl.maximum(count, 1) - 1)) * C // SIZE)
    done, unit = 0, 0
    while done < count:
        # The tiles from `done` on that have one exponent.
        e = tl.load(other_exponents + (first + sign * done) * C // SIZE)
        end, found = count, newest
        while found != e:
            end = (done + end + 1) // 2
            found = tl.load(other_exponents + (first + sign * (end - 1)) * C // SIZE)
        total *= power(unit - e)
        unit = e
        for step in range(done, end):
            column = (first + sign * step) * C + tl.arange(0, C)
            x_j = other + column[:, None] * (HEADS * D) + lanes[None, :]
            x_j = tl.load(x_j, mask=(column < S)[:, None], other=0) if LENGTH > S else tl.load(x_j)
            k_j = tl.load(keys + column[:, None] * D + lanes[None, :])
            weight = tl.dot(x_i, tl.trans(x_j))
            weight *= exp2(tl.dot(k_i, tl.trans(k_j)) - SHIFT)
            total = tl.dot(weight.to(tl.float16), k_j, total)
        done = end
    return total * power(tl.load(own_exponents + (row + rows) // SIZE) + unit)[:, None]


@triton.jit
def _kernel(
    # Inputs.
    k,  # [B,S,K,D]
    k_hat,  # [B,K,LENGTH,D]
    y,  # [B,S,K,D]
    v_bar,  # [B,S,K,D]
    y_copy,  # [B,S,K,D]
    y_exponents,  # [B,K,LENGTH/SIZE]
    v_bar_copy,  # [B,S,K,D]
    v_bar_exponents,  # [B,K,LENGTH/SIZE]
    # Output.
    k_bar,  # [B,S,K,D]
    # Static.
    S: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    LENGTH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    ROOT: tl.constexpr,
):
    head, block = tl.program_id(0) // (LENGTH // R), tl.program_id(0) % (LENGTH // R)
    row = block * R
    rows, lanes = tl.arange(0, R), tl.arange(0, D)
    keys = k_hat + head.to(tl.int64) * (LENGTH * D)
    first = ((head // HEADS).to(tl.int64) * S * HEADS + head % HEADS) * D
    exponents = head * (LENGTH // SIZE)
    k_i = tl.load(keys + (row + rows)[:, None] * D + lanes[None, :])
    y_of, v_of = y_copy + first, v_bar_copy + first
    e_y, e_v = y_exponents + exponents, v_bar_exponents + exponents
    before, after, tiles = row // C, (row + R) // C, LENGTH // C
    total = _sum_scaled(
        k_i, keys, v_of, e_v, y_of, e_y, row, 0, before,
        S, HEADS, D, LENGTH, R, C, SIZE, SHIFT, False,
    )  # fmt: skip
    # Exponents of the transposed solve rise towards the first block.
    total += _sum_scaled(
        k_i, keys, y_of, e_y, v_of, e_v, row, tiles - 1, tiles - after,
        S, HEADS, D, LENGTH, R, C, SIZE, SHIFT, True,
    )  # fmt: skip

    own = first + (row + rows)[:, None] * (HEADS * D) + lanes[None, :]
    inside = tl.broadcast_to((row + rows < S)[:, None], (R, D))
    y_i = tl.load(y + own, mask=inside, other=0)
    v_bar_i = tl.load(v_bar + own, mask=inside, other=0)
    for t in range(R // C):
        columns = t * C + tl.arange(0, C)
        at = first + (row + columns)[:, None] * (HEADS * D) + lanes[None, :]
        within = tl.broadcast_to((row + columns < S)[:, None], (C, D))
        y_j = tl.load(y + at, mask=within, other=0)
        v_bar_j = tl.load(v_bar + at, mask=within, other=0)
        k_j = tl.load(keys + (row + columns)[:, None] * D + lanes[None, :])
        ahead = rows[:, None] - columns[None, :]
        lower, upper = tl.dot(v_bar_i, tl.trans(y_j)), tl.dot(y_i, tl.trans(v_bar_j))
        weight = tl.where(ahead > 0, lower, tl.where(ahead < 0, upper, 0.0))
        weight *= exp2(tl.dot(k_i, tl.trans(k_j)) - SHIFT)
        # Each row in units of its own largest entry.
        e = (tl.max(tl.abs(weight), 1).to(tl.int32, bitcast=True) >> 23) - 126
        scaled = (weight * power(-e)[:, None]).to(tl.float16)
        total += tl.dot(scaled, k_j) * power(e)[:, None]

    # The gradient of the normalisation; zero keys have none.
    u, factor, square = normalize(tl.load(k + own, mask=inside, other=0).to(tl.float32))
    total *= SCALE
    along = tl.sum(u * total, 1) / square
    norm = tl.where(tl.max(tl.abs(u), 1) == 0, 0.0, ROOT * tl.rsqrt(square) * factor)
    found = norm[:, None] * (total - u * along[:, None])
    tl.store(k_bar + own, found.to(k_bar.dtype.element_ty), mask=inside)
