"""What the kernels share: products, the entries of `A`, segments, and copies from HBM."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.bf16_split import dot_bf16_split

# What `pallas_call` takes: False, True, or the parameters of the TPU interpreter.
Interpret = Any
# Rows of a diagonal block: what the matrix unit of most chips takes at once.
BLOCK = 128


def width(d: int) -> int:
    """Lanes of a row of head width D: 64, or a multiple of 128."""
    return 64 if d <= 64 else -(-d // 128) * 128


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """The product over one axis of each, accumulated in float32; float32 operands keep 24 bits."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def dot_split(a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`a b` of float32 operands: 16 of their bits where results are rounded to 16-bit `dtype`."""
    return dot(a, b) if dtype == jnp.float32 else dot_bf16_split(a, b, 2, dot)


def powers(
    rows: jax.Array,
    columns: jax.Array,
    row_segments: jax.Array | None,
    column_segments: jax.Array | None,
) -> jax.Array:
    """`2^(k̃_i·k̃_j)` within segments `[R,C]` in float32: `2^c·A` off the diagonal.

    The factor is taken off the sums instead of every entry; at `D ≤ 256` it is at most 2²⁴.

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
    """Block `[size,w]` of `[M,S,w]` for a grid of (system, block), or counted from the end.

    Args:
      size: QueryPositions.
      w: Width.
      reverse: The number of blocks, to count from the end; 0 to count from the start.
    """
    return pl.BlockSpec((None, size, w), lambda m, i, *_: (m, _block(i, reverse), 0))


def segments_spec(size: int, heads: int, *, reverse: int = 0) -> pl.BlockSpec:
    """Likewise block `[1,size]` of segment ids `[B,S/size,1,size]`, B = M/heads."""
    return pl.BlockSpec(
        (None, None, 1, size), lambda m, i, *_: (m // heads, _block(i, reverse), 0, 0)
    )


def _block(i, reverse: int):
    return reverse - 1 - i if reverse else i


def copies(sources, slot, semaphores) -> list:
    """Copies of every (source, target) pair into a slot of the target.

    Args:
      sources: Pairs of a tile in HBM and its buffers `[slots, …]`.
      slot: Which buffer.
      semaphores: `[pairs, slots]`.
    """
    return [
        pltpu.make_async_copy(source, target.at[slot], semaphores.at[x, slot])
        for x, (source, target) in enumerate(sources)
    ]


class Segments:
    """The segment ids of a block of rows, along rows and along columns; None if there are none."""

    def __init__(self, ref):
        self.row = None if ref is None else ref[...]
        self.column = None
        if self.row is not None:
            # The transposition takes whole registers.
            self.column = jnp.broadcast_to(self.row, (8, self.row.shape[1])).T[:, :1]

    def pair(self, rows: slice, columns: slice) -> tuple[jax.Array | None, jax.Array | None]:
        """Ids of `rows` and `columns`, as `powers` takes them."""
        if self.row is None or self.column is None:
            return None, None
        return self.column[rows], self.row[:, columns]
