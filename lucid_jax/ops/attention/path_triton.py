"""Softmax attention with PaTH's transitions by the Triton kernels.

XLA carries queries and keys to every level (`precondition.carry`) and attends within blocks; the
kernels add the blocks before. Memory that grows as S·log₂(S/R) is that of queries too.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from lucid_jax.ops import target
from lucid_jax.ops.attention.triton import Schedule
from lucid_jax.ops.blocks import heads_first, pad_axis, rows_first, same_segment
from lucid_jax.ops.documents import pad_segments
from lucid_jax.ops.numerics import accumulator_dtype, kernel_precision, product
from lucid_jax.ops.precondition import triton
from lucid_jax.ops.precondition.carry import Blocks, at_levels, full_product, has_bit, num_levels
from lucid_jax.ops.precondition.gram import Keys
from lucid_jax.ops.precondition.triton_schedule import Schedule as SolveSchedule
from lucid_jax.ops.transitions import Transitions
from pallas_kernels.triton.parts import width
from pallas_kernels.triton.path_attention import (
    attend_levels,
    level_key_gradient,
    level_query_gradient,
)


class _Carried(NamedTuple):
    """Queries and keys of every level, and the scores within blocks, in the accumulator dtype.

    Attributes:
      q: `[L,B,H,S',D]`.
      k: `[L,B,K,S',D]`.
      scores: `[B,K,G,N,R,R]`, meaningful on and below the diagonal.
    """

    q: jax.Array
    k: jax.Array
    scores: jax.Array

    @classmethod
    def carry(cls, block: int, q: jax.Array, k: jax.Array, transitions: Transitions) -> Self:
        """Carries queries `[B,S,H,D]` and keys `[B,S,K,D]` in blocks of so many tokens."""
        dtype = accumulator_dtype(q.dtype)
        blocks = Blocks.split(k.astype(dtype), transitions, block, block)
        q_blocks = _blocks(q.astype(dtype), block, k.shape[2])
        rows, scores = jax.tree.map(lambda x: x[:, :, None], blocks).rows(q_blocks)
        b, kv_heads, group, n, r, d = rows.shape
        levels = [
            full_product(
                "bkgnrd,bknde->bkgnre",
                jnp.where(has_bit(n, level)[:, None, None], rows, 0),
                blocks.carries[:, :, :, level],
            ).reshape(b, kv_heads * group, n * r, d)
            for level in range(num_levels(n))
        ]
        return cls(jnp.stack(levels), at_levels(blocks, None), scores)


class _Operands(NamedTuple):
    """The arguments of the kernels, and the mask of XLA's part.

    Attributes:
      q: Queries `[L·B,H,S',W]` in the dtype of the queries.
      k: Keys `[L·B,K,S',W]`.
      segment_ids: int32 `[B,S']`, or None.
      mask: Which pairs within blocks are visible, bool `[B,1,1,N,R,R]`.
    """

    q: jax.Array
    k: jax.Array
    segment_ids: jax.Array | None
    mask: jax.Array

    @classmethod
    def from_carried(
        cls, carried: _Carried, segment_ids: jax.Array | None, dtype: jax.typing.DTypeLike
    ) -> Self:
        """Makes the operands from ids `[B,S]`."""

        def planes(x):
            x = x.astype(dtype).reshape(-1, *x.shape[2:])
            return pad_axis(x, 3, width(x.shape[3]))

        block = carried.scores.shape[-1]
        mask = jnp.tril(jnp.ones((1, 1, 1, 1, block, block), bool))
        if segment_ids is not None:
            segment_ids = pad_segments(segment_ids, block)
            ids = segment_ids.reshape(-1, block)
            shape = segment_ids.shape[0], 1, 1, -1, block, block
            mask &= same_segment(ids, ids).reshape(shape)
        return cls(planes(carried.q), planes(carried.k), segment_ids, mask)

    def limits(self, rows: int) -> tuple[jax.Array | None, jax.Array | None]:
        """Returns the bounds of the tokens that share a segment with blocks of `rows` tokens."""
        return triton.column_limits(Keys(self.k, self.segment_ids), rows)


def forward(
    scale: float,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    transitions: Transitions,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `o`, the largest score of each query and one over its norm `[B,H,S']`.

    The arguments are those of the public op, sorted by segment.
    """
    block, schedule = _schedule(q, k)
    tiles = schedule.forward
    carried = _Carried.carry(block, q, k, transitions)
    operands = _Operands.from_carried(carried, segment_ids, q.dtype)
    scores = jnp.where(operands.mask, carried.scores, -jnp.inf)
    largest = scores.max(-1)
    weights = jnp.exp(scale * (scores - largest[..., None]))
    total = product("bkgnrc,bkncd->bkgnrd", weights, _blocks(v, block), kernel_precision(q.dtype))
    total = pad_axis(_sequences(total), 3, operands.q.shape[3])
    return attend_levels(
        operands.q, operands.k, v, operands.segment_ids, operands.limits(tiles.rows)[0],
        total, _sequences(largest), _sequences(weights.sum(-1)),
        scale=scale, block=block, tiles=tiles, interpret=triton.INTERPRET,
    )  # fmt: skip


def backward(
    scale: float,
    sums: tuple[jax.Array, jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    transitions: Transitions,
    o: jax.Array,
    o_bar: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, Transitions]:
    """Returns the cotangents of `q`, `k`, `v` and the transitions, in their dtypes.

    `sums` are the largest scores and the inverse norms.
    """
    block, schedule = _schedule(q, k)
    kv_heads, d, dtype = k.shape[2], k.shape[3], accumulator_dtype(q.dtype)
    carry = functools.partial(_Carried.carry, block)
    carried, pull_back = jax.vjp(carry, q, k, transitions)
    operands = _Operands.from_carried(carried, segment_ids, q.dtype)
    delta = jnp.sum(o.astype(dtype) * o_bar.astype(dtype), -1, keepdims=True)
    delta = heads_first(delta, block)[..., 0]
    arrays = operands.q, operands.k, v, operands.segment_ids
    options: dict[str, Any] = {"scale": scale, "block": block, "interpret": triton.INTERPRET}
    queries, keys = schedule.queries, schedule.keys
    q_bar = level_query_gradient(
        *arrays, operands.limits(queries.rows)[0], o_bar, *sums, delta, tiles=queries, **options
    )
    k_bar, v_bar = level_key_gradient(
        *arrays, operands.limits(keys.rows)[1], o_bar, *sums, delta, tiles=keys, **options
    )

    largest, inverse, delta = (
        x.reshape(*carried.scores.shape[:-1])[..., None] for x in (*sums, delta)
    )
    exponents = jnp.where(operands.mask, scale * (carried.scores - largest), -jnp.inf)
    weights = jnp.exp(exponents) * inverse
    o_bar_blocks, precision = _blocks(o_bar, block, kv_heads), kernel_precision(q.dtype)
    weights_bar = product("bkgnrd,bkncd->bkgnrc", o_bar_blocks, _blocks(v, block), precision)
    scores_bar = scale * weights * (weights_bar - delta)
    v_bar_own = product("bkgnrc,bkgnrd->bkncd", weights, o_bar_blocks, precision)
    v_bar += rows_first(v_bar_own.reshape(*v_bar_own.shape[:2], -1, d), v.shape[1])

    cotangents = (
        x[..., :d].reshape(like.shape) for x, like in ((q_bar, carried.q), (k_bar, carried.k))
    )
    carried_bar = _Carried(next(cotangents), next(cotangents), scores_bar)
    q_bar, k_bar, transitions_bar = pull_back(carried_bar)
    return q_bar, k_bar, v_bar.astype(v.dtype), transitions_bar


def _schedule(q: jax.Array, k: jax.Array) -> tuple[int, Schedule]:
    """Returns the rows of a block, and tiles that fit into one.

    Blocks are those of the solve, so that in LUCID-PaTH the compiler computes what depends on the
    transitions alone once.
    """
    device = target.device_kind()
    block = SolveSchedule.choose(device, k.dtype, *k.shape).solve.rows
    found = Schedule.choose(device, q)
    fitting = (
        x if x.rows <= block else dataclasses.replace(x, rows=block, warps=4)
        for x in (found.forward, found.queries, found.keys)
    )
    return block, Schedule(*fitting)


def _blocks(x: jax.Array, block: int, kv_heads: int | None = None) -> jax.Array:
    """Turns `[B,S,H,D]` into `[B,K,G,N,R,D]`, or `[B,S,K,D]` into `[B,K,N,R,D]`."""
    x = heads_first(x, block)
    heads = (x.shape[1],) if kv_heads is None else (kv_heads, x.shape[1] // kv_heads)
    return x.reshape(x.shape[0], *heads, -1, block, x.shape[3])


def _sequences(x: jax.Array) -> jax.Array:
    """Turns `[B,K,G,N,R,…]` into `[B,H,S',…]`."""
    b, kv_heads, group, n, r, *rest = x.shape
    return x.reshape(b, kv_heads * group, n * r, *rest)
