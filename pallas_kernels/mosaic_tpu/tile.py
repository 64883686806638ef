"""Helpers of the Mosaic kernels: products, the entries of `A`, segments, and copies from HBM."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.bf16_split import dot_bf16_split

# As in `pallas_call`: False, True, or the parameters of the TPU interpreter.
Interpret = Any
# Rows of a diagonal block, the size of the matrix unit of most chips.
BLOCK = 128


def width(d: int) -> int:
    """Returns W, the lanes that hold D columns: 64, or a multiple of 128."""
    return 64 if d <= 64 else -(-d // 128) * 128


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """Contracts one axis of each operand into float32; float32 operands keep their 24 bits."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def dot_split(a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns `a b` of float32 operands, to 16 of their bits if results are rounded to 16 bits."""
    return dot(a, b) if dtype == jnp.float32 else dot_bf16_split(a, b, 2, dot)


def powers(
    rows: jax.Array,
    columns: jax.Array,
    row_segments: jax.Array | None,
    column_segments: jax.Array | None,
) -> jax.Array:
    """Returns `2^(k̃_i·k̃_j) [R,C]` within segments in float32, `2^c A` off the diagonal.

    The factor `2^c` is taken off the sums, not off every entry; at `D ≤ 256` it is at most 2²⁴.

    Args:
      rows: `k̃ [R,W]`.
      columns: `k̃ [C,W]`.
      row_segments: int32 `[R,1]`, or None.
      column_segments: int32 `[1,C]`, or None.
    """
    a = jnp.exp2(dot(rows, columns, (1, 1)))
    if row_segments is None:
        return a
    return jnp.where(row_segments == column_segments, a, 0)


def rows_spec(size: int, w: int, *, reverse: int = 0) -> pl.BlockSpec:
    """Returns the spec of block `[size,w]` of `[M,S,w]` for a grid of (system, block).

    Args:
      size: Rows of a block.
      w: Columns.
      reverse: The number of blocks, to count blocks from the end; 0 to count from the start.
    """
    return pl.BlockSpec((None, size, w), lambda m, i, *_: (m, _block(i, reverse), 0))


def segments_spec(size: int, heads: int, *, reverse: int = 0) -> pl.BlockSpec:
    """`rows_spec` for block `[1,size]` of segment ids `[B,S/size,1,size]`, B = M/heads."""
    return pl.BlockSpec(
        (None, None, 1, size), lambda m, i, *_: (m // heads, _block(i, reverse), 0, 0)
    )


def _block(i, reverse: int):
    return reverse - 1 - i if reverse else i


def copies(sources, slot, semaphores) -> list:
    """Returns the copy of every source into a slot of its buffers.

    Args:
      sources: Pairs of a tile in HBM and its buffers `[slots, …]`.
      slot: The index of the buffer.
      semaphores: `[pairs, slots]`.
    """
    return [
        pltpu.make_async_copy(source, target.at[slot], semaphores.at[x, slot])
        for x, (source, target) in enumerate(sources)
    ]


class Segments:
    """Segment ids of R tokens as `row [1,R]` and `column [R,1]`, both None without segments."""

    def __init__(self, ref):
        self.row = None if ref is None else ref[...]
        self.column = None
        if self.row is not None:
            # The transposition needs whole registers of 8 sublanes.
            self.column = jnp.broadcast_to(self.row, (8, self.row.shape[1])).T[:, :1]

    def pair(self, rows: slice, columns: slice) -> tuple[jax.Array | None, jax.Array | None]:
        """Returns the ids of `rows` and of `columns` as `powers` takes them."""
        if self.row is None or self.column is None:
            return None, None
        return self.column[rows], self.row[:, columns]
