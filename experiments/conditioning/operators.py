"""Products with `A` and its inverse in blocks, and their norms by block Lanczos.

    B  batch, 1    S  length    K  heads, which share nothing    D  width    R  rows of a block

A vector costs as much as D of them, since what costs is the tile of `A`; so every product here
takes `[B,S,K,D]`, and the Krylov space grows by D vectors a step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax import precondition
from lucid_jax.ops.blocks import heads_first, panel_width, put, round_up, rows_first, take
from lucid_jax.ops.precondition.gram import Keys, gram_tile

_HIGHEST = jax.lax.Precision.HIGHEST
# Blocks of a Krylov space that the rows must have room for.
_FEWEST = 4


@functools.partial(jax.jit, static_argnames="transpose")
def multiply(k: jax.Array, x: jax.Array, transpose: bool = False) -> jax.Array:
    """`A x`, or `Aᵀ x`, with no more of `A` at a time than a tile a head.

    Args:
      k: Keys `[B,S,K,D]`.
      x: `[B,S,K,D]` of the same dtype.
      transpose: Whether by `Aᵀ`.
    """
    r = min(panel_width(), round_up(k.shape[1], 16))
    keys, columns = Keys.of(k, None, r), heads_first(x, r)
    blocks = keys.length // r
    row = jnp.arange(r)[:, None]

    def of_rows(i, y):
        block = keys.take(i * r, r)

        def add(j, total):
            tile = gram_tile(block, keys.take(j * r, r), _HIGHEST)
            # The kernel is symmetric: the transpose reads the same tiles right of the diagonal.
            strict = row < row.T if transpose else row > row.T
            tile = jnp.where((i != j) | strict, tile, 0)
            return total + jnp.matmul(tile, take(columns, j * r, r), precision=_HIGHEST)

        first, end = (i, blocks) if transpose else (0, i + 1)
        return put(y, jax.lax.fori_loop(first, end, add, take(columns, i * r, r)), i * r)

    y = jax.lax.fori_loop(0, blocks, of_rows, columns)
    return rows_first(y, k.shape[1])


@functools.partial(jax.jit, static_argnames="transpose")
def solve(k: jax.Array, x: jax.Array, transpose: bool = False) -> jax.Array:
    """`A⁻¹ x`, or `A⁻ᵀ x`: the same solve of the sequence read backwards. Shapes as above."""
    if transpose:
        return solve(k[:, ::-1], x[:, ::-1])[:, ::-1]
    return precondition(k, x, precision="highest")


class Norm(NamedTuple):
    """Of each head, `[K]`: never too large but for rounding, and how far it may be off.

    Attributes:
      value: The largest singular value of the Krylov space.
      residual: A singular value lies within this of it, relatively; where singular values
        crowd, as at the low end of `A`, that says little, and `growth` more.
      growth: What the last step added, relatively.
    """

    value: jax.Array
    residual: jax.Array
    growth: jax.Array


def norm(
    apply: Callable[[jax.Array], jax.Array],
    apply_transposed: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    steps: int,
) -> Norm:
    """The largest singular value of a linear operator on `[S]`, for every head.

    Block Lanczos on the operator's square, with the whole basis orthogonalised twice.

    Args:
      apply: The operator, `[1,S,K,D]` to the same, for each of the D vectors.
      apply_transposed: Its transpose.
      start: Random `[1,S,K,D]`.
      steps: At least 2; the Krylov space has `steps·D` vectors.

    Raises:
      ValueError: so few rows that a Krylov space of few blocks is all.
    """
    _, length, _, width = start.shape
    if length < _FEWEST * width:
        raise ValueError(f"keys of width {width} need {_FEWEST * width} rows; got {length}")
    # No more vectors than the space holds.
    steps = min(steps, length // width)
    basis = jnp.zeros((*start.shape[:3], steps * width), start.dtype)
    images = basis
    block, ritz = _orthonormal(start), []
    for n in range(steps):
        basis = put(basis, block, n * width, -1)
        image = apply_transposed(apply(block))
        images = put(images, image, n * width, -1)
        if n < steps - 1:
            block = _orthonormal(_outside(basis, image))
        if n >= steps - 2:
            ritz.append(_ritz(basis, images))
    square, residual = ritz[-1]
    value = jnp.sqrt(square)
    return Norm(value, residual / (2 * square), 1 - jnp.sqrt(ritz[0][0]) / value)


@jax.jit
def _orthonormal(x: jax.Array) -> jax.Array:
    """An orthonormal basis of the same space, of each head."""
    return jnp.linalg.qr(x.swapaxes(1, 2))[0].swapaxes(1, 2)


@jax.jit
def _outside(basis: jax.Array, x: jax.Array) -> jax.Array:
    """`x` without its part in the space of the basis; twice, since once leaves rounding."""
    for _ in range(2):
        inside = jnp.einsum("bskm,bskd->bkmd", basis, x, precision=_HIGHEST)
        x = x - jnp.einsum("bskm,bkmd->bskd", basis, inside, precision=_HIGHEST)
    return x


@jax.jit
def _ritz(basis: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest Ritz value of a positive operator and its residual, `[K]` each.

    Columns of zeros, which the basis has where it is still to grow, add Ritz values of zero.
    """
    projected = jnp.einsum("bskm,bskn->bkmn", basis, images, precision=_HIGHEST)
    values, vectors = jnp.linalg.eigh((projected + projected.swapaxes(-1, -2)) / 2)
    value, vector = values[0, :, -1], vectors[0, :, :, -1]
    off = jnp.einsum("bskm,km->bsk", images, vector, precision=_HIGHEST)
    off = off - value * jnp.einsum("bskm,km->bsk", basis, vector, precision=_HIGHEST)
    return value, jnp.linalg.norm(off[0], axis=0)


def most_possible(length: int) -> float:
    """The largest `‖A‖₂` of any keys: of identical ones, whose `A` is all ones below.

    Entries are between 0 and 1, and the norm of a matrix without negative entries grows with
    each of them.
    """
    return 1 / (2 * math.sin(math.pi / (4 * length + 2)))
