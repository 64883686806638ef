"""One pass over a cache in plain XLA: two products of a few rows, on every platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.ops.decode.new_token import LayerCache, NewToken
from lucid_jax.ops.decode.partial_softmax import PartialSoftmax, attend_by
from lucid_jax.ops.precondition.gram import accumulator_dtype, inverse_norms
from pallas_kernels.scaling import largest_exponent


def attend(
    new: NewToken,
    cached: LayerCache,
    length: jax.Array,
    scale: float,
    axis_name: str | None,
) -> tuple[jax.Array, LayerCache]:
    """`o [B,K,G,D]`, and the cache with the new row; the rest as in the public op.

    Args:
      new: The row.
      cached: P rows.
      length: int32 `[B]`, how many of them are valid.
      scale: Of the logits as exponents of 2.
      axis_name: Of the devices that share the rows.
    """

    def sum_up(cached: LayerCache) -> PartialSoftmax:
        return _sum(new, cached, length, scale).added_over(axis_name)

    return attend_by(sum_up, new, cached, length, scale)


def _sum(new: NewToken, cached: LayerCache, length: jax.Array, scale: float) -> PartialSoftmax:
    group, d = new.q.shape[2:]
    norms, shift = cached.inverse_norms, largest_exponent(d)
    valid = (jnp.arange(cached.k.shape[2]) < length[:, None])[:, None, None]
    rows = new.q if norms is None else jnp.concatenate([new.q, new.k[:, :, None]], 2)
    dots = _product("bkrd,bkpd->bkrp", rows, cached.k)
    logits = jnp.where(valid, scale * dots[:, :, :group], jnp.finfo(dots.dtype).min)
    largest = logits.max(-1)
    weights = jnp.where(valid, jnp.exp2(logits - largest[..., None]), 0)
    norm = weights.sum(-1)
    if norms is None:
        return PartialSoftmax(largest, norm, _product("bkgp,bkpd->bkgd", weights, cached.y), None)
    cosines = dots[:, :, group:] * (inverse_norms(new.k)[..., None] * norms)[:, :, None]
    a = jnp.where(valid, jnp.exp2(shift * (cosines - 1)), 0)
    both = _product("bkrp,bkpd->bkrd", jnp.concatenate([weights, a], 2), cached.y)
    return PartialSoftmax(largest, norm, both[:, :, :group], both[:, :, group])


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = accumulator_dtype(b.dtype)
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=dtype)
