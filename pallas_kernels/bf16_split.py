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
    """Each operand as a sum of bfloat16 numbers of 8 bits each, smallest products first.

    Products of parts that are below the last bit kept are left out: 3 products for 2
    parts, 6 for 3.

    Args:
      a: float32.
      b: float32.
      count: Parts of each operand: 2 keep 16 bits, 3 keep all 24.
      dot: The product of two bfloat16 matrices, in float32.
    """
    a_parts, b_parts = bf16_split(a, count), bf16_split(b, count)
    total = jnp.zeros((), jnp.float32)
    for order in reversed(range(count)):
        for i in range(order + 1):
            total += dot(a_parts[i], b_parts[order - i])
    return total


def bf16_split(x: jax.Array, count: int) -> list[jax.Array]:
    """So many bfloat16 numbers, largest first, whose sum is float32 `x` to 8 bits each."""
    found = []
    for _ in range(count):
        found.append(x.astype(jnp.bfloat16))
        x = x - found[-1].astype(jnp.float32)
    return found
