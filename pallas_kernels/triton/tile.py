"""What the kernels share: tiles in and out of memory, products, and the entries of `A`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_LOG2E = math.log2(math.e)


def width(d: int) -> int:
    """Columns of a tile for head width D: a power of two that the matrix units take."""
    return max(16, 1 << (d - 1).bit_length())


def key_scale(d: int) -> float:
    """`k̃ / k̂`."""
    return math.sqrt(_LOG2E / math.sqrt(d))


def largest_exponent(d: int) -> float:
    """`c`: `A_ij = 2^(k̃_i·k̃_j − c)`."""
    return _LOG2E * math.sqrt(d)


def exponent_shift(dtype: jax.typing.DTypeLike, d: int) -> float:
    """What is taken off the exponents of a tile of `A` that is summed.

    The rest of `c` is one factor after the sum. It costs an operation for each entry,
    so that nothing is best; float16 ends at 2¹⁶, hence at most 14 there, which also
    keeps small entries out of its subnormal numbers.
    """
    return max(0.0, largest_exponent(d) - 14) if dtype == jnp.float16 else 0.0


def load_rows(ref, b, start, size: int, h, w: int, s: int | None) -> jax.Array:
    """Rows `start` to `start + size` of head `h` of `[B,S,K,D]`, zero outside: `[size, W]`.

    Args:
      s: Rows that exist, None where none of these is beyond.
    """
    return plgpu.load(
        ref.at[b, pl.ds(start, size), h, pl.ds(0, w)], **_masked(ref, start, size, w, s, other=0)
    )


def store_rows(ref, b, start, size: int, h, x: jax.Array, s: int | None) -> None:
    """The inverse of `load_rows`."""
    w = x.shape[1]
    plgpu.store(
        ref.at[b, pl.ds(start, size), h, pl.ds(0, w)],
        x.astype(ref.dtype),
        **_masked(ref, start, size, w, s),
    )


def _masked(ref, start, size, w, s, **other):
    mask = None
    if s is not None:
        mask = (start + jnp.arange(size) < s)[:, None]
    if ref.shape[-1] != w:
        inside = (jnp.arange(w) < ref.shape[-1])[None, :]
        mask = inside if mask is None else mask & inside
    return {} if mask is None else {"mask": jnp.broadcast_to(mask, (size, w)), **other}


def load_segments(ref, b, start, size: int) -> jax.Array | None:
    """Segment ids `[size]` from `[B,S']`, or None."""
    return None if ref is None else plgpu.load(ref.at[b, pl.ds(start, size)])


def dot(a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
    """`a b` or `a bᵀ`, accumulated in float32; float32 operands are not rounded."""
    return plgpu.dot(a, b, trans_b=transposed, allow_tf32=False)


def dot_split(a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`a b` of float32 operands, to 2⁻¹⁶ on bfloat16 units or, for float32, exactly.

    Each operand is the sum of two bfloat16 numbers; the product of the two small parts is
    below the rounding of what is kept.
    """
    if dtype == jnp.float32:
        return dot(a, b)
    a_high, b_high = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    a_low = (a - a_high.astype(jnp.float32)).astype(jnp.bfloat16)
    b_low = (b - b_high.astype(jnp.float32)).astype(jnp.bfloat16)
    return dot(a_low, b_high) + dot(a_high, b_low) + dot(a_high, b_high)


def exp2(x: jax.Array, interpret: bool) -> jax.Array:
    """`2^x` in one instruction, which flushes subnormal numbers and errs by 2⁻²² at most.

    The library's `exp2` scales subnormal arguments and results, in four instructions.
    """
    if interpret:
        return jnp.exp2(x)
    [out] = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return out


def gram(rows, columns, row_segments, column_segments, shift: float, interpret: bool) -> jax.Array:
    """`2^(k̃_i·k̃_j − shift)` within segments `[R,C]`: `2^(c − shift)·A` off the diagonal."""
    exponents = dot(rows, columns, transposed=True)
    a = exp2(exponents - shift if shift else exponents, interpret)
    if row_segments is None:
        return a
    return jnp.where(row_segments[:, None] == column_segments[None, :], a, 0)
