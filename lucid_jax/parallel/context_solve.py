"""The solve of rows that are spread over devices, and its gradient; see `context_attention`."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import put, rows_first, take
from lucid_jax.ops.precondition.block_ops import Pieces
from lucid_jax.ops.precondition.gram import Keys, accumulator_dtype, key_gradient
from lucid_jax.ops.precondition.xla import diagonal_gradient
from lucid_jax.parallel.context_shard import Spread


class Sides(NamedTuple):
    """Keys and segment ids of this device, and of all."""

    k: jax.Array
    segment_ids: jax.Array | None
    k_all: jax.Array
    segment_ids_all: jax.Array | None

    @classmethod
    def of(cls, spread: Spread, k: jax.Array, segment_ids: jax.Array | None) -> Sides:
        """Gathers those of all."""
        ids = None if segment_ids is None else spread.gather(segment_ids)
        return cls(k, segment_ids, spread.gather(k), ids)


def substitute(
    spread: Spread, pieces: Pieces, sides: Sides, rhs: jax.Array, *, reverse: bool = False
) -> jax.Array:
    """`A⁻¹ rhs`, or `A⁻ᵀ rhs` with `reverse`, of all rows.

    Args:
      spread: How the rows lie.
      pieces: Of a backend.
      sides: Keys.
      rhs: Of the rows of this device `[B,S/C,K,D]`.
      reverse: Solves the transposed system, from the last stripe to the first.

    Returns:
      `[B,S,K,D]`, dtype of the keys.
    """
    stripes = spread.stripes
    n, width, stripe = stripes.count, stripes.width, stripes.width * stripes.shards
    rows = pieces.keys(sides.k, sides.segment_ids)
    columns = pieces.keys(sides.k_all, sides.segment_ids_all)
    inverses = pieces.inverses(sides.k_all, sides.segment_ids_all, stripe)
    block = jnp.arange(n)

    def step(i, carry):
        total, y = carry
        t = n - 1 - i if reverse else i
        before = jnp.clip(t + 1 if reverse else t - 1, 0, n - 1) * stripe
        known = columns.take(before, stripe), take(y, before, stripe, 1)
        # Before the first stripe nothing is known.
        end = jnp.where(i > 0, stripe, 0)
        none = jnp.zeros(n, jnp.int32)
        update = pieces.product(rows.take(t * width, width), *known, none[:1], end[None])
        residual = take(rhs, t * width, width, 1) - take(total, t * width, width, 1) - update
        later = jnp.where(block < t if reverse else block > t, end, 0)
        # A compiler that may start the gather and go on would else put the update before it.
        residual, later = jax.lax.optimization_barrier((residual, later))
        residual = jax.lax.all_gather(residual, spread.axis, axis=1, tiled=True)
        total = total + pieces.product(rows, *known, none, later)
        keys = columns.take(t * stripe, stripe)
        y_t = pieces.solve(keys, inverses, t, residual, reverse=reverse)
        return total, put(y, y_t, t * stripe, 1)

    total = jnp.zeros(rhs.shape, accumulator_dtype(rhs.dtype))
    return jax.lax.fori_loop(0, n, step, (total, jnp.zeros_like(sides.k_all)))[1]


def solve_gradients(
    spread: Spread, pieces: Pieces, sides: Sides, y_all: jax.Array, y_bar: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`k̄` in float32 and `v̄` of this device, from `ȳ` of its rows."""
    stripes = spread.stripes
    v_bar_all = substitute(spread, pieces, sides, y_bar, reverse=True)
    y, v_bar = spread.own(y_all), spread.own(v_bar_all)
    rows = pieces.keys(sides.k, sides.segment_ids)
    columns = pieces.keys(sides.k_all, sides.segment_ids_all)
    start = spread.positions()[:: stripes.width]
    none, all_columns = jnp.zeros_like(start), jnp.full_like(start, stripes.size)
    k_bar = _diagonal_gradient(stripes.width, sides, y, v_bar)
    k_bar += pieces.key_gradient(sides.k, rows, v_bar, columns, y_all, none, start)
    k_bar += pieces.key_gradient(
        sides.k, rows, y, columns, v_bar_all, start + stripes.width, all_columns
    )
    return k_bar, v_bar


def _diagonal_gradient(width: int, sides: Sides, y: jax.Array, v_bar: jax.Array) -> jax.Array:
    """What the diagonal blocks of `width` rows give to `k̄ [B,S/C,K,D]`, in float32.

    Every backend takes it from here: it is b/S of the work.
    """

    def blocks(x):
        return None if x is None else x.reshape(-1, width, *x.shape[2:])

    keys = Keys.of(blocks(sides.k), blocks(sides.segment_ids), 1)
    values = (blocks(x).swapaxes(1, 2) for x in (y, v_bar))
    total = diagonal_gradient(jax.lax.Precision.HIGHEST, keys, *values)
    k_hat_bar = rows_first(total, width).reshape(y.shape) / math.sqrt(y.shape[-1])
    return key_gradient(sides.k.astype(k_hat_bar.dtype), k_hat_bar)
