"""Adapter to cuDNN's flash attention, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.ops import target


def unsupported(
    q: jax.Array, segment_ids: jax.Array | None, precision: jax.lax.Precision | None
) -> str | None:
    """Says why cuDNN cannot take this call, or returns None when it can.

    Its public interface takes segments only as a T×T mask, which defeats the purpose.
    """
    if target.platform() != "gpu":
        return f"it needs a GPU; this is compiled for {target.platform()}"
    if precision is not None or q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"it computes in float16 or bfloat16 only; got {q.dtype.name}"
    if segment_ids is not None:
        return "it has no segment ids without a T×T mask"
    if q.shape[1] % 2:
        return f"it needs an even length; got {q.shape[1]}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"it needs a head width that 8 divides, at most 128; got {q.shape[-1]}"
    return None


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    precision: jax.lax.Precision | None,
) -> jax.Array:
    """Computes `softmax(scale·q kᵀ + causal) v`; shapes as in the public op."""
    del segment_ids, precision  # `unsupported` refuses calls that have them.
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, implementation="cudnn"
    )
