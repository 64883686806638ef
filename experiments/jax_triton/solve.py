"""The solve of one document a sequence in Triton's own language, for jax-triton.

The algorithm, and why it neither races nor deadlocks, is that of `pallas_kernels.triton.solve`,
with float16 keys and no blocks prepared ahead. Head widths are powers of two of at least 16.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl

from pallas_kernels.scaling import entry_scale
from pallas_kernels.triton import tile
from pallas_kernels.triton.scaled import Scaled
from pallas_kernels.triton.tiles import Tiles

_EXP2 = tl.constexpr(tile.MIXED_EXP2[True])
# jax-triton 0.4 has renamed the argument.
OUT = (
    "out_type"
    if "out_type" in inspect.signature(jax_triton.triton_call).parameters
    else "out_shape"
)


def solve(
    k_hat: jax.Array,
    inverses: jax.Array,
    v: jax.Array,
    k: jax.Array,
    *,
    tiles: Tiles,
    reverse: bool = False,
) -> tuple[jax.Array, Scaled]:
    """Returns `A⁻¹ v`, or `A⁻ᵀ v`, in the dtype of `v`, and the same scaled.

    Args:
      k_hat: `k̃ [B,K,N·R,D]`, float16.
      inverses: `A_bb⁻¹ [B,K,N,2,R,R]`, bfloat16 terms.
      v: Right-hand sides `[B,S,K,D]`, bfloat16.
      k: Keys `[B,S,K,D]`, not normalised. Tokens whose keys are not finite become NaN.
      tiles: Tile sizes, of the same table as those of the Pallas kernels; no lookahead.
      reverse: Whether to solve the transposed system.
    """
    b, s, heads, d = v.shape
    blocks = k_hat.shape[2] // tiles.rows
    shift = tile.exponent_shift(k_hat.dtype, d)
    shapes = (
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        jax.ShapeDtypeStruct(v.shape, jnp.float16),
        jax.ShapeDtypeStruct((b, heads, blocks), jnp.int32),
        jax.ShapeDtypeStruct((1 + b * heads * blocks,), jnp.int32),
    )
    options: dict[str, Any] = {OUT: shapes}
    x, copy, exponents, _ = jax_triton.triton_call(
        k_hat, inverses, v, k, kernel=_kernel, grid=(b * heads * blocks,), zeroed_outputs=(3,),
        name="lucid_solve_transposed" if reverse else "lucid_solve",
        num_warps=tiles.warps, num_stages=tiles.stages,
        S=s, HEADS=heads, D=d, N=blocks, R=tiles.rows, C=tiles.columns,
        GROUP=math.gcd(tiles.head_group, b * heads), SHIFT=shift, SCALE=entry_scale(d, shift),
        LOG_LIMIT=-math.ceil((math.log2(d) - 3) / 2), REVERSE=reverse,
        **options,
    )  # fmt: skip
    return x, Scaled(copy, exponents)


@triton.jit
def power(e):
    """Returns `2^e` in float32, for exponents from −126 to 126; others are taken as these."""
    e = tl.minimum(tl.maximum(e, -126), 126)
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp2(x):
    """Returns `2^x`, for most entries by the machine's approximation, for others by a cubic."""
    return tl.inline_asm_elementwise(
        _EXP2, "=r,=r,=r,=r,r,r,r,r", [x], dtype=tl.float32, is_pure=True, pack=4
    )


@triton.jit
def _kernel(
    # Inputs.
    k_hat,  # [B,K,N·R,D]
    inverses,  # [B,K,N,2,R,R]
    v,  # [B,S,K,D]
    k,  # [B,S,K,D]
    # Outputs.
    x,  # [B,S,K,D]
    copy,  # [B,S,K,D]
    exponents,  # [B,K,N]
    counters,  # [1 + B·K·N]
    # Static.
    S: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    LOG_LIMIT: tl.constexpr,
    REVERSE: tl.constexpr,
):
    ticket = tl.atomic_add(counters, 1)
    place = ticket % (N * GROUP) // GROUP
    head = ticket // (N * GROUP) * GROUP + ticket % GROUP
    progress = counters + 1 + head * N
    rows, lanes = tl.arange(0, R), tl.arange(0, D)
    keys = k_hat + head.to(tl.int64) * (N * R * D)
    first = ((head // HEADS).to(tl.int64) * S * HEADS + head % HEADS) * D
    block = N - 1 - place if REVERSE else place
    row = block * R
    k_i = tl.load(keys + (row + rows)[:, None] * D + lanes[None, :])

    total = tl.zeros((R, D), tl.float32)
    done, state, unit = 0, 0, -1000
    while done < place:
        while state >> 8 <= done:
            state = tl.atomic_max(progress, state)
        ready = tl.minimum(state >> 8, place)
        newest = (state & 255) - 128
        e = newest
        if newest != unit:
            # The blocks from `done` on that have one exponent.
            e = tl.load(exponents + head * N + (N - 1 - done if REVERSE else done))
            found = newest
            while found != e:
                ready = (done + ready + 1) // 2
                found = tl.load(exponents + head * N + (N - ready if REVERSE else ready - 1))
        total *= power(unit - e)
        unit = e
        for t in range(done * (R // C), ready * (R // C)):
            column = (N * R - (t + 1) * C if REVERSE else t * C) + tl.arange(0, C)
            k_j = tl.load(keys + column[:, None] * D + lanes[None, :])
            a = exp2(tl.dot(k_i, tl.trans(k_j)) - SHIFT)
            x_j = copy + first + column[:, None] * (HEADS * D) + lanes[None, :]
            x_j = tl.load(x_j, mask=(column < S)[:, None], other=0) if N * R > S else tl.load(x_j)
            total = tl.dot(a.to(tl.float16), x_j, total)
        done = ready

    own = first + (row + rows)[:, None] * (HEADS * D) + lanes[None, :]
    inside = tl.broadcast_to((row + rows < S)[:, None], (R, D))
    rhs = tl.load(v + own, mask=inside, other=0).to(tl.float32) - total * SCALE * power(unit)
    rhs += 0 * tl.load(k + own, mask=inside, other=0).to(tl.float32)
    terms = inverses + (head.to(tl.int64) * N + block) * (2 * R * R)
    at = rows[:, None] * R + rows[None, :]
    if REVERSE:
        at = rows[None, :] * R + rows[:, None]
    inverse_low, inverse_high = tl.load(terms + R * R + at), tl.load(terms + at)
    high = rhs.to(tl.bfloat16)
    low = (rhs - high.to(tl.float32)).to(tl.bfloat16)
    x_i = tl.dot(inverse_low, high)
    x_i = tl.dot(inverse_high, low, x_i)
    x_i = tl.dot(inverse_high, high, x_i)

    size = tl.abs(x_i)
    largest = tl.max(tl.max(tl.where(size < float("inf"), size, 0.0), 1), 0)
    e = (largest.to(tl.int32, bitcast=True) >> 23) - 125
    e = tl.minimum(tl.maximum(((e + 3) >> 2 << 2) - LOG_LIMIT, -126), 126)
    e = tl.maximum(unit, e)
    tl.store(copy + own, (x_i * power(-e)).to(tl.float16), mask=inside)
    tl.store(exponents + head * N + block, e)
    tl.debug_barrier()
    tl.atomic_max(progress, (place + 1 << 8) + (e + 128))
    # No other program waits for this.
    tl.store(x + own, x_i.to(x.dtype.element_ty), mask=inside)
