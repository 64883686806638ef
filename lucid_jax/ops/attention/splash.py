"""Adapter to splash attention, jax's flash attention for TPUs, which takes segment ids.

What a row may see is told by its position among the keys, which only the device may know:
so the library's description of a mask is made here, from positions, and not by its own
code, which visits every block of the mask on the host.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

from lucid_jax.ops import target
from lucid_jax.ops.blocks import heads_first, pad_axis, round_up, rows_first
from lucid_jax.ops.query_positions import QueryPositions
from lucid_jax.ops.remat import KEPT

# Pallas' interpreter instead of a TPU: the tests set it.
INTERPRET = False

_LANES = 128
_BLOCK = 512
# The fused backward writes the gradient of q once for every block of keys, in float32, and
# adds up afterwards: fast, and 8 copies of q at most here, 256 at 131072 tokens.
_FUSED_BLOCKS = 8


def unsupported(q: jax.Array, precision: jax.lax.Precision | None) -> str | None:
    """Why splash attention cannot take this call, or None when it can."""
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
    """`softmax(scale·q kᵀ + causal) v`; shapes as in the public op."""
    return attend(scale, precision, QueryPositions.all_of(q.shape[1], segment_ids), q, k, v)


def attend(
    scale: float,
    precision: jax.lax.Precision | None,
    rows: QueryPositions,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> jax.Array:
    """`o [B,T,H,D]` of T rows among S keys; the gradients of `k` and `v` are in their dtype."""
    del precision  # Calls that have one are refused.
    length, keys = q.shape[1], k.shape[1]
    block_q, block_kv = (min(_BLOCK, round_up(n, _LANES)) for n in (length, keys))
    # The kernel has no scale of its own.
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v = heads_first(q, block_q), heads_first(k, block_kv), heads_first(v, block_kv)
    positions = pad_axis(rows.positions, 0, q.shape[2])
    attend_one = _causal_kernel(positions, k.shape[2], block_q, block_kv)
    ids = None
    if rows.segment_ids is not None and rows.key_segment_ids is not None:
        ids = kernel.SegmentIds(
            pad_axis(rows.segment_ids, 1, q.shape[2]), pad_axis(rows.key_segment_ids, 1, k.shape[2])
        )
    # Its logarithms come with it only where they are asked for.
    o: Any = jax.vmap(attend_one)(q, k, v, segment_ids=ids)
    return rows_first(o, length)


def _causal_kernel(
    positions: jax.Array, keys: int, block_q: int, block_kv: int
) -> kernel.SplashAttentionKernel:
    """The library's kernel, for rows at positions `[T]` that ascend up to a padding of zeros."""
    sequence: Any = positions  # The library declares numpy's arrays, and takes jax's.
    last = positions.reshape(-1, block_q).max(1)[:, None]
    first = jnp.arange(keys // block_kv, dtype=jnp.int32) * block_kv
    visible = last >= first
    num_rows, num_keys = visible.shape
    # Where there is nothing to do, the block to fetch is that of the next place where there
    # is: the first keys, or going down the rows the first that see the keys.
    next_keys = jnp.where(visible, jnp.arange(num_keys), 0)
    next_rows = jnp.maximum(jnp.arange(num_rows)[:, None], jnp.argmax(visible, 0))

    def mask(following: jax.Array, largest: int) -> info.MaskInfo:
        # They live in scalar memory, which is small.
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
        residual_checkpoint_name=KEPT,
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
