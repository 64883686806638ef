"""The inverse of a diagonal block of `A` by doubling, inside a kernel."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def invert_unit_lower(a: jax.Array, dot: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Inverts the unit triangular matrix whose strictly lower part is that of `a`.

    Let `X` hold the inverses of the diagonal blocks of size n, and `L` the part of `a` that joins
    pairs of these blocks. The inverses of the blocks of size 2n are then `X − X L X`. Every
    intermediate result is an inverse of diagonal blocks, whose entries are at most 2 for blocks
    of `A` (`‖A⁻¹‖₂ ≤ 2`), and all blocks of a size share one matrix product.

    Args:
      a: `[R,R]` float32, R a power of two.
      dot: Multiplies two such matrices.

    Returns:
      `[R,R]` float32, zero above the diagonal.
    """
    size = a.shape[0]
    row = jax.lax.broadcasted_iota(jnp.int32, a.shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, a.shape, 1)

    def off_diagonal(n: int) -> jax.Array:
        """Returns the part of `a` that joins pairs of diagonal blocks of size n."""
        level = n.bit_length()
        pair = (row >> level) == (column >> level)
        return jnp.where(pair & (row >> (level - 1) > column >> (level - 1)), a, 0)

    x = jnp.where(row == column, 1.0, 0.0) - off_diagonal(1)
    n = 2
    while n < size:
        x = x - dot(x, dot(off_diagonal(n), x))
        n *= 2
    return x


def invert_block(
    a: jax.Array,
    column: jax.Array | None,
    row: jax.Array | None,
    dot: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Inverts `diag(1/β) + stril(a)`, or `I + stril(a)` without β.

    The inverse is `√β (I + stril(√β a √β))⁻¹ √β`, with `√β` as a diagonal matrix. No β is divided
    by, and the inverse in it has the bound of 2 for β ≤ 1: `√β M √β` is positive semidefinite with
    diagonal β where `M` is with diagonal 1.

    Args:
      a: `[R,R]` float32, R a power of two.
      column: `√β [R,1]` float32, or None.
      row: `√β [1,R]` float32, or None.
      dot: Multiplies two such matrices.

    Returns:
      `[R,R]` float32, zero above the diagonal, and in rows and columns where β is zero.
    """
    if column is None or row is None:
        return invert_unit_lower(a, dot)
    scale = column * row
    return scale * invert_unit_lower(scale * a, dot)
