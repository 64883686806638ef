"""Argument checks of the public ops: what was wrong, what was expected, what came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

_T = TypeVar("_T")

FLOAT_DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)


def shape(name: str, x: jax.Array, axes: str) -> tuple[int, ...]:
    """The shape of `x`, whose axes are the letters of `axes`, none of them empty."""
    if x.ndim != len(axes):
        raise ValueError(f"{name} must have shape [{','.join(axes)}]; got {x.shape}")
    for axis, size in zip(axes, x.shape):
        if size == 0:
            raise ValueError(f"{name} must have at least one element on axis {axis}; got {x.shape}")
    return x.shape


def same(
    name: str, x: jax.Array, axes: str, expected: Sequence[int], dtype: jax.typing.DTypeLike
) -> None:
    """Raises unless `x` has exactly this shape and dtype."""
    if x.shape != tuple(expected):
        raise ValueError(
            f"{name} must have shape [{','.join(axes)}] = {tuple(expected)}; got {x.shape}"
        )
    if x.dtype != dtype:
        raise TypeError(f"{name} must have dtype {jnp.dtype(dtype).name}; got {x.dtype.name}")


def float_dtype(name: str, x: jax.Array) -> None:
    """Raises unless `x` is of a floating dtype that the ops compute in."""
    if x.dtype not in FLOAT_DTYPES:
        names = ", ".join(jnp.dtype(d).name for d in FLOAT_DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {names}; got {x.dtype.name}")


def choice(name: str, value: str, table: Mapping[str, _T]) -> _T:
    """The entry of `table` that `value` names."""
    if value not in table:
        raise ValueError(f"{name} must be None or one of {', '.join(table)}; got {value!r}")
    return table[value]


def backend(
    implementation: str | None,
    backends: Mapping[str, _T],
    reasons: Mapping[str, str | None],
) -> _T:
    """The backend that `implementation` names; for None the first able one, else `"xla"`.

    Args:
      implementation: A name, or None.
      backends: All of them by name.
      reasons: Of those that cannot take every call, the best first: why not this one, or None.
    """
    if implementation is None:
        implementation = next((name for name, reason in reasons.items() if not reason), "xla")
    found = choice("implementation", implementation, backends)
    if reason := reasons.get(implementation):
        raise ValueError(f"implementation={implementation!r} cannot run this call: {reason}")
    return found


def precision(value: str | None) -> jax.lax.Precision | None:
    """None or `"highest"`, as `jax.lax` takes it."""
    if value not in (None, "highest"):
        raise ValueError(f"precision must be None or 'highest'; got {value!r}")
    return None if value is None else jax.lax.Precision.HIGHEST
