"""`decode_attention`: argument checks, and the choice of a backend."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax

from lucid_jax.ops import check
from lucid_jax.ops.attention.api import logits_scale
from lucid_jax.ops.decode import triton, xla
from lucid_jax.ops.decode.new_token import LayerCache, NewToken, check_step
from lucid_jax.ops.numerics import accumulator_dtype
from lucid_jax.ops.per_device import per_device

_BACKENDS = {"xla": xla.attend, "triton": triton.attend}


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cached: LayerCache,
    length: jax.Array,
    *,
    beta: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, LayerCache]:
    """Attends with one new token of each sequence to its cache and to itself.

    The new key joins the query heads as one more row, so that the cache is read once for both
    the softmax and `y = β (v − Σ_j A_tj y_j)`. Cached tokens never change.

    Args:
      q: Queries `[B,H,D]`, float16, bfloat16, float32 or float64, after RoPE; K divides H.
      k: The new key `[B,K,D]` of the same dtype.
      v: The new value `[B,K,D]` of the same dtype.
      cached: The cache of the layer, P places of the same dtype; with norms for LUCID attention,
        without for softmax attention.
      length: Integers `[B]`, the number of cached tokens. Whatever the places behind them hold must
        be finite, and does not reach the result.
      beta: β of the new token, floats `[B,K]`, for LUCID attention; None is 1.
      temperature: τ > 0 of the softmax, whose logits are `q·k/(τ√D)`; as in `softmax_attention`.
      axis_name: Under `shard_map`, the mesh axis whose devices each hold a part of the cache,
        with the `length` of that part; the other arguments are the same along it.
      implementation: None picks the best for the device; `"triton"` (a kernel for GPUs) and
        `"xla"` run that or raise.

    Returns:
      `o [B,H,D]`, dtype of `q`, and the cache with the new token behind the cached ones, or
      unchanged if it is full. With `axis_name` every device writes the token into its own part;
      the caller advances the `length` of the one part that the token belongs to.

    Raises:
      TypeError: a dtype that is not supported or does not match.
      ValueError: shapes that do not match, a temperature that is not positive, or an
        implementation that is unknown or cannot run the call.
    """
    length = check_step(q, k, v, "cached", cached, length)
    check.beta(beta, "BK", k.shape[:2])
    if beta is not None:
        if cached.inverse_norms is None:
            raise ValueError("beta is for LUCID attention; got a cache without inverse_norms")
        beta = beta.astype(accumulator_dtype(q.dtype))
    if isinstance(temperature, jax.Array):
        # Queries take a factor that only the device knows.
        q = (q.astype(accumulator_dtype(q.dtype)) / temperature).astype(q.dtype)
        temperature = 1.0
    scale = logits_scale(temperature, q.shape[-1]) * math.log2(math.e)
    backend = check.backend("decode", implementation, _BACKENDS, {"triton": triton.unsupported(q)})
    return _decode(backend, scale, axis_name, q, k, v, beta, cached, length)


# Compiled once for a shape, also where it is called outside of `jax.jit`.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _decode(
    backend: Callable[..., tuple[jax.Array, LayerCache]],
    scale: float,
    axis_name: str | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array | None,
    cached: LayerCache,
    length: jax.Array,
) -> tuple[jax.Array, LayerCache]:
    def attend(q, k, v, beta, cached, length):
        (b, h, d), kv_heads = q.shape, k.shape[1]
        token = NewToken(q.reshape(b, kv_heads, h // kv_heads, d), k, v, beta)
        o, cached = backend(token, cached, length, scale, axis_name)
        return o.reshape(b, h, d).astype(q.dtype), cached

    if axis_name is not None:
        # The result is the same along that axis, which is more than `per_device` says of it.
        return attend(q, k, v, beta, cached, length)
    norms = None if cached.inverse_norms is None else "BKP"
    cache_axes = cast(Any, LayerCache)("BKPD", "BKPD", norms)
    axes = "BHD", "BKD", "BKD", "BK", cache_axes, "B"
    return per_device(attend, axes, ("BHD", cache_axes), q, k, v, beta, cached, length)


def decode_implementation(implementation: str | None) -> str | None:
    """Returns the `implementation` of `decode_attention` beside that of a solve."""
    # The XLA path also serves as the reference.
    return {"reference": "xla", "xla": "xla", "triton": "triton"}.get(implementation or "")
