"""Adapter to splash attention, jax's flash attention for TPUs, which takes segment ids.

The library describes a mask by visiting every block of it on the host. Under context
parallelism only the device knows the positions of its queries, so the description is made
here, from positions.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

from lucid_jax.ops import target
from lucid_jax.ops.blocks import heads_first, pad_axis, rows_first
from lucid_jax.ops.numerics import round_up
from lucid_jax.ops.query_positions import QueryPositions
from lucid_jax.ops.remat import ATTENTION_RESULT

# Pallas' interpreter instead of a TPU; the tests set it.
INTERPRET = False

_LANES = 128
_BLOCK = 512
# The fused backward writes a float32 gradient of q for every block of keys and adds them up
# afterwards. That is fast, but takes as many copies of q as there are blocks: 8 here, 256 at
# 131072 tokens.
_FUSED_BLOCKS = 8


def unsupported(q: jax.Array, precision: jax.lax.Precision | None) -> str | None:
    """Says why splash attention cannot take this call, or returns None when it can."""
    if not INTERPRET and target.platform() != "tpu":
        return f"it needs a TPU; this is compiled for {target.platform()}"
    if precision is not None or q.dtype != jnp.bfloat16:
        return f"it computes in bfloat16 only; got {q.dtype.name}, precision {precision}"
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
    at = QueryPositions.whole_sequence(q.shape[1], segment_ids)
    return attend(scale, precision, at, q, k, v)


def attend(
    scale: float,
    precision: jax.lax.Precision | None,
    at: QueryPositions,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> jax.Array:
    """Attends with T queries to S keys: `o [B,T,H,D]`, differentiable in q, k and v."""
    del precision  # `unsupported` refuses calls that have one.
    return _with_short_integers(functools.partial(_attend, scale), q, k, v, at)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_short_integers(attend, q, k, v, at):
    """Calls the library where integers have 32 bits, which it cannot do without."""
    with jax.enable_x64(False):
        return attend(q, k, v, at)


def _with_short_integers_fwd(attend, q, k, v, at):
    with jax.enable_x64(False):
        return jax.vjp(lambda *x: attend(*x, at), q, k, v)


def _with_short_integers_bwd(attend, pull_back, o_bar):
    del attend
    with jax.enable_x64(False):
        return *pull_back(o_bar), None


_with_short_integers.defvjp(_with_short_integers_fwd, _with_short_integers_bwd)


def _attend(
    scale: float, q: jax.Array, k: jax.Array, v: jax.Array, at: QueryPositions
) -> jax.Array:
    length, keys = q.shape[1], k.shape[1]
    block_q, block_kv = (min(_BLOCK, round_up(n, _LANES)) for n in (length, keys))
    # The kernel has no scale of its own.
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v = heads_first(q, block_q), heads_first(k, block_kv), heads_first(v, block_kv)
    positions = pad_axis(at.positions, 0, q.shape[2])
    attend_one = _causal_kernel(positions, k.shape[2], block_q, block_kv)
    ids = None
    if at.segment_ids is not None and at.key_segment_ids is not None:
        ids = kernel.SegmentIds(
            pad_axis(at.segment_ids, 1, q.shape[2]), pad_axis(at.key_segment_ids, 1, k.shape[2])
        )
    # The library's type also covers calls that return log-sum-exps.
    o: Any = jax.vmap(attend_one)(q, k, v, segment_ids=ids)
    return rows_first(o, length)


def _causal_kernel(
    positions: jax.Array, keys: int, block_q: int, block_kv: int
) -> kernel.SplashAttentionKernel:
    """Makes the library's kernel for queries at ascending positions `[T]`, padded with zeros."""
    sequence: Any = positions  # The library declares numpy arrays, and takes jax arrays.
    last = positions.reshape(-1, block_q).max(1)[:, None]
    first = jnp.arange(keys // block_kv, dtype=jnp.int32)[None] * block_kv
    visible = last >= first
    num_rows, num_keys = visible.shape
    # A step with nothing to do prefetches the block of the next step that has work: the first
    # keys, or in the pass over queries the first queries that see the keys.
    next_keys = jnp.where(visible, jnp.arange(num_keys)[None], 0)
    next_rows = jnp.maximum(jnp.arange(num_rows)[:, None], jnp.argmax(visible, 0, keepdims=True))

    def mask(following: jax.Array, largest: int) -> info.MaskInfo:
        # Scalar memory is small, so the indices take the narrowest dtype.
        dtype = next(t for t in (jnp.int8, jnp.int16, jnp.int32) if largest <= jnp.iinfo(t).max)
        return info.MaskInfo(
            data_next=following.astype(dtype)[None],
            mask_next=None,
            block_mask=visible.astype(jnp.int8)[None],
            partial_mask_blocks=None,
            q_sequence=sequence,
        )

    sizes = _block_sizes(block_q, block_kv, keys)
    by_rows = mask(next_keys, num_keys)
    return kernel.SplashAttentionKernel(
        by_rows,
        None if sizes.use_fused_bwd_kernel else by_rows,
        mask(next_rows, num_rows),
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=ATTENTION_RESULT,
        mask_function=_sees,
        interpret=INTERPRET,
    )


def _sees(rows: jax.Array, keys: jax.Array) -> jax.Array:
    return rows >= keys


def _block_sizes(block_q: int, block_kv: int, keys: int) -> kernel.BlockSizes:
    fused = keys <= _FUSED_BLOCKS * block_kv
    return kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=None if fused else block_q,
        block_kv_dq=None if fused else block_kv,
        use_fused_bwd_kernel=fused,
    )
