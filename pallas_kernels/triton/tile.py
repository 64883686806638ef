"""Helpers of the Triton kernels: loads and stores of tiles, products, and the entries of `A`."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.bf16_split import bf16_split, dot_bf16_split
from pallas_kernels.scaling import largest_exponent, select_range


def width(d: int) -> int:
    """Returns W, the power of two of at least 16 (for the matrix units) that holds D columns."""
    return max(16, 1 << (d - 1).bit_length())


def keys_at(ref, b, h, start, size: int):
    """Returns keys `[size,W]` of `[B,K,S',W]` as a reference.

    All its indices have 32 bits: a constant would get 64 in the interpreter, where JAX's have them.
    """
    first: Any = np.int32(0)
    return ref.at[b, h, pl.ds(start, size), pl.ds(first, ref.shape[-1])]


def load_keys(ref, b, h, start, size: int) -> jax.Array:
    """Loads keys `[size,W]` of `[B,K,S',W]`."""
    return plgpu.load(keys_at(ref, b, h, start, size))


def level_of(i: jax.Array, j: jax.Array) -> jax.Array:
    """Returns the highest bit in which the numbers of two blocks differ, int32; 0 for one block."""
    return jnp.maximum(31 - jax.lax.clz(i ^ j), 0)


def exponent_shift(dtype: jax.typing.DTypeLike, d: int) -> float:
    """Returns the shift of the exponents of a tile of `A` whose products are summed.

    A shift costs one operation for each entry, so it is 0 where the dtype allows that. The range
    of float16 ends at 2¹⁶, hence exponents of at most 12 there. They leave room for a factor of the
    key gradient (`scaled`), and keep small entries out of the subnormal numbers.
    """
    return max(0.0, largest_exponent(d) - 12) if dtype == jnp.float16 else 0.0


def in_range(k: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `u = c k`, the factors `c` and `‖u‖²` of keys `[R,W]`, in float32.

    No square overflows or underflows. A zero key stays zero, with 1 for `‖u‖²`.
    """
    k = k.astype(jnp.float32)
    largest = jnp.max(jnp.abs(k), 1, keepdims=True)
    scale = select_range(largest, jnp.ones_like(largest))
    u = k * scale
    square = jnp.sum(u * u, 1, keepdims=True)
    return u, scale, jnp.where(square == 0, 1, square)


def load_rows(
    ref, b, start, size: int, h, w: int, end: int | None, *, begin: jax.Array | None = None
) -> jax.Array:
    """Loads tokens `start` to `start + size` of head `h` of `[B,S,K,D]` as `[size,W]`.

    Tokens before `begin` and from `end` on, and elements outside the array, are zero. A limit is
    None where no token lies beyond it.
    """
    return plgpu.load(
        ref.at[b, pl.ds(start, size), h, _lanes(ref, b, w)],
        **_masked(ref, start, size, w, begin, end, other=0),
    )


def store_rows(
    ref, b, start, size: int, h, x: jax.Array, end: int | None, *, begin: jax.Array | None = None
) -> None:
    """Stores `x [size,W]` where `load_rows` loads it."""
    w = x.shape[1]
    plgpu.store(
        ref.at[b, pl.ds(start, size), h, _lanes(ref, b, w)],
        x.astype(ref.dtype),
        **_masked(ref, start, size, w, begin, end),
    )


def _lanes(ref, b, w: int):
    # A traced start, because jax rejects a constant one with lanes beyond D, which are masked.
    first: Any = np.int32(0) if ref.shape[-1] == w else b * 0
    return pl.ds(first, w)


def _masked(ref, start, size, w, begin, end, **other):
    row = start + jnp.arange(size)
    masks = [(row >= begin)[:, None]] if begin is not None else []
    if end is not None:
        masks.append((row < end)[:, None])
    if ref.shape[-1] != w:
        masks.append((jnp.arange(w) < ref.shape[-1])[None, :])
    if not masks:
        return {}
    mask = functools.reduce(jnp.logical_and, masks)
    return {"mask": jnp.broadcast_to(mask, (size, w)), **other}


def keep_rows(x: jax.Array, start, begin, end) -> jax.Array:
    """Returns `x [size,W]`, rows from `start` on, with zeros for those outside of the limits."""
    row = start + jnp.arange(x.shape[0])
    return jnp.where(((row >= begin) & (row < end))[:, None], x, 0)


def divide(n, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the quotient and the remainder of int32 `n ≥ 0`."""
    return jax.lax.div(n, np.int32(size)), jax.lax.rem(n, np.int32(size))


def load_segments(ref, b, start, size: int) -> jax.Array | None:
    """Loads segment ids `[size]` of `[B,S']`, or returns None where there are none."""
    return None if ref is None else plgpu.load(ref.at[b, pl.ds(start, size)])


def dot(a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
    """Returns `a b` or `a bᵀ` in float32; float32 operands keep their 24 bits."""
    multiply = functools.partial(plgpu.dot, trans_b=transposed)
    # The split is faster on matrix units than float32 on vector units, and its code is much
    # shorter.
    return dot_bf16_split(a, b, 3, multiply) if a.dtype == jnp.float32 else multiply(a, b)


def dot_split(a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns `a b` of float32 operands, to 16 of their bits if results are rounded to 16 bits."""
    return dot_bf16_split(a, b, 3 if dtype == jnp.float32 else 2, plgpu.dot)


def dot_terms(load_a: Callable[[int], jax.Array], b: jax.Array) -> jax.Array:
    """Returns `dot_split` for a 16-bit dtype, given a function that loads the two terms of `a`."""
    b_high, b_low = bf16_split(b, 2)
    total = plgpu.dot(load_a(1), b_high)
    a_high = load_a(0)
    return total + plgpu.dot(a_high, b_low) + plgpu.dot(a_high, b_high)


def exp2(
    x: jax.Array, dtype: jax.typing.DTypeLike, interpret: bool, *, bounded: bool = True
) -> jax.Array:
    """Returns `2^x` of float32 `x`, exact enough for a result that is rounded to `dtype`.

    It is one instruction with an error of 2⁻²² that flushes subnormal numbers; the library
    function spends four instructions on those. The unit that executes it is the bottleneck of the
    kernels (for a tile of 64 columns it takes as long as both products). For 16-bit dtypes, every
    fourth entry is therefore a cubic on the multipliers: its error of 2⁻¹³⋅⁷ is below the rounding
    errors of float16, 2⁻¹², and bfloat16, 2⁻⁹.

    Args:
      x: At most 127.
      dtype: The dtype that the result is rounded to.
      interpret: Whether Pallas' interpreter runs the kernel.
      bounded: Whether x is at least −126. Otherwise a smaller x gives at most 2⁻¹²⁶.
    """
    if interpret:
        return jnp.exp2(x)
    asm, pack = (_EXP2, 1) if dtype == jnp.float32 else (_MIXED[bounded], 4)
    [out] = plgpu.elementwise_inline_asm(
        asm,
        args=[x],
        constraints=",".join(["=r"] * pack + ["r"] * pack),
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return out


_EXP2 = "ex2.approx.ftz.f32 $0, $1;"
_CUBIC = [
    f"0f{struct.unpack('<I', struct.pack('<f', c))[0]:08X}"
    for c in (0.05517167, 0.24261113, 0.69326099, 0.99992807)
]


def _mixed(bounded: bool) -> str:
    # Adding 1.5·2²³ leaves ⌊x⌉ in the low bits, which are shifted into the exponent of a cubic in
    # x − ⌊x⌉. The cubic has the least relative error on [−½, ½]. 0fC2FC0000 is −126.
    return """{
    .reg .f32 x, t, f, p;
    .reg .b32 s, q;
    ex2.approx.ftz.f32 $0, $4;
    ex2.approx.ftz.f32 $1, $5;
    ex2.approx.ftz.f32 $2, $6;
    %s
    add.rn.f32 t, x, 0f4B400000;
    sub.rn.f32 f, t, 0f4B400000;
    sub.rn.f32 f, x, f;
    mov.f32 p, %s;
    fma.rn.f32 p, p, f, %s;
    fma.rn.f32 p, p, f, %s;
    fma.rn.f32 p, p, f, %s;
    mov.b32 s, t;
    mov.b32 q, p;
    shl.b32 s, s, 23;
    add.s32 $3, q, s;
}""" % ("mov.f32 x, $7;" if bounded else "max.f32 x, $7, 0fC2FC0000;", *_CUBIC)  # noqa: UP031


_MIXED = {bounded: _mixed(bounded) for bounded in (True, False)}


def exponents(logits: jax.Array, largest: jax.Array, scale: float, dtype) -> jax.Array:
    """Returns `scale·(logits − largest)`, by one operation if results are rounded to 16 bits.

    That one rounds `scale·largest`, a factor that all weights of a row share, so that their norm
    cancels it. Where the product is not fused with the difference, it is rounded too: in float32
    that would show where logits are large.
    """
    if dtype == jnp.float32:
        return (logits - largest) * scale
    return logits * scale - largest * scale


def sees(
    row, column, row_segments, column_segments, r: int, c: int, *, transposed: bool = False
) -> jax.Array:
    """Returns which of R tokens from `row` on see which of C from `column` on: `[R,C]`.

    If `transposed`, which are seen by which.
    """
    i = jax.lax.broadcasted_iota(jnp.int32, (r, c), 0) + row
    j = jax.lax.broadcasted_iota(jnp.int32, (r, c), 1) + column
    causal = i <= j if transposed else i >= j
    if row_segments is None:
        return causal
    return causal & (row_segments[:, None] == column_segments[None, :])


def gram(rows, columns, row_segments, column_segments, shift: float, interpret: bool) -> jax.Array:
    """Returns `2^(k̃_i·k̃_j − shift) [R,C]` within segments, `2^(c − shift) A` off the diagonal."""
    return mask(entries(rows, columns, shift, interpret), row_segments, column_segments)


def entries(rows, columns, shift: float, interpret: bool) -> jax.Array:
    """Returns `2^(k̃_i·k̃_j − shift) [R,C]`, also between segments."""
    exponents = dot(rows, columns, transposed=True)
    return exp2(exponents - shift if shift else exponents, rows.dtype, interpret)


def mask(x: jax.Array, row_segments, column_segments, other: float = 0) -> jax.Array:
    """Returns `x [R,C]` with another value where the segments differ, if there are any."""
    if row_segments is None:
        return x
    return jnp.where(row_segments[:, None] == column_segments[None, :], x, other)
