"""A decode step in plain XLA: one pass over the cache, two products of a few rows each."""

from __future__ import annotations

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

    def sum_up(cached: LayerCache) -> PartialSoftmax:
        return _sum(token, cached, length, scale).combine_devices(axis_name)

    return attend_and_append(sum_up, token, cached, length, scale)


def _sum(token: NewToken, cached: LayerCache, length: jax.Array, scale: float) -> PartialSoftmax:
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
    dots = product("bkrd,bkpd->bkrp", rows, cached.k)
    logits = jnp.where(valid, finite(scale * dots[:, :, :group]), jnp.finfo(dots.dtype).min)
    largest = logits.max(-1)
    weights = jnp.where(valid, jnp.exp2(logits - largest[..., None]), 0)
    total = weights.sum(-1)
    if norms is None:
        return PartialSoftmax(largest, total, product("bkgp,bkpd->bkgd", weights, cached.y), None)
    key_scale = norm / jnp.where(factor == 0, 1, factor)
    cosines = dots[:, :, group:] * (key_scale * norms)[:, :, None]
    a = jnp.where(valid, jnp.exp2(shift * (cosines - 1)), 0)
    both = product("bkrp,bkpd->bkrd", jnp.concatenate([weights, a], 2), cached.y)
    return PartialSoftmax(largest, total, both[:, :, :group], both[:, :, group])
