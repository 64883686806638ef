"""A decode step in plain XLA: one pass over the cache, two products of a few rows each."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lucid_jax.ops.decode.new_token import LayerCache, NewToken
from lucid_jax.ops.decode.partial_softmax import PartialSoftmax, attend_and_append
from lucid_jax.ops.numerics import finite, product
from lucid_jax.ops.precondition.gram import inverse_norms
from pallas_kernels.scaling import largest_exponent


def attend(
    token: NewToken,
    cached: LayerCache,
    length: jax.Array,
    scale: float,
    axis_name: str | None,
) -> tuple[jax.Array, LayerCache]:
    """Attends with the new token of each sequence to its cache, and appends it.

    Args:
      token: The new token.
      cached: The cache, P places.
      length: int32 `[B]`, the number of cached tokens.
      scale: Factor of the logits, which are exponents of 2.
      axis_name: The mesh axis of the devices that share the cache, or None.

    Returns:
      `o [B,K,G,D]`, and the cache with the token.
    """

    def sum_own(cached: LayerCache) -> PartialSoftmax:
        return sum_up(token, cached, length, scale).combine_devices(axis_name)

    return attend_and_append(sum_own, token, cached, length, scale)


def _dots(rows: jax.Array, keys: jax.Array) -> jax.Array:
    return product("bkmd,bkpd->bkmp", rows, keys)


def sum_up(
    token: NewToken,
    cached: LayerCache,
    length: jax.Array,
    scale: float,
    dots: Callable[[jax.Array, jax.Array], jax.Array] = _dots,
) -> PartialSoftmax:
    """Sums over the cached tokens, by the `dots [B,K,M,P]` of rows `[B,K,M,D]` and the keys."""
    group, d = token.q.shape[2:]
    norms, shift = cached.inverse_norms, largest_exponent(d)
    valid = (jnp.arange(cached.k.shape[2])[None] < length[:, None])[:, None, None]
    rows = token.q
    if norms is not None:
        norm = inverse_norms(token.k)[..., None]
        # A factor that keeps the bits of the key, so that the product with a huge key is finite.
        factor = jax.lax.reduce_precision(norm, jnp.finfo(norm.dtype).nexp, 0)
        row = (token.k.astype(norm.dtype) * factor).astype(token.k.dtype)
        rows = jnp.concatenate([rows, row[:, :, None]], 2)
    products = dots(rows, cached.k)
    lowest = jnp.finfo(products.dtype).min
    logits = jnp.where(valid, finite(scale * products[:, :, :group]), lowest)
    largest = logits.max(-1)
    weights = jnp.where(valid, jnp.exp2(logits - largest[..., None]), 0)
    total = weights.sum(-1)
    if norms is None:
        return PartialSoftmax(largest, total, product("bkgp,bkpd->bkgd", weights, cached.y), None)
    key_scale = norm / jnp.where(factor == 0, 1, factor)
    cosines = products[:, :, group:] * (key_scale * norms)[:, :, None]
    a = jnp.where(valid, jnp.exp2(shift * (cosines - 1)), 0)
    both = product("bkrp,bkpd->bkrd", jnp.concatenate([weights, a], 2), cached.y)
    return PartialSoftmax(largest, total, both[:, :, :group], both[:, :, group])
