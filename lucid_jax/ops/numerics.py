"""Arithmetic that all ops share: accumulators, products and integer rounding."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def accumulator_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns float64 for float64 operands, float32 for all narrower ones."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def kernel_precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision | None:
    """Returns the precision of the kernels' products, which do not round float32 operands."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def product(
    spec: str, a: jax.Array, b: jax.Array, precision: jax.lax.Precision | None = None
) -> jax.Array:
    """`einsum(spec, a, b)` with `a` cast to the dtype of `b`, in the accumulator dtype."""
    return jnp.einsum(
        spec,
        a.astype(b.dtype),
        b,
        precision=precision,
        preferred_element_type=accumulator_dtype(b.dtype),
    )


def finite(logits: jax.Array) -> jax.Array:
    """Brings infinite logits into the range of their dtype, whose ends tie with each other."""
    limits = jnp.finfo(logits.dtype)
    return jnp.clip(logits, limits.min, limits.max)


def ceil_div(n, divisor):
    """`n / divisor`, rounded up; integers or arrays of them."""
    return -(-n // divisor)


def round_up(n: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `n`."""
    return ceil_div(n, multiple) * multiple
