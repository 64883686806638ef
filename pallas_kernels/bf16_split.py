"""Products of float32 matrices on bfloat16 matrix units."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def dot_bf16_split(
    a: jax.Array,
    b: jax.Array,
    count: int,
    dot: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Multiplies float32 matrices as sums of bfloat16 terms.

    Products of terms that lie below the last bit kept are left out (3 products for 2 terms,
    6 for 3). The smallest products are added first.

    Args:
      a: float32.
      b: float32.
      count: Terms of each operand: 2 keep 16 bits, 3 keep all 24.
      dot: Multiplies two bfloat16 matrices into float32.
    """
    a_terms, b_terms = bf16_split(a, count), bf16_split(b, count)
    total = jnp.zeros((), jnp.float32)
    for order in reversed(range(count)):
        for i in range(order + 1):
            total += dot(a_terms[i], b_terms[order - i])
    return total


def bf16_split(x: jax.Array, count: int) -> list[jax.Array]:
    """Splits float32 `x` into a sum of `count` bfloat16 terms of 8 bits each, largest first."""
    terms = []
    for _ in range(count):
        terms.append(x.astype(jnp.bfloat16))
        x = x - terms[-1].astype(jnp.float32)
    return terms
