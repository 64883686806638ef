"""The short convolution of sequences that are sharded over a mesh axis.

A block of b tokens needs the last W − 1 tokens of the block before, which the device before holds,
of the same stripe or, for the first device, of the stripe before. Each device sends these tokens of
all its blocks to the next one: 2·w·B·(S/(C·b))·K·D bytes for W = 3.
"""

import jax
import jax.numpy as jnp

from lucid_jax.ops import short_convolution as local


def short_convolution(
    x: jax.Array,
    taps: jax.Array,
    *,
    axis_name: str,
    stripe: int,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Computes `ops.short_convolution` of sharded sequences; call it under `shard_map`.

    Args:
      x: `[B,S/C,K,D]` of this device, in the order of `Stripes`.
      taps: The filters `[W,K,D]`.
      axis_name: The mesh axis, of C devices.
      stripe: b, tokens of a block; divides S/C.
      segment_ids: int32 `[B,S/C]`, or None for one segment.

    Returns:
      `[B,S/C,K,D]`, summed in and of the accumulator dtype.

    Raises:
      ValueError: a block has fewer tokens than W − 1.
    """
    earlier, devices = taps.shape[0] - 1, jax.lax.axis_size(axis_name)
    if stripe < earlier:
        raise ValueError(f"stripe must be at least the {earlier} tokens before; got {stripe}")
    is_first = jax.lax.axis_index(axis_name) == 0

    def with_tokens_before(x):
        """Returns the blocks `[B,N,b,…]` of tokens `[B,S/C,…]`, as sequences `[B·N,W−1+b,…]`."""
        blocks = x.reshape(x.shape[0], -1, stripe, *x.shape[2:])
        last = blocks[:, :, stripe - earlier :]
        ring = [(i, (i + 1) % devices) for i in range(devices)]
        before = jax.lax.ppermute(last, axis_name, ring)
        of_earlier_stripe = jnp.concatenate([jnp.zeros_like(before[:, :1]), before[:, :-1]], 1)
        before = jnp.where(is_first, of_earlier_stripe, before)
        return jnp.concatenate([before, blocks], 2).reshape(-1, earlier + stripe, *x.shape[2:])

    tokens, ids = jax.tree.map(with_tokens_before, (x, segment_ids))
    out = local.short_convolution(tokens, taps, segment_ids=ids)
    return out[:, earlier:].reshape(x.shape)
