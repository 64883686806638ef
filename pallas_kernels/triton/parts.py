"""Tiles whose width is no power of two, as Triton needs it: parts side by side."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_pytree_node_class
class Parts:
    """A tile `[R,W]` as tiles side by side, because the width of a tile is a power of two.

    Operations on its elements take numbers and columns `[R,1]` too.
    """

    def __init__(self, parts: Sequence[jax.Array]):
        self.parts = tuple(parts)

    def tree_flatten(self):
        """See `jax.tree_util`."""
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, _, parts):
        """See `jax.tree_util`."""
        return cls(parts)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of all elements."""
        return self.parts[0].dtype

    def __add__(self, other):
        return map_parts(operator.add, self, other)

    def __sub__(self, other):
        return map_parts(operator.sub, self, other)

    def __mul__(self, other):
        return map_parts(operator.mul, self, other)

    __rmul__ = __mul__

    def __neg__(self):
        return map_parts(operator.neg, self)

    def astype(self, dtype: jax.typing.DTypeLike) -> Parts:
        """Returns the tile in another dtype."""
        return map_parts(lambda x: x.astype(dtype), self)


# A tile of one part is an array.
Tile = jax.Array | Parts


def map_parts(f: Callable[..., jax.Array], *tiles) -> Any:
    """Applies a function to each part of tiles; other arguments go to every part."""
    count = max(len(x.parts) if isinstance(x, Parts) else 1 for x in tiles)
    found = [f(*(x.parts[i] if isinstance(x, Parts) else x for x in tiles)) for i in range(count)]
    return found[0] if count == 1 else Parts(found)


def parts_of(x: Tile) -> tuple[jax.Array, ...]:
    """Returns the parts of a tile."""
    return x.parts if isinstance(x, Parts) else (x,)


def sum_parts(f: Callable[..., jax.Array], *tiles: Tile) -> jax.Array:
    """Returns the sum of a function of the parts of tiles of one width."""
    return functools.reduce(jnp.add, (f(*x) for x in zip(*map(parts_of, tiles), strict=True)))


def widths(d: int) -> tuple[int, ...]:
    """Returns the widths of the parts of a tile that holds D columns.

    They are powers of two of at least 16, for the matrix units: one, or two where that saves a
    quarter of the columns.
    """
    whole = single_width(d)
    half = whole // 2
    rest = single_width(d - half)
    return (half, rest) if whole > 64 and half + rest <= 3 * whole // 4 else (whole,)


def single_width(d: int) -> int:
    """Returns the width of a tile of one part that holds D columns."""
    return max(16, 1 << (d - 1).bit_length())


def width(d: int) -> int:
    """Returns W, the columns of a tile that holds D."""
    return sum(widths(d))


def zero_tile(size: int, d: int) -> Tile:
    """Returns a float32 tile `[size,W]` of zeros."""
    return join([jnp.zeros((size, w), jnp.float32) for w in widths(d)])


def join(parts: Sequence[jax.Array]) -> Tile:
    """Returns the tile of these parts."""
    return parts[0] if len(parts) == 1 else Parts(parts)
