"""Adapter to tokamax's flash attention for Hopper GPUs, which takes packed sequences."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp

from lucid_jax.ops import target
from lucid_jax.ops.attention import xla
from lucid_jax.ops.blocks import pad_axis
from lucid_jax.ops.numerics import round_up

# The library takes lengths of this multiple; no token sees the padding behind it.
_MULTIPLE = 128


def unsupported(q: jax.Array, precision: jax.lax.Precision | None) -> str | None:
    """Says why tokamax cannot take this call, or returns None when it can."""
    if target.platform() != "gpu" or not target.device_kind().startswith("NVIDIA H"):
        return f"it needs a Hopper GPU; this is compiled for {target.device_kind()}"
    if importlib.util.find_spec("tokamax") is None:
        return "it needs the package tokamax; see the README"
    if precision is not None or q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"it computes in float16 or bfloat16 only; got {q.dtype.name}"
    if q.shape[-1] not in (64, 128):
        return f"it needs a head width of 64 or 128; got {q.shape[-1]}"
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
    if segment_ids is None:
        return _attention(q, k, v, None, scale)
    # The library takes the first visible key of each token, so segments must be contiguous.
    return jax.lax.cond(
        _is_contiguous(segment_ids),
        lambda: _attention(q, k, v, _segment_starts(segment_ids), scale),
        lambda: xla.attention(q, k, v, segment_ids, scale, precision),
    )


def _is_contiguous(segment_ids: jax.Array) -> jax.Array:
    """Returns whether ids ascend in every sequence, but for padding at the end with a lower id."""
    falls = jnp.sum(segment_ids[:, 1:] < segment_ids[:, :-1], 1)
    falls += segment_ids[:, 0] <= segment_ids[:, -1]
    return jnp.all(falls == 1)


def _segment_starts(segment_ids: jax.Array) -> jax.Array:
    """Returns the position at which the segment of each token starts: int32 `[B,S]`."""
    token = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    new = segment_ids != jnp.roll(segment_ids, 1, 1)
    return jax.lax.cummax(jnp.where(new, token, 0), axis=1)


def _attention(q, k, v, starts: jax.Array | None, scale: float) -> jax.Array:
    # The package is optional, so it is imported here; its masks have no public name.
    from tokamax._src.ops.attention.base import Mask
    from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

    length = q.shape[1]
    size = round_up(length, _MULTIPLE)
    q, k, v = (pad_axis(x, 1, size) for x in (q, k, v))
    first_keys = None if starts is None else pad_axis(starts, 1, size)[:, None]
    mask = Mask(is_causal=True, k_start=first_keys)
    return PallasMosaicGpuFlashAttention()(q, k, v, logits_scale=scale, mask=mask)[:, :length]
