"""The solve of sequences that are sharded over devices, and its gradient.

`context_attention` describes the algorithm and what it sends.
"""

import math
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import ColumnRanges, put, rows_first, take
from lucid_jax.ops.numerics import accumulator_dtype
from lucid_jax.ops.precondition.backend import Backend
from lucid_jax.ops.precondition.gram import Keys, key_gradient
from lucid_jax.ops.precondition.xla import diagonal_gradient
from lucid_jax.parallel.context_shard import ContextShard


class GatheredKeys(NamedTuple):
    """Keys and segment ids of this device's tokens, and of all tokens, and β of all tokens."""

    k: jax.Array
    segment_ids: jax.Array | None
    k_all: jax.Array
    segment_ids_all: jax.Array | None
    beta_all: jax.Array | None

    @classmethod
    def gather(
        cls,
        shard: ContextShard,
        k: jax.Array,
        segment_ids: jax.Array | None,
        beta: jax.Array | None = None,
    ) -> Self:
        """Gathers the keys, segment ids and β of all devices."""
        ids, beta_all = (None if x is None else shard.gather(x) for x in (segment_ids, beta))
        return cls(k, segment_ids, shard.gather(k), ids, beta_all)


def solve(
    shard: ContextShard,
    backend: Backend,
    keys: GatheredKeys,
    rhs: jax.Array,
    *,
    reverse: bool = False,
) -> jax.Array:
    """Solves `A y = rhs` for all tokens, stripe by stripe.

    Args:
      rhs: The right-hand sides of this device's tokens `[B,S/C,K,D]`.
      reverse: Whether to solve the transposed system, from the last stripe to the first.

    Returns:
      `y [B,S,K,D]` of all tokens, dtype of the keys.
    """
    stripes = shard.stripes
    n, width, stripe = stripes.count, stripes.width, stripes.width * stripes.shards
    rows = backend.keys(keys.k, keys.segment_ids)
    columns = backend.keys(keys.k_all, keys.segment_ids_all, keys.beta_all)
    inverses = backend.inverses(keys.k_all, keys.segment_ids_all, stripe, keys.beta_all)
    block = jnp.arange(n)

    def step(i, carry):
        total, y = carry
        t = n - 1 - i if reverse else i
        before = jnp.clip(t + 1 if reverse else t - 1, 0, n - 1) * stripe
        known = columns.take(before, stripe), take(y, before, stripe, 1)
        # Nothing is known before the first stripe.
        end = jnp.where(i > 0, stripe, 0)
        zero = jnp.zeros(n, jnp.int32)
        own = rows.take(t * width, width)
        update = backend.product(own, *known, ColumnRanges(zero[:1], end[None]))
        residual = take(rhs, t * width, width, 1) - take(total, t * width, width, 1) - update
        later = jnp.where(block < t if reverse else block > t, end, 0)
        # Without the barrier a compiler may move the gather behind the update that hides it.
        residual, later = jax.lax.optimization_barrier((residual, later))
        residual = jax.lax.all_gather(residual, shard.axis, axis=1, tiled=True)
        total = total + backend.product(rows, *known, ColumnRanges(zero, later))
        stripe_keys = columns.take(t * stripe, stripe)
        y_t = backend.solve_stripe(stripe_keys, inverses, t, residual, reverse=reverse)
        return total, put(y, y_t, t * stripe, 1)

    total = jnp.zeros(rhs.shape, accumulator_dtype(rhs.dtype))
    return jax.lax.fori_loop(0, n, step, (total, jnp.zeros_like(keys.k_all)))[1]


def solve_gradients(
    shard: ContextShard, backend: Backend, keys: GatheredKeys, y_all: jax.Array, y_bar: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns `k̄` in float32 and `v̄` of this device's tokens, from their `ȳ`."""
    stripes = shard.stripes
    v_bar_all = solve(shard, backend, keys, y_bar, reverse=True)
    y, v_bar = shard.own(y_all), shard.own(v_bar_all)
    rows = backend.keys(keys.k, keys.segment_ids)
    columns = backend.keys(keys.k_all, keys.segment_ids_all)
    start = shard.positions()[:: stripes.width]
    before = ColumnRanges(jnp.zeros_like(start), start)
    after = ColumnRanges(start + stripes.width, jnp.full_like(start, stripes.size))
    k_bar = _diagonal_gradient(stripes.width, keys, y, v_bar)
    k_bar += backend.cross_gradient(keys.k, rows, v_bar, columns, y_all, before)
    k_bar += backend.cross_gradient(keys.k, rows, y, columns, v_bar_all, after)
    return k_bar, v_bar


def _diagonal_gradient(width: int, keys: GatheredKeys, y: jax.Array, v_bar: jax.Array) -> jax.Array:
    """Returns the share of the diagonal blocks of `width` rows in `k̄ [B,S/C,K,D]`, in float32.

    It is b/S of the work, so all backends share this XLA implementation.
    """

    def blocks(x):
        return None if x is None else x.reshape(-1, width, *x.shape[2:])

    block_keys = Keys.normalize(blocks(keys.k), blocks(keys.segment_ids), 1)
    values = (blocks(x).swapaxes(1, 2) for x in (y, v_bar))
    total = diagonal_gradient(jax.lax.Precision.HIGHEST, block_keys, *values)
    k_hat_bar = rows_first(total, width).reshape(y.shape) / math.sqrt(y.shape[-1])
    return key_gradient(keys.k.astype(k_hat_bar.dtype), k_hat_bar)
