"""Adapter to splash attention, jax's flash attention for TPUs, which takes segment ids."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

from lucid_jax.ops import target
from lucid_jax.ops.blocks import heads_first, round_up, rows_first
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
    del precision  # Calls that have one are refused.
    length, heads = q.shape[1], q.shape[2]
    # Rows behind the end are seen by none that is kept.
    size = round_up(length, min(_BLOCK, round_up(length, _LANES)))
    attend = kernel.make_splash_mha(
        mask.MultiHeadMask([_CausalMask((size, size))] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=_block_sizes(size),
        residual_checkpoint_name=KEPT,
        interpret=INTERPRET,
    )  # fmt: skip
    # The kernel has no scale of its own.
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v = (heads_first(x, size) for x in (q, k, v))
    ids = None
    if segment_ids is not None:
        padded = jnp.pad(segment_ids, ((0, 0), (0, size - length)))
        ids = kernel.SegmentIds(padded, padded)
    return rows_first(jax.vmap(attend)(q, k, v, segment_ids=ids), length)


class _CausalMask(mask.CausalMask):
    """A causal mask whose blocks off the diagonal are single entries.

    The library asks each block only whether any and whether all of it is visible. Written
    out, the blocks of 131072 rows are 2³⁴ entries, which take minutes on the host.
    """

    def __getitem__(self, index) -> np.ndarray:
        rows, columns = index
        if rows.start >= columns.stop - 1 or rows.stop <= columns.start:
            return np.full((1, 1), rows.start >= columns.start)
        return super().__getitem__(index)


def _block_sizes(size: int) -> kernel.BlockSizes:
    block = min(_BLOCK, size)
    fused = size <= _FUSED_BLOCKS * block
    return kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
