"""Helpers of the Triton kernels: loads and stores of tiles, products, and the entries of `A`."""

from __future__ import annotations

import functools
import itertools
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
from pallas_kernels.triton.parts import Tile, join, map_parts, parts_of, sum_parts, width, widths


def _lanes(d: int, zero) -> list:
    """Returns the columns of each part of a tile, as slices."""
    starts = itertools.accumulate((0, *widths(d)[:-1]))
    return [pl.ds(start + zero, w) for start, w in zip(starts, widths(d))]


def load_keys(ref, b, h, start, size: int) -> Tile:
    """Loads keys `[size,W]` of `[B,K,S',W]`."""
    return join([plgpu.load(x) for x in _keys_at(ref, b, h, start, size)])


def store_keys(ref, b, h, start, x: Tile) -> None:
    """Stores keys where `load_keys` loads them."""
    for at, part in zip(_keys_at(ref, b, h, start, parts_of(x)[0].shape[0]), parts_of(x)):
        plgpu.store(at, part.astype(ref.dtype))


def _keys_at(ref, b, h, start, size: int) -> list:
    # All indices have 32 bits: a constant would get 64 in the interpreter, where JAX's have them.
    lanes = _lanes(ref.shape[-1], np.int32(0))
    return [ref.at[b, h, pl.ds(start, size), columns] for columns in lanes]


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


def in_range(k: Tile) -> tuple[Tile, jax.Array, jax.Array]:
    """Returns `u = c k`, the factors `c` and `‖u‖²` of keys `[R,W]`, in float32.

    No square overflows or underflows. A zero key stays zero, with 1 for `‖u‖²`.
    """
    k = k.astype(jnp.float32)
    largest = largest_of_rows(k)
    scale = select_range(largest, jnp.ones_like(largest))
    u = k * scale
    square = sum_of_rows(u * u)
    return u, scale, jnp.where(square == 0, 1, square)


def sum_of_rows(x: Tile) -> jax.Array:
    """Returns the sum of each row `[R,1]`."""
    return sum_parts(lambda part: jnp.sum(part, 1, keepdims=True), x)


def largest_of_rows(x: Tile) -> jax.Array:
    """Returns the largest absolute value of each row `[R,1]`."""
    found = (jnp.max(jnp.abs(part), 1, keepdims=True) for part in parts_of(x))
    return functools.reduce(jnp.maximum, found)


def load_rows(
    ref, b, start, size: int, h, end: int | None, *, begin: jax.Array | None = None
) -> Tile:
    """Loads tokens `start` to `start + size` of head `h` of `[B,S,K,D]` as `[size,W]`.

    Tokens before `begin` and from `end` on, and elements outside the array, are zero. A limit is
    None where no token lies beyond it.
    """
    parts = _rows_at(ref, b, start, size, h, begin, end)
    return join(
        [plgpu.load(at, mask=mask, other=None if mask is None else 0) for at, mask in parts]
    )


def store_rows(
    ref, b, start, size: int, h, x: Tile, end: int | None, *, begin: jax.Array | None = None
) -> None:
    """Stores `x [size,W]` where `load_rows` loads it."""
    for (at, mask), part in zip(_rows_at(ref, b, start, size, h, begin, end), parts_of(x)):
        plgpu.store(at, part.astype(ref.dtype), mask=mask)


def _rows_at(ref, b, start, size: int, h, begin, end) -> list[tuple[Any, jax.Array | None]]:
    """Returns each part of `[size,W]` as a reference and its mask."""
    d = ref.shape[-1]
    row = start + jnp.arange(size)
    in_rows = [(row >= begin)[:, None]] if begin is not None else []
    if end is not None:
        in_rows.append((row < end)[:, None])
    found, first = [], 0
    # A traced start, because jax rejects a constant one with lanes beyond D, which are masked.
    for lanes in _lanes(d, np.int32(0) if d == width(d) else b * 0):
        masks = list(in_rows)
        if first + lanes.size > d:
            masks.append((first + jnp.arange(lanes.size) < d)[None, :])
        mask = functools.reduce(jnp.logical_and, masks) if masks else None
        if mask is not None:
            mask = jnp.broadcast_to(mask, (size, lanes.size))
        found.append((ref.at[b, pl.ds(start, size), h, lanes], mask))
        first += lanes.size
    return found


def keep_rows(x: Tile, start, begin, end) -> Tile:
    """Returns `x [size,W]`, rows from `start` on, with zeros for those outside of the limits."""

    def keep(part):
        row = start + jnp.arange(part.shape[0])
        return jnp.where(((row >= begin) & (row < end))[:, None], part, 0)

    return map_parts(keep, x)


def divide(n, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the quotient and the remainder of int32 `n ≥ 0`."""
    return jax.lax.div(n, np.int32(size)), jax.lax.rem(n, np.int32(size))


def load_segments(ref, b, start, size: int) -> jax.Array | None:
    """Loads segment ids `[size]` of `[B,S']`, or returns None where there are none."""
    return None if ref is None else plgpu.load(ref.at[b, pl.ds(start, size)])


def dot(a: jax.Array, b: Tile) -> Any:
    """Returns `a b` in float32; float32 operands keep their 24 bits."""
    return map_parts(functools.partial(_multiply, transposed=False), a, b)


def dot_rows(a: Tile, b: Tile) -> jax.Array:
    """Returns `a bᵀ` in float32, as `dot` does."""
    return sum_parts(functools.partial(_multiply, transposed=True), a, b)


def dot_rows_mirrored(a: Tile, b: Tile) -> jax.Array:
    """Returns the transpose of `dot_rows(b, a)` with the same rounding errors.

    The unit must be the same too: on Hopper tiles of 64 rows and more have one of their own.
    """

    def multiply(a, b):
        if a.dtype != jnp.float32:
            return plgpu.dot(a, b, trans_b=True)
        return dot_bf16_split(b, a, 3, lambda b, a: plgpu.dot(a, b, trans_b=True))

    return sum_parts(multiply, a, b)


def _multiply(a: jax.Array, b: jax.Array, *, transposed: bool) -> jax.Array:
    multiply = functools.partial(plgpu.dot, trans_b=transposed)
    # The split is faster on matrix units than float32 on vector units, and its code is much
    # shorter.
    return dot_bf16_split(a, b, 3, multiply) if a.dtype == jnp.float32 else multiply(a, b)


def dot_split(a: jax.Array, b: Tile, dtype: jax.typing.DTypeLike) -> Any:
    """Returns `a b` of float32 operands, to 16 of their bits if results are rounded to 16 bits."""
    return map_parts(lambda part: dot_bf16_split(a, part, _terms(dtype), plgpu.dot), b)


def dot_rows_split(a: Tile, b: Tile, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns `a bᵀ` as `dot_split` does."""
    multiply = functools.partial(plgpu.dot, trans_b=True)
    return sum_parts(lambda a, b: dot_bf16_split(a, b, _terms(dtype), multiply), a, b)


def _terms(dtype: jax.typing.DTypeLike) -> int:
    return 3 if dtype == jnp.float32 else 2


def dot_terms(load_a: Callable[[int], jax.Array], b: Tile) -> Any:
    """Returns `dot_split` for a 16-bit dtype, given a function that loads the two terms of `a`."""
    terms = [bf16_split(part, 2) for part in parts_of(b)]
    a_low = load_a(1)
    totals = [plgpu.dot(a_low, high) for high, _ in terms]
    a_high = load_a(0)
    return join(
        [
            total + plgpu.dot(a_high, low) + plgpu.dot(a_high, high)
            for total, (high, low) in zip(totals, terms)
        ]
    )


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
    asm, pack = (_EXP2, 1) if dtype == jnp.float32 else (MIXED_EXP2[bounded], 4)
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


MIXED_EXP2 = {bounded: _mixed(bounded) for bounded in (True, False)}


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
    exponents = dot_rows(rows, columns)
    return exp2(exponents - shift if shift else exponents, rows.dtype, interpret)


def mask(x: jax.Array, row_segments, column_segments, other: float = 0) -> jax.Array:
    """Returns `x [R,C]` with another value where the segments differ, if there are any."""
    if row_segments is None:
        return x
    return jnp.where(row_segments[:, None] == column_segments[None, :], x, other)
