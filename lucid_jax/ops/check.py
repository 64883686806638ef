"""Argument checks of the public ops: what was wrong, what was expected, what came."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.ops import implementations

_T = TypeVar("_T")

FLOAT_DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)

# Few models have more heads, so an array with more of them than tokens may have its axes swapped.
_MOST_HEADS = 256
_SWAP = "swap axes 1 and 2 of arrays [B,H,S,D]"


class ImplementationError(ValueError):
    """The implementation that was asked for cannot run on this device, or on these arrays."""


def array(name: str, x: object) -> None:
    """Raises unless `x` is an array."""
    if not isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        raise TypeError(f"{name} must be an array; got {type(x).__name__}")


def shape(name: str, x: jax.Array, axes: str) -> tuple[int, ...]:
    """Returns the shape of `x`; raises unless its axes are the letters of `axes`, none empty."""
    array(name, x)
    if not all(isinstance(size, int) for size in x.shape):
        raise ValueError(f"{name} must have a shape of numbers; got {x.shape}: export each length")
    if x.ndim != len(axes):
        raise ValueError(f"{name} must have shape [{','.join(axes)}]; got {x.shape}")
    for axis, size in zip(axes, x.shape):
        if size == 0:
            raise ValueError(f"{name} must have at least one element on axis {axis}; got {x.shape}")
    return x.shape


def sequences(name: str, x: jax.Array, axes: str) -> tuple[int, ...]:
    """`shape` of an array of tokens and heads, which also warns where these may be swapped."""
    _, s, heads, _ = shape(name, x, axes)
    if heads > max(s, _MOST_HEADS):
        warnings.warn(
            f"{name} has {heads} heads of {s} tokens; if it is [B,H,S,D], {_SWAP}", stacklevel=3
        )
    return x.shape


def same(
    name: str, x: jax.Array, axes: str, expected: Sequence[int], dtype: jax.typing.DTypeLike
) -> None:
    """Raises unless `x` has exactly this shape and dtype."""
    _same_shape(name, x, axes, expected)
    if x.dtype != dtype:
        raise TypeError(f"{name} must have dtype {jnp.dtype(dtype).name}; got {x.dtype.name}")


def integers(name: str, x: jax.Array, axes: str, expected: Sequence[int]) -> jax.Array:
    """Returns the low 32 bits of `x` as int32; raises unless it has integers and this shape."""
    _same_shape(name, x, axes, expected)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must have an integer dtype; got {x.dtype.name}")
    return x.astype(jnp.int32)


def segments(segment_ids: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """Returns the segment ids of the tokens of `x [B,S,H,D]` as int32, or None."""
    if segment_ids is None:
        return None
    b, s, heads, _ = x.shape
    array("segment_ids", segment_ids)
    if segment_ids.shape == (b, heads) and heads != s:
        raise ValueError(f"segment_ids must have shape [B,S] = {(b, s)}; got {(b, heads)}: {_SWAP}")
    return integers("segment_ids", segment_ids, "BS", (b, s))


def _same_shape(name: str, x: jax.Array, axes: str, expected: Sequence[int]) -> None:
    array(name, x)
    if x.shape != tuple(expected):
        raise ValueError(
            f"{name} must have shape [{','.join(axes)}] = {tuple(expected)}; got {x.shape}"
        )


def float_dtype(name: str, x: jax.Array) -> None:
    """Raises unless `x` has a floating dtype that the ops compute in."""
    if x.dtype == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise TypeError(f"{name} has dtype float64, which needs jax_enable_x64; pass float32")
    if x.dtype not in FLOAT_DTYPES:
        names = ", ".join(jnp.dtype(d).name for d in FLOAT_DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {names}; got {x.dtype.name}")


def beta(x: jax.Array | None, axes: str, expected: Sequence[int]) -> None:
    """Raises unless β is None, or floats of this shape."""
    if x is not None:
        _same_shape("beta", x, axes, expected)
        float_dtype("beta", x)


def grouped_heads(heads: int, kv_heads: int) -> None:
    """Raises unless K divides H."""
    if heads % kv_heads:
        raise ValueError(f"H must be a multiple of K; got H={heads} query heads, K={kv_heads}")


def attention_inputs(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
) -> jax.Array | None:
    """Returns ids as int32; raises unless `q [B,S,H,D]`, `k` and `v [B,S,K,D]` and they fit."""
    b, s, heads, d = sequences("q", q, "BSHD")
    float_dtype("q", q)
    _, keys, kv_heads, _ = sequences("k", k, "BSKD")
    if keys != s:
        hint = _SWAP if heads == kv_heads else "a KV cache is for lucid_jax.ops.decode"
        raise ValueError(f"q and k must have the same length S; got {s} and {keys} ({hint})")
    for name, x in (("k", k), ("v", v)):
        same(name, x, "BSKD", (b, s, kv_heads, d), q.dtype)
    grouped_heads(heads, kv_heads)
    return segments(segment_ids, q)


def choice(name: str, value: str, table: Mapping[str, _T]) -> _T:
    """Returns the entry of `table` that `value` names."""
    if value not in table:
        raise ValueError(f"{name} must be None or one of {', '.join(table)}; got {value!r}")
    return table[value]


def backend(
    op: str,
    implementation: str | None,
    backends: Mapping[str, _T],
    reasons: Mapping[str, str | None],
) -> _T:
    """Returns the backend that `implementation` names; for None the best that can run the call.

    Args:
      op: What it implements, for `implementations.recorded`.
      implementation: A name, or None.
      backends: All backends by name; `"xla"` takes every call.
      reasons: For each backend that does not take every call, the best one first: why it cannot
        run this call, or None when it can.
    """
    if implementation is None:
        implementation = next((name for name, reason in reasons.items() if not reason), "xla")
    found = choice("implementation", implementation, backends)
    if reason := reasons.get(implementation):
        raise ImplementationError(
            f"implementation={implementation!r} cannot run this call: {reason}"
        )
    implementations.record(op, implementation, reasons)
    return found


def precision(value: str | None) -> jax.lax.Precision | None:
    """Converts None or `"highest"` to what `jax.lax` takes."""
    if value not in (None, "highest"):
        raise ValueError(f"precision must be None or 'highest'; got {value!r}")
    return None if value is None else jax.lax.Precision.HIGHEST
