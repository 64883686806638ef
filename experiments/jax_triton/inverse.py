"""Normalised keys and the inverses of diagonal blocks in Triton's own language, for jax-triton.

The algorithm is that of `pallas_kernels.mosaic_gpu.inverse`: with `X` the inverses of blocks of m
rows on the diagonal, those of 2m rows are `X − X T`, where `T = A X` in the lower left quarter of
each block of 2m rows, and zero elsewhere. Two halves of 64 rows are joined in the same way. Head
widths are powers of two of at least 16.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl

from experiments.jax_triton.solve import OUT
from pallas_kernels.scaling import key_scale, largest_exponent

_HALF = 64


def diagonal_inverses(k: jax.Array, *, rows: int, multiple: int) -> tuple[jax.Array, jax.Array]:
    """Returns `k̃` and `A_bb⁻¹` of every block, for `solve`.

    Args:
      k: Keys `[B,S,K,D]`, bfloat16, not normalised.
      rows: R, 64 or 128.
      multiple: The length is padded to a multiple of this number, which R divides.

    Returns:
      `k̃ [B,K,N·R,D]`, float16, zero in the padding and for keys that are not finite, and the
      inverses as a sum of two bfloat16 terms `[B,K,N,2,R,R]`.
    """
    b, s, heads, d = k.shape
    length = -(-s // multiple) * multiple
    shapes = (
        jax.ShapeDtypeStruct((b, heads, length, d), jnp.float16),
        jax.ShapeDtypeStruct((b, heads, length // rows, 2, rows, rows), jnp.bfloat16),
    )
    options: dict[str, Any] = {OUT: shapes}
    return jax_triton.triton_call(
        k, kernel=_kernel, grid=(b * heads * (length // rows),), name="lucid_diagonal_inverses",
        num_warps=4, num_stages=1,
        S=s, HEADS=heads, D=d, N=length // rows, R=rows, H=_HALF, LEVELS=int(math.log2(_HALF)),
        SCALE=key_scale(d) * math.sqrt(d), SHIFT=largest_exponent(d),
        **options,
    )  # fmt: skip


@triton.jit
def normalize(x):
    """Returns `u = c x`, the factors `c` and `‖u‖²` of keys `[R,D]`; 1 for the square of zeros.

    The factors are those of `pallas_kernels.scaling.select_range`.
    """
    largest = tl.max(tl.abs(x), 1)
    factor = tl.where(largest > 2.0**40, 2.0**-90, tl.where(largest < 2.0**-40, 2.0**90, 1.0))
    u = x * factor[:, None]
    square = tl.sum(u * u, 1)
    return u, factor, tl.where(square == 0, 1.0, square)


@triton.jit
def _dot(a, b):
    """Returns the product of float32 matrices by float16 terms, without that of the small ones."""
    a_high, b_high = a.to(tl.float16), b.to(tl.float16)
    a_low = (a - a_high.to(tl.float32)).to(tl.float16)
    b_low = (b - b_high.to(tl.float32)).to(tl.float16)
    total = tl.dot(a_high, b_low, tl.dot(a_low, b_high))
    return tl.dot(a_high, b_high, total)


@triton.jit
def _keys(k, k_hat, row, S: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
          H: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """Normalises, stores and returns the keys of a half."""
    rows, lanes = row + tl.arange(0, H), tl.arange(0, D)
    at = rows[:, None] * (HEADS * D) + lanes[None, :]
    u, _, square = normalize(tl.load(k + at, mask=(rows < S)[:, None], other=0).to(tl.float32))
    found = u * (SCALE * tl.rsqrt(square))[:, None]
    found = tl.where((square < float("inf"))[:, None], found, 0.0).to(tl.float16)
    tl.store(k_hat + rows[:, None] * D + lanes[None, :], found)
    return found


@triton.jit
def _invert(keys, H: tl.constexpr, LEVELS: tl.constexpr, SHIFT: tl.constexpr):
    """Returns the inverse of the diagonal block of a half."""
    i, j = tl.arange(0, H)[:, None], tl.arange(0, H)[None, :]
    a = tl.exp2(tl.dot(keys, tl.trans(keys)) - SHIFT)
    x = tl.where(i == j, 1.0, tl.where((i == j + 1) & (i % 2 == 1), -a, 0.0))
    for level in tl.static_range(1, LEVELS):
        m = 1 << level
        is_quarter = (i // (2 * m) == j // (2 * m)) & (i % (2 * m) >= m) & (j % (2 * m) < m)
        x -= _dot(x, tl.where(is_quarter, _dot(a, x), 0.0))
    return x


@triton.jit
def _store(inverses, x, row, column, R: tl.constexpr, H: tl.constexpr):
    """Stores a quarter of an inverse as two terms."""
    at = (row + tl.arange(0, H))[:, None] * R + (column + tl.arange(0, H))[None, :]
    high = x.to(tl.bfloat16)
    tl.store(inverses + at, high)
    tl.store(inverses + R * R + at, (x - high.to(tl.float32)).to(tl.bfloat16))


@triton.jit
def _kernel(
    # Input.
    k,  # [B,S,K,D]
    # Outputs.
    k_hat,  # [B,K,N·R,D]
    inverses,  # [B,K,N,2,R,R]
    # Static.
    S: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    H: tl.constexpr,
    LEVELS: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    head, block = tl.program_id(0) // N, tl.program_id(0) % N
    k += ((head // HEADS).to(tl.int64) * S * HEADS + head % HEADS) * D
    k_hat += head.to(tl.int64) * (N * R * D)
    inverses += (head.to(tl.int64) * N + block) * (2 * R * R)
    upper_keys = _keys(k, k_hat, block * R, S, HEADS, D, H, SCALE)
    upper = _invert(upper_keys, H, LEVELS, SHIFT)
    _store(inverses, upper, 0, 0, R, H)
    if R > H:
        lower_keys = _keys(k, k_hat, block * R + H, S, HEADS, D, H, SCALE)
        lower = _invert(lower_keys, H, LEVELS, SHIFT)
        between = tl.exp2(tl.dot(lower_keys, tl.trans(upper_keys)) - SHIFT)
        _store(inverses, lower, H, H, R, H)
        _store(inverses, -_dot(lower, _dot(between, upper)), H, 0, R, H)
        _store(inverses, tl.zeros((H, H), tl.float32), 0, H, R, H)
