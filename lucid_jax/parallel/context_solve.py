"""The solve of rows that are shard over devices, and its gradient; see `context_attention`."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import put, rows_first, take
from lucid_jax.ops.precondition.block_ops import BlockOps
from lucid_jax.ops.precondition.gram import Keys, accumulator_dtype, key_gradient
from lucid_jax.ops.precondition.xla import diagonal_gradient
from lucid_jax.parallel.context_shard import ContextShard


class GatheredKeys(NamedTuple):
    """Keys and segment ids of this device, and of all."""

    k: jax.Array
    segment_ids: jax.Array | None
    k_all: jax.Array
    segment_ids_all: jax.Array | None

    @classmethod
    def of(cls, shard: ContextShard, k: jax.Array, segment_ids: jax.Array | None) -> GatheredKeys:
        """Gathers those of all."""
        ids = None if segment_ids is None else shard.gather(segment_ids)
        return cls(k, segment_ids, shard.gather(k), ids)


def substitute(
    shard: ContextShard,
    block_ops: BlockOps,
    gathered: GatheredKeys,
    rhs: jax.Array,
    *,
    reverse: bool = False,
) -> jax.Array:
    """`A⁻¹ rhs`, or `A⁻ᵀ rhs` with `reverse`, of all rows.

    Args:
      shard: How the rows lie.
      block_ops: Of a backend.
      gathered: Keys.
      rhs: Of the rows of this device `[B,S/C,K,D]`.
      reverse: Solves the transposed system, from the last stripe to the first.

    Returns:
      `[B,S,K,D]`, dtype of the keys.
    """
    stripes = shard.stripes
    n, width, stripe = stripes.count, stripes.width, stripes.width * stripes.shards
    rows = block_ops.keys(gathered.k, gathered.segment_ids)
    columns = block_ops.keys(gathered.k_all, gathered.segment_ids_all)
    inverses = block_ops.inverses(gathered.k_all, gathered.segment_ids_all, stripe)
    block = jnp.arange(n)

    def step(i, carry):
        total, y = carry
        t = n - 1 - i if reverse else i
        before = jnp.clip(t + 1 if reverse else t - 1, 0, n - 1) * stripe
        known = columns.take(before, stripe), take(y, before, stripe, 1)
        # Before the first stripe nothing is known.
        end = jnp.where(i > 0, stripe, 0)
        none = jnp.zeros(n, jnp.int32)
        update = block_ops.product(rows.take(t * width, width), *known, none[:1], end[None])
        residual = take(rhs, t * width, width, 1) - take(total, t * width, width, 1) - update
        later = jnp.where(block < t if reverse else block > t, end, 0)
        # A compiler that may start the gather and go on would else put the update before it.
        residual, later = jax.lax.optimization_barrier((residual, later))
        residual = jax.lax.all_gather(residual, shard.axis, axis=1, tiled=True)
        total = total + block_ops.product(rows, *known, none, later)
        keys = columns.take(t * stripe, stripe)
        y_t = block_ops.solve(keys, inverses, t, residual, reverse=reverse)
        return total, put(y, y_t, t * stripe, 1)

    total = jnp.zeros(rhs.shape, accumulator_dtype(rhs.dtype))
    return jax.lax.fori_loop(0, n, step, (total, jnp.zeros_like(gathered.k_all)))[1]


def solve_gradients(
    shard: ContextShard,
    block_ops: BlockOps,
    gathered: GatheredKeys,
    y_all: jax.Array,
    y_bar: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`k̄` in float32 and `v̄` of this device, from `ȳ` of its rows."""
    stripes = shard.stripes
    v_bar_all = substitute(shard, block_ops, gathered, y_bar, reverse=True)
    y, v_bar = shard.own(y_all), shard.own(v_bar_all)
    rows = block_ops.keys(gathered.k, gathered.segment_ids)
    columns = block_ops.keys(gathered.k_all, gathered.segment_ids_all)
    start = shard.positions()[:: stripes.width]
    none, all_columns = jnp.zeros_like(start), jnp.full_like(start, stripes.size)
    k_bar = _diagonal_gradient(stripes.width, gathered, y, v_bar)
    k_bar += block_ops.key_gradient(gathered.k, rows, v_bar, columns, y_all, none, start)
    k_bar += block_ops.key_gradient(
        gathered.k, rows, y, columns, v_bar_all, start + stripes.width, all_columns
    )
    return k_bar, v_bar


def _diagonal_gradient(
    width: int, gathered: GatheredKeys, y: jax.Array, v_bar: jax.Array
) -> jax.Array:
    """What the diagonal blocks of `width` rows give to `k̄ [B,S/C,K,D]`, in float32.

    Every backend takes it from here: it is b/S of the work.
    """

    def blocks(x):
        return None if x is None else x.reshape(-1, width, *x.shape[2:])

    keys = Keys.of(blocks(gathered.k), blocks(gathered.segment_ids), 1)
    values = (blocks(x).swapaxes(1, 2) for x in (y, v_bar))
    total = diagonal_gradient(jax.lax.Precision.HIGHEST, keys, *values)
    k_hat_bar = rows_first(total, width).reshape(y.shape) / math.sqrt(y.shape[-1])
    return key_gradient(gathered.k.astype(k_hat_bar.dtype), k_hat_bar)
