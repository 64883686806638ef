"""Adapter to tokamax's flash attention for Hopper GPUs, which takes packed rows."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp

from lucid_jax.ops import target
from lucid_jax.ops.attention import xla
from lucid_jax.ops.blocks import pad_axis, round_up

# Rows behind the end are seen by none that is kept.
_MULTIPLE = 128


def unsupported(q: jax.Array, precision: jax.lax.Precision | None) -> str | None:
    """Why tokamax cannot take this call, or None when it can."""
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
    """`softmax(scale·q kᵀ + causal) v`; shapes as in the public op."""
    if segment_ids is None:
        return _attention(q, k, v, None, scale)
    # It takes a first key for each row, which says all only of segments in one piece.
    return jax.lax.cond(
        _in_one_piece(segment_ids),
        lambda: _attention(q, k, v, _segment_starts(segment_ids), scale),
        lambda: xla.attention(q, k, v, segment_ids, scale, precision),
    )


def _in_one_piece(segment_ids: jax.Array) -> jax.Array:
    """Whether ids ascend in every row; those of padding may follow, all below the first."""
    falls = jnp.sum(segment_ids[:, 1:] < segment_ids[:, :-1], 1)
    falls += segment_ids[:, 0] <= segment_ids[:, -1]
    return jnp.all(falls == 1)


def _segment_starts(segment_ids: jax.Array) -> jax.Array:
    """The first row of each row's segment: int32 `[B,S]`."""
    row = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    new = segment_ids != jnp.roll(segment_ids, 1, 1)
    return jax.lax.cummax(jnp.where(new, row, 0), axis=1)


def _attention(q, k, v, starts: jax.Array | None, scale: float) -> jax.Array:
    # Optional, and only there where it can run. Its masks have no public name.
    from tokamax._src.ops.attention.base import Mask
    from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

    length = q.shape[1]
    size = round_up(length, _MULTIPLE)
    q, k, v = (pad_axis(x, 1, size) for x in (q, k, v))
    first_keys = None if starts is None else pad_axis(starts, 1, size)[:, None]
    mask = Mask(is_causal=True, k_start=first_keys)
    return PallasMosaicGpuFlashAttention()(q, k, v, logits_scale=scale, mask=mask)[:, :length]
