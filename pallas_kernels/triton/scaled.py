"""Float16 values with a power of two for each block of rows: the operand `y` of the solve.

Float16 has three bits more than bfloat16, and a range that ends at 2¹⁶. The solve therefore keeps a
copy of `y` for its products: float16 values of at most T, times `2^e_i` for the block of rows i.
The exponent `e_i` is large enough for all rows of the document up to the end of the block.
Exponents therefore never fall along a document, and depend on nothing after the block. Rows that
are not finite do not count; they are NaN or infinite in float16 too.

A sum over columns is kept in units of `2^e_j`, and multiplied by a power of two between blocks of
different exponents. So that there are few, exponents are multiples of 4 away from each other and
leave room for rows of twice the size.

Float16 holds multiples of 2⁻²⁴. An entry of `y` is therefore rounded by at most 2⁻¹⁷ times the
largest one so far in the document, or 2⁻¹² times itself. The former is far below the rounding
errors of the largest. It can be seen only where a sequence of several segments counts as one
document (`lucid_jax.ops.documents`): there the error of a segment 2¹² times smaller than an earlier
one is as small as any, but that of one 2¹⁷ times smaller is some percent.

The largest value T leaves room for the key gradient, whose weights are products of two rows of D
such values and an entry of `A`, of at most 2¹²: `D T² 2¹² ≤ 2¹⁵`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.triton.parts import Tile, parts_of

# Exponents of powers of two that are normal numbers with a normal inverse.
_SMALLEST_POWER, _LARGEST_POWER = -126, 126


class Scaled(NamedTuple):
    """Values of `[B,S,K,D]` for the products of 16-bit inputs.

    Attributes:
      values: float16 `[B,S,K,D]`.
      exponents: int32 `[B,K,N]`, by block of rows. They hold for the document that leaves the
        block in the order of the solve; values of other documents of the block have no meaning.
    """

    values: jax.Array
    exponents: jax.Array


def exponent(x: jax.Array) -> jax.Array:
    """Returns the least e with `x < 2^e` for normal `x`, float32 and not negative; −126 for 0."""
    return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) - 126


def power(e: jax.Array) -> jax.Array:
    """Returns `2^e` in float32, for exponents from −126 to 126; others are taken as these."""
    e = jnp.clip(e, _SMALLEST_POWER, _LARGEST_POWER)
    return jax.lax.bitcast_convert_type((e + 127) << 23, jnp.float32)


def block_exponent(x: Tile, d: int) -> jax.Array:
    """Returns the exponent of a block of rows by itself: of `x [R,W]`, float32."""

    def largest(part):
        size = jnp.abs(part)
        return jnp.max(jnp.where(size < jnp.inf, size, 0))

    e = exponent(functools.reduce(jnp.maximum, map(largest, parts_of(x)))) + 1
    log_limit = -math.ceil((math.log2(d) - 3) / 2)
    return jnp.clip(((e + 3) >> 2 << 2) - log_limit, _SMALLEST_POWER, _LARGEST_POWER)


def scale_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns each row of `x [R,C]`, float32, times a power of two, in float16 below 1.

    Returns:
      `2^−e x` in float16 and `e [R,1]`.
    """
    e = exponent(jnp.max(jnp.abs(x), 1, keepdims=True))
    return (x * power(-e)).astype(jnp.float16), e


def find_run(
    exponent_of: Callable[[jax.Array], jax.Array],
    first: jax.Array,
    end: jax.Array,
    newest: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns one past the last of some blocks that have the exponent of the first, and this.

    Args:
      exponent_of: Maps a block to its exponent, which never falls from block to block.
      first: The first block.
      end: One past the last block, above `first`.
      newest: The exponent of the last block, or of a later one.
    """
    e = exponent_of(first)

    def halve(carry):
        end = (first + carry[0] + 1) // 2
        return end, exponent_of(end - 1)

    return jax.lax.while_loop(lambda carry: carry[1] != e, halve, (end, newest))


def load_exponent(ref, b, h, block) -> jax.Array:
    """Loads the exponent of a block from `[B,K,N]`."""
    return plgpu.load(ref.at[b, h, block])
