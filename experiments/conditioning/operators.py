"""Products with `A` and its inverse in blocks, and their norms by block Lanczos.

A product costs the same for one vector as for D, because the tiles of `A` cost most. So every
product here takes `[1,S,K,D]`, and the Krylov space grows by D vectors a step.

    S  length    K  heads, independent of each other    D  head dimension    R  rows of a block
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax import precondition
from lucid_jax.ops.blocks import heads_first, panel_width, put, rows_first, take
from lucid_jax.ops.numerics import round_up
from lucid_jax.ops.precondition.gram import Keys, gram_tile

_HIGHEST = jax.lax.Precision.HIGHEST
# Steps of the Krylov space that the rows must have room for.
_FEWEST = 4


@functools.partial(jax.jit, static_argnames="transpose")
def multiply(k: jax.Array, x: jax.Array, transpose: bool = False) -> jax.Array:
    """Returns `A x`, or `Aᵀ x` if `transpose`, one tile of `A` per head at a time.

    Args:
      k: Keys `[B,S,K,D]`.
      x: `[B,S,K,D]` of the same dtype.
      transpose: Whether to multiply by `Aᵀ`.
    """
    r = min(panel_width(), round_up(k.shape[1], 16))
    keys, columns = Keys.normalize(k, None, r), heads_first(x, r)
    blocks = keys.length // r
    row = jnp.arange(r)[:, None]

    def multiply_rows(i, y):
        block = keys.take(i * r, r)

        def add(j, total):
            tile = gram_tile(block, keys.take(j * r, r), _HIGHEST)
            # The kernel is symmetric: the transpose reads the same tiles right of the diagonal.
            strict = row < row.T if transpose else row > row.T
            tile = jnp.where((i != j) | strict, tile, 0)
            return total + jnp.matmul(tile, take(columns, j * r, r), precision=_HIGHEST)

        first, end = (i, blocks) if transpose else (0, i + 1)
        return put(y, jax.lax.fori_loop(first, end, add, take(columns, i * r, r)), i * r)

    y = jax.lax.fori_loop(0, blocks, multiply_rows, columns)
    return rows_first(y, k.shape[1])


@functools.partial(jax.jit, static_argnames="transpose")
def solve(k: jax.Array, x: jax.Array, transpose: bool = False) -> jax.Array:
    """Returns `A⁻¹ x`, or `A⁻ᵀ x` if `transpose`: the same solve of the reversed sequence."""
    if transpose:
        return solve(k[:, ::-1], x[:, ::-1])[:, ::-1]
    return precondition(k, x, precision="highest")


class Norm(NamedTuple):
    """A norm of each head `[K]`, which is too large by no more than rounding.

    Attributes:
      value: The largest singular value of the Krylov space.
      growth: How much the last step added, relatively.
    """

    value: jax.Array
    growth: jax.Array


def norm(op: Callable[..., jax.Array], k: jax.Array, start: jax.Array, steps: int) -> Norm:
    """Returns the 2-norm of an operator, for every head.

    Block Lanczos on the operator's square, with the whole basis orthogonalised twice.

    Args:
      op: `multiply` or `solve`.
      k: Keys `[1,S,K,D]`.
      start: Random `[1,S,K,D]`.
      steps: At least 2; the Krylov space has `steps·D` vectors.

    Raises:
      ValueError: there are too few rows for a Krylov space of a few steps.
    """
    _, length, _, d = start.shape
    if length < _FEWEST * d:
        raise ValueError(f"keys of dimension {d} need {_FEWEST * d} rows; got {length}")
    # The space has no more than S vectors.
    steps = min(steps, length // d)
    basis = jnp.zeros((*start.shape[:3], steps * d), start.dtype)
    images = basis
    block, squares = _orthonormal(start), []
    for n in range(steps):
        basis = put(basis, block, n * d, -1)
        image = op(k, op(k, block), transpose=True)
        images = put(images, image, n * d, -1)
        if n < steps - 1:
            block = _orthonormal(_outside(basis, image))
        if n >= steps - 2:
            squares.append(_largest_ritz_value(basis, images))
    before, value = map(jnp.sqrt, squares)
    return Norm(value, 1 - before / value)


@jax.jit
def _orthonormal(x: jax.Array) -> jax.Array:
    """Returns an orthonormal basis of the same space, for each head."""
    return jnp.linalg.qr(x.swapaxes(1, 2))[0].swapaxes(1, 2)


@jax.jit
def _outside(basis: jax.Array, x: jax.Array) -> jax.Array:
    """Removes from `x` its part in the space of the basis; twice, because once leaves rounding."""
    for _ in range(2):
        inside = jnp.einsum("bskm,bskd->bkmd", basis, x, precision=_HIGHEST)
        x = x - jnp.einsum("bskm,bkmd->bskd", basis, inside, precision=_HIGHEST)
    return x


@jax.jit
def _largest_ritz_value(basis: jax.Array, images: jax.Array) -> jax.Array:
    """Returns the largest Ritz value of a positive operator `[K]`.

    Columns that are still zero add Ritz values of zero.
    """
    projected = jnp.einsum("bskm,bskn->bkmn", basis, images, precision=_HIGHEST)
    return jnp.linalg.eigvalsh((projected + projected.swapaxes(-1, -2)) / 2)[0, :, -1]


def most_possible(length: int) -> float:
    """Returns the largest `‖A‖₂` of any keys, which identical keys have.

    Their `A` is all ones on and below the diagonal. Entries are between 0 and 1, and the norm of
    a matrix without negative entries grows with each of them.
    """
    return 1 / (2 * math.sin(math.pi / (4 * length + 2)))
