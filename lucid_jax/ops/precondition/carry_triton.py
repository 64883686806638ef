"""Vectors at every level, and inverses within blocks, for the Triton kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import pad_axis
from lucid_jax.ops.precondition import triton
from lucid_jax.ops.precondition.carry import at_levels, full_product, has_bit, num_levels
from pallas_kernels.triton.carry import carry_levels, carry_levels_gradient
from pallas_kernels.triton.inverse import inverses
from pallas_kernels.triton.parts import width

# Maps the cotangent of vectors at every level to those of rows, columns and tree.
PullBack = Callable[[jax.Array], tuple[Any, Any, list[jax.Array]]]
# Rows of the largest matrices that the kernel inverts, and the widest heads of the kernels that
# carry: wider tiles spill.
_ROWS, _WIDTH = 64, 128


def carry(
    rows: jax.Array | None,
    columns: jax.Array | None,
    tree: list[jax.Array],
    dtype: jax.typing.DTypeLike,
    scale: float = 1.0,
) -> tuple[jax.Array, PullBack]:
    """Carries the vectors of blocks to every level, as `carry.at_levels` does.

    Args:
      rows, columns, tree: As in `at_levels`, in float32.
      dtype: The dtype of the result.
      scale: Its factor.

    Returns:
      The vectors times the scale, `[L·B,H,S',W]`, and a function that takes the cotangent of the
      vectors before they were scaled, float32 `[L·B,H,S',W]`.
    """
    d = next(x.shape[-1] for x in (rows, columns) if x is not None)
    run = _carry_by_kernels if d <= _WIDTH else _carry_by_xla
    return run(rows, columns, tree, dtype, scale)


def _carry_by_xla(rows, columns, tree, dtype, scale):
    vectors, pull_back = jax.vjp(at_levels, rows, columns, tree)
    d = vectors.shape[-1]
    carried = (vectors * scale).astype(dtype).reshape(-1, *vectors.shape[2:])
    return pad_axis(carried, 3, width(d)), lambda bar: pull_back(
        bar[..., :d].reshape(vectors.shape)
    )


def _carry_by_kernels(rows, columns, tree, dtype, scale):
    kinds = rows is not None, columns is not None
    n, r, d = next(x.shape[2:] for x in (rows, columns) if x is not None)
    w, starts, matrices = width(d), _starts(n), None
    if tree:
        matrices = pad_axis(pad_axis(jnp.concatenate(tree, 2), 3, w), 4, w)
    options: dict[str, Any] = {
        "block": r, "starts": starts, "scale": scale, "interpret": triton.INTERPRET,
    }  # fmt: skip

    def sequence(x):
        return None if x is None else pad_axis(x.reshape(*x.shape[:2], n * r, d), 3, w)

    carried = carry_levels(sequence(rows), sequence(columns), matrices, dtype=dtype, **options)

    def pull_back(carried_bar):
        *vectors_bar, matrices_bar = carry_levels_gradient(
            carried, carried_bar, matrices, kinds=kinds, **options
        )

        def of_level(level: int, count: int) -> jax.Array:
            """Sums over the blocks that each matrix has multiplied, the other half of a pair."""
            bar = matrices_bar[level, ..., :d, :d]
            if not all(kinds):
                is_mine = has_bit(n, level) == kinds[0]
                bar = jnp.where(is_mine[:, None, None], bar, 0)
            bar = pad_axis(bar, 2, count << level)
            bar = bar.reshape(*bar.shape[:2], count // 2, 2, 1 << level, d, d).sum(4)
            return jnp.flip(bar, 3).reshape(*bar.shape[:2], count, d, d)

        counts = (end - start for start, end in itertools.pairwise(starts))
        tree_bar = [of_level(level, count) for level, count in enumerate(counts)]
        rows_bar, columns_bar = (
            None if x is None else x[..., :d].reshape(*x.shape[:2], n, r, d) for x in vectors_bar
        )
        return rows_bar, columns_bar, tree_bar

    return carried, pull_back


def _starts(n: int) -> tuple[int, ...]:
    """Returns where the levels of a tree of N blocks start, and the number of its matrices."""
    pairs = (((n - 1) >> (level + 1)) + 1 for level in range(num_levels(n) - 1))
    return tuple(itertools.accumulate((2 * x for x in pairs), initial=0))


def invert_unit_lower(a: jax.Array) -> jax.Array:
    """`gram.invert_unit_lower` of float32 matrices whose size is a power of two."""
    r = a.shape[-1]
    if r <= _ROWS:
        return inverses(a.reshape(-1, r, r), interpret=triton.INTERPRET).reshape(a.shape)
    half = r // 2
    p, q = (invert_unit_lower(a[..., x, x]) for x in (slice(half), slice(half, None)))
    corner = full_product("...ij,...jk->...ik", a[..., half:, :half], p)
    corner = -full_product("...ij,...jk->...ik", q, corner)
    return jnp.block([[p, jnp.zeros_like(p)], [corner, q]])
