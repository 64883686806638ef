"""What the kernels share: tiles in and out of memory, products, and the entries of `A`."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.bf16_split import bf16_split, dot_bf16_split
from pallas_kernels.scaling import largest_exponent


def width(d: int) -> int:
    """Columns of a tile for head width D: a power of two that the matrix units take."""
    return max(16, 1 << (d - 1).bit_length())


def exponent_shift(dtype: jax.typing.DTypeLike, d: int) -> float:
    """What is taken off the exponents of a tile of `A` that is summed.

    The rest of `c` is one factor after the sum. It costs an operation for each entry,
    so that nothing is best; float16 ends at 2¹⁶, hence at most 14 there, which also
    keeps small entries out of its subnormal numbers.
    """
    return max(0.0, largest_exponent(d) - 14) if dtype == jnp.float16 else 0.0


def rescale(k: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`u = k / max|k|` by rows, `max|k|` and `‖u‖²`, in float32: no square overflows or vanishes.

    A zero row stays zero, with 1 for `‖u‖²`.
    """
    k = k.astype(jnp.float32)
    largest = jnp.max(jnp.abs(k), 1, keepdims=True)
    u = k / jnp.where(largest == 0, 1, largest)
    return u, largest, jnp.where(largest == 0, 1, jnp.sum(u * u, 1, keepdims=True))


def load_rows(ref, b, start, size: int, h, w: int, s: int | None) -> jax.Array:
    """Rows `start` to `start + size` of head `h` of `[B,S,K,D]`, zero outside: `[size, W]`.

    Args:
      s: QueryPositions that exist, None where none of these is beyond.
    """
    return plgpu.load(
        ref.at[b, pl.ds(start, size), h, _lanes(ref, b, w)],
        **_masked(ref, start, size, w, s, other=0),
    )


def store_rows(ref, b, start, size: int, h, x: jax.Array, s: int | None) -> None:
    """The inverse of `load_rows`."""
    w = x.shape[1]
    plgpu.store(
        ref.at[b, pl.ds(start, size), h, _lanes(ref, b, w)],
        x.astype(ref.dtype),
        **_masked(ref, start, size, w, s),
    )


def _lanes(ref, b, w: int):
    # Those beyond D are masked; jax refuses them where it knows the start.
    return pl.ds(0 if ref.shape[-1] == w else b * 0, w)


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
    """`a b` or `a bᵀ`, accumulated in float32; float32 operands keep their 24 bits."""
    multiply = functools.partial(plgpu.dot, trans_b=transposed)
    # On matrix units that is faster than float32 on vector units, and its code is a
    # fraction as long.
    return dot_bf16_split(a, b, 3, multiply) if a.dtype == jnp.float32 else multiply(a, b)


def dot_split(a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`a b` of float32 operands: 16 of their bits where results are rounded to 16-bit `dtype`."""
    return dot_bf16_split(a, b, 3 if dtype == jnp.float32 else 2, plgpu.dot)


def dot_split_in_turn(load_a: Callable[[], jax.Array], b: jax.Array, interpret: bool) -> jax.Array:
    """`dot_split` for results of 16 bits, with one part of `a` in registers at a time.

    It is loaded for each. With both at once a program of 128 rows and 8 warps takes 138 registers
    a thread of an H100 (by `ptxas -v`), in turn 128, which two programs on a multiprocessor have.
    """
    b_high, b_low = bf16_split(b, 2)
    total = plgpu.dot(bf16_split(load_a(), 2)[1], b_high)
    if not interpret:
        plgpu.debug_barrier()  # Or one load would serve both.
    a_high = load_a().astype(jnp.bfloat16)
    return total + plgpu.dot(a_high, b_low) + plgpu.dot(a_high, b_high)


def exp2(x: jax.Array, dtype: jax.typing.DTypeLike, interpret: bool) -> jax.Array:
    """`2^x` of float32 `x`, as exact as the results need that are rounded to `dtype`.

    One instruction, which flushes subnormal numbers and errs by 2⁻²², where the library's
    function spends four on them. Its unit is the scarcest of the kernels (a tile of 64
    columns takes it as long as both products), so that for bfloat16 every fourth entry is
    a cubic on the multipliers instead, whose error of 2⁻¹³⋅⁷ is far below the rounding of
    2⁻⁹; that of float16 is 2⁻¹².
    """
    if interpret:
        return jnp.exp2(x)
    asm, pack = (_EXP2_MIXED, 4) if dtype == jnp.bfloat16 else (_EXP2, 1)
    [out] = plgpu.elementwise_inline_asm(
        asm,
        args=[x],
        constraints=",".join(["=r"] * pack + ["r"] * pack),
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return out


_EXP2 = "ex2.approx.ftz.f32 $0, $1;"
# Adding 1.5·2²³ leaves ⌊x⌉ in the low bits, which are shifted into the exponent of the
# cubic in x − ⌊x⌉, the best in relative error on [−½, ½].
_EXP2_MIXED = """{
    .reg .f32 t, f, p;
    .reg .b32 s, q;
    ex2.approx.ftz.f32 $0, $4;
    ex2.approx.ftz.f32 $1, $5;
    ex2.approx.ftz.f32 $2, $6;
    add.rn.f32 t, $7, 0f4B400000;
    sub.rn.f32 f, t, 0f4B400000;
    sub.rn.f32 f, $7, f;
    mov.f32 p, %s;
    fma.rn.f32 p, p, f, %s;
    fma.rn.f32 p, p, f, %s;
    fma.rn.f32 p, p, f, %s;
    mov.b32 s, t;
    mov.b32 q, p;
    shl.b32 s, s, 23;
    add.s32 $3, q, s;
}""" % tuple(  # noqa: UP031  (braces are PTX)
    f"0f{struct.unpack('<I', struct.pack('<f', c))[0]:08X}"
    for c in (0.05517167, 0.24261113, 0.69326099, 0.99992807)
)


def gram(rows, columns, row_segments, column_segments, shift: float, interpret: bool) -> jax.Array:
    """`2^(k̃_i·k̃_j − shift)` within segments `[R,C]`: `2^(c − shift)·A` off the diagonal."""
    exponents = dot(rows, columns, transposed=True)
    a = exp2(exponents - shift if shift else exponents, rows.dtype, interpret)
    if row_segments is None:
        return a
    return jnp.where(row_segments[:, None] == column_segments[None, :], a, 0)
