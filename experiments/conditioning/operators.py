"""Products with `A` and its inverse in blocks, and their norms by block Lanczos.

A product costs the same for one vector as for D, because the tiles of `A` cost most. So every
product here takes `[1,S,K,D]`, and the Krylov space grows by D vectors a step.

    S  length    K  heads, independent of each other    D  head dimension    R  rows of a block
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax import precondition
from lucid_jax.ops.blocks import heads_first, put, rows_first
from lucid_jax.ops.precondition.gram import Keys, gram_tile

_HIGHEST = jax.lax.Precision.HIGHEST
_ROWS = 128  # Rows of `A` in memory at once.
# Steps of the Krylov space that the rows must have room for.
_FEWEST = 4


@functools.partial(jax.jit, static_argnames="transpose")
def multiply(k: jax.Array, x: jax.Array, transpose: bool = False) -> jax.Array:
    """Returns `A x`, or `Aᵀ x` if `transpose`, from keys and `x [B,S,K,D]` of the same dtype."""
    keys, columns = Keys.normalize(k, None, _ROWS), heads_first(x, _ROWS)
    column = jnp.arange(keys.length)

    def rows(start):
        row = start + jnp.arange(_ROWS)[:, None]
        # The kernel is symmetric: the transpose reads the same tiles right of the diagonal.
        strict = row < column if transpose else row > column
        a = jnp.where(strict, gram_tile(keys.take(start, _ROWS), keys, _HIGHEST), 0)
        return jnp.matmul(a, columns, precision=_HIGHEST)

    below = jax.lax.map(rows, jnp.arange(0, keys.length, _ROWS))
    return x + rows_first(jnp.concatenate(below, 2), k.shape[1])


@functools.partial(jax.jit, static_argnames="transpose")
def solve(k: jax.Array, x: jax.Array, transpose: bool = False) -> jax.Array:
    """Returns `A⁻¹ x`, or `A⁻ᵀ x` if `transpose`: the same solve of the reversed sequence."""
    if transpose:
        return solve(k[:, ::-1], x[:, ::-1])[:, ::-1]
    return precondition(k, x, precision="highest")


class Norm(NamedTuple):
    """A norm of each head `[K]`, which is too large by no more than rounding."""

    value: jax.Array  # The largest singular value of the Krylov space.
    growth: jax.Array  # How much the last step added, relatively.


def norm(op: Callable[..., jax.Array], k: jax.Array, start: jax.Array, steps: int) -> Norm:
    """Returns the 2-norm of `multiply` or `solve` by keys `[1,S,K,D]`, for every head.

    Block Lanczos on the operator's square from a random start `[1,S,K,D]`, with the whole basis
    orthogonalised twice. The Krylov space has `steps·D` vectors, of at least 2 steps. Raises
    ValueError if there are too few rows for that.
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
