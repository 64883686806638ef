"""Rows and columns carried through the transitions between blocks, for every level of PaTH.

A block has rows at a level where that bit of its number is set, and columns where it is not
(`lucid_jax/ops/precondition/carry.py`). One program takes a block through all levels: it stores the
vectors of a level, then carries them across the other half of a pair of `2^l` blocks, by a product
with the matrix of that half, which is a node of a binary tree.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.call import pallas_call
from pallas_kernels.triton import tile
from pallas_kernels.triton.parts import Tile, join, map_parts, parts_of, widths


@functools.partial(jax.jit, static_argnames=("block", "starts", "scale", "dtype", "interpret"))
def carry_levels(
    rows: jax.Array | None,
    columns: jax.Array | None,
    tree: jax.Array | None,
    *,
    block: int,
    starts: tuple[int, ...],
    scale: float,
    dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> jax.Array:
    """Returns the vectors of every level times a scale, `[L·B,H,S',W]`.

    Args:
      rows: float32 `[B,H,S',W]`, at the starts of their blocks. None: zeros at the levels where a
        block has rows.
      columns: float32 `[B,H,S',W]`, at the ends of their blocks. None: zeros likewise.
      tree: The matrices of `Blocks.tree`, all levels one after the other, float32 `[B,K,M,W,W]`; K
        divides H. None for one level.
      block: Rows of a block, R.
      starts: Where each level starts in the tree, and last the number of its matrices; L numbers.
      scale: The factor.
      dtype: The dtype of the result.
      interpret: Whether to run in Pallas' interpreter.
    """
    b, heads, length, w = next(x.shape for x in (rows, columns) if x is not None)
    levels = len(starts)
    return pallas_call(
        functools.partial(_carry, block=block, levels=levels, scale=scale),
        grid=(length // block, b, heads),
        out_shape=jax.ShapeDtypeStruct((levels * b, heads, length, w), dtype),
        compiler_params=_parameters(block, w),
        interpret=interpret,
        name="lucid_carry_levels",
    )(rows, columns, tree, jnp.array(starts, jnp.int32))


@functools.partial(jax.jit, static_argnames=("kinds", "block", "starts", "scale", "interpret"))
def carry_levels_gradient(
    carried: jax.Array,
    carried_bar: jax.Array,
    tree: jax.Array | None,
    *,
    kinds: tuple[bool, bool],
    block: int,
    starts: tuple[int, ...],
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array | None, ...]:
    """Returns the cotangents of the arguments of `carry_levels`, in float32.

    Those of the matrices are of vectors in the dtype of `carried`.

    Args:
      carried: The result of `carry_levels`.
      carried_bar: The cotangent of the vectors before they were scaled, float32 `[L·B,H,S',W]`.
      tree, block, starts, scale, interpret: As in `carry_levels`.
      kinds: Whether there were rows, and columns.

    Returns:
      Those of the rows and columns `[B,H,S',W]`, or None, and `[L−1,B,K,N,W,W]` or None: what each
      block adds at each level to the cotangent of the matrix of the other half. That of a block
      whose vectors at the level are None is undefined.
    """
    (planes, heads, length, w), levels, n = carried.shape, len(starts), carried.shape[2] // block
    b, kv_heads = planes // levels, heads if tree is None else tree.shape[1]
    vectors = jax.ShapeDtypeStruct((b, heads, length, w), jnp.float32)
    matrices = jax.ShapeDtypeStruct((levels - 1, b, kv_heads, n, w, w), jnp.float32)
    group = heads // kv_heads
    return pallas_call(
        functools.partial(
            _gradient, group=group, block=block, levels=levels, scale=scale, interpret=interpret
        ),
        grid=(n, b, kv_heads),
        out_shape=(*(vectors if x else None for x in kinds), None if tree is None else matrices),
        compiler_params=_parameters(block, w),
        interpret=interpret,
        name="lucid_carry_levels_gradient",
    )(carried, carried_bar, tree, jnp.array(starts, jnp.int32))


def _parameters(block: int, w: int) -> plgpu.CompilerParams:
    warps = min(16, max(4, block * w // 1024))
    return plgpu.CompilerParams(num_warps=1 << (warps.bit_length() - 1), num_stages=1)


def _carry(
    # Inputs.
    rows_ref,  # [B,H,S',W] or None
    columns_ref,  # [B,H,S',W] or None
    tree_ref,  # [B,K,M,W,W] or None
    starts_ref,  # [L]
    # Output.
    out_ref,  # [L·B,H,S',W]
    # Static.
    *,
    block: int,
    levels: int,
    scale: float,
):
    i, b, h = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    batch, own = out_ref.shape[0] // levels, pl.ds(i * block, block)
    vectors = [None if ref is None else _load(ref, b, h, own) for ref in (rows_ref, columns_ref)]

    def store(level, rows, columns):
        x = _select(_is_row(i, level), rows, columns)
        _store(out_ref, x * scale, level * batch + b, h, own)

    def visit(level, vectors):
        store(level, *vectors)
        kv = h // (out_ref.shape[1] // tree_ref.shape[1])

        def carry(x):
            matrix = _load_other(tree_ref, starts_ref, b, kv, i, level)
            return _times(x, matrix, out_ref.dtype)

        return _at_level(_is_row(i, level), carry, *vectors)

    if tree_ref is not None:
        vectors = jax.lax.fori_loop(0, levels - 1, visit, vectors)
    store(levels - 1, *vectors)


def _gradient(
    # Inputs.
    carried_ref,  # [L·B,H,S',W]
    carried_bar_ref,  # [L·B,H,S',W]
    tree_ref,  # [B,K,M,W,W] or None
    starts_ref,  # [L]
    # Outputs.
    rows_bar_ref,  # [B,H,S',W] or None
    columns_bar_ref,  # [B,H,S',W] or None
    matrices_bar_ref,  # [L−1,B,K,N,W,W] or None
    # Static.
    *,
    group: int,
    block: int,
    levels: int,
    scale: float,
    interpret: bool,
):
    i, b, kv = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    batch, own = carried_ref.shape[0] // levels, pl.ds(i * block, block)
    dtype = carried_ref.dtype

    def visit_head(g, _):
        h = kv * group + g

        def visit(t, bars):
            """Visits a level, from the last but one down."""
            level = levels - 2 - t
            plane = level * batch + b

            def pull_back(later_bar):
                x = _load(carried_ref, plane, h, own) * (1 / scale)
                for rows, part in zip(_lanes(tree_ref.shape[-1]), parts_of(x)):
                    at = level, b, kv, i, rows
                    matrix_bar = tile.dot_split(part.T, later_bar, dtype)
                    if group > 1:
                        matrix_bar += _load(matrices_bar_ref, *at, where=g > 0)
                    _store(matrices_bar_ref, matrix_bar, *at)
                bar = _load(carried_bar_ref, plane, h, own)
                matrix = _load_other(tree_ref, starts_ref, b, kv, i, level)
                return bar + _times_transposed(later_bar, matrix, dtype)

            return _at_level(_is_row(i, level), pull_back, *bars)

        last = _load(carried_bar_ref, (levels - 1) * batch + b, h, own)
        is_row = _is_row(i, levels - 1)
        bars = [
            None if rows_bar_ref is None else _select(is_row, last, None),
            None if columns_bar_ref is None else _select(is_row, None, last),
        ]
        if tree_ref is not None:
            bars = jax.lax.fori_loop(0, levels - 1, visit, bars)
        for ref, bar in zip((rows_bar_ref, columns_bar_ref), bars):
            if bar is not None:
                _store(ref, bar, b, h, own)
        if group > 1 and not interpret:
            # The next head adds to what this one has stored.
            plgpu.debug_barrier()

    jax.lax.fori_loop(0, group, visit_head, None)


def _is_row(i, level) -> jax.Array:
    return (i >> level) & 1 == 1


def _lanes(w: int) -> list:
    """Returns the columns of each piece of a vector, at most 64, as slices."""
    pieces = [min(part, 64) for part in widths(w) for _ in range(max(1, part // 64))]
    starts = np.cumsum([0, *pieces[:-1]], dtype=np.int32)
    return [pl.ds(start, size) for start, size in zip(starts, pieces)]


def _load(ref, *rows, where: jax.Array | None = None) -> Any:
    """Loads rows `[…,W]` in float32, a `Tile`; zeros unless the condition holds."""

    def load(lanes):
        at = ref.at[(*rows, lanes)]
        if where is None:
            return plgpu.load(at)
        mask = jnp.broadcast_to(where, (rows[-1].size, lanes.size))
        return plgpu.load(at, mask=mask, other=0)

    return join([load(lanes).astype(jnp.float32) for lanes in _lanes(ref.shape[-1])])


def _store(ref, x: Tile, *rows) -> None:
    for lanes, part in zip(_lanes(ref.shape[-1]), parts_of(x)):
        plgpu.store(ref.at[(*rows, lanes)], part.astype(ref.dtype))


def _load_other(tree_ref, starts_ref, b, kv, i, level) -> Iterator[Tile]:
    """Loads the matrix of the half of a pair that block `i` is not in, in pieces of rows."""
    node = plgpu.load(starts_ref.at[level]) + ((i >> level) ^ 1)
    return (_load(tree_ref, b, kv, node, rows) for rows in _lanes(tree_ref.shape[-1]))


def _times(x: Tile, matrix: Iterable[Tile], dtype: jax.typing.DTypeLike) -> Tile:
    """Returns `x M`, exact enough for results that are rounded to `dtype`."""
    products = (tile.dot_split(part, rows, dtype) for part, rows in zip(parts_of(x), matrix))
    return functools.reduce(operator.add, products)


def _times_transposed(x: Tile, matrix: Iterable[Tile], dtype: jax.typing.DTypeLike) -> Tile:
    """Returns `x Mᵀ`, likewise."""
    return join([tile.dot_rows_split(x, rows, dtype) for rows in matrix])


def _at_level(
    is_row: jax.Array, f: Callable[[Tile], Tile], rows: Tile | None, columns: Tile | None
) -> list[Tile | None]:
    """Applies `f` to those vectors that the block has at a level, unless they are None."""
    if rows is not None and columns is not None:
        x = f(_select(is_row, rows, columns))
        return [_select(is_row, x, rows), _select(is_row, columns, x)]
    if rows is None:
        return [None, jax.lax.cond(is_row, lambda x: x, f, columns)]
    return [jax.lax.cond(is_row, f, lambda x: x, rows), None]


def _select(condition, x: Tile | None, y: Tile | None) -> Tile:
    """Returns `x` where the condition holds, else `y`; None is zero."""
    if x is None or y is None:
        zero = map_parts(jnp.zeros_like, y if x is None else x)
        x, y = (zero, y) if x is None else (x, zero)
    return map_parts(lambda x, y: jnp.where(condition, x, y), x, y)
