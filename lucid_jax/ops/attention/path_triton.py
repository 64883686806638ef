"""Softmax attention with PaTH's transitions by the Triton kernels.

XLA carries queries and keys within blocks (`precondition.carry`), and attends there;
`precondition.carry_triton` carries them to every level, and kernels add the blocks before. Memory
that grows as S·log₂(S/R) is that of queries too.
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
from lucid_jax.ops.precondition.carry import Blocks
from lucid_jax.ops.precondition.carry_triton import PullBack, carry, invert_unit_lower
from lucid_jax.ops.precondition.gram import Keys
from lucid_jax.ops.precondition.triton_schedule import Schedule as SolveSchedule
from lucid_jax.ops.transitions import Transitions
from pallas_kernels.triton.path_attention import (
    attend_levels,
    level_key_gradient,
    level_query_gradient,
)


class _InBlocks(NamedTuple):
    """Queries, keys and scores within blocks, by XLA, in the accumulator dtype.

    Attributes:
      q: Queries at the starts of their blocks, `[B,H,N,R,D]`.
      k: Keys at the ends of their blocks, `[B,K,N,R,D]`.
      tree: `Blocks.tree`.
      scores: The scores within blocks `[B,K,G,N,R,R]`, meaningful on and below the diagonal.
    """

    q: jax.Array
    k: jax.Array
    tree: list[jax.Array]
    scores: jax.Array

    @classmethod
    def split(cls, block: int, q: jax.Array, k: jax.Array, transitions: Transitions) -> Self:
        """Splits queries `[B,S,H,D]` and keys `[B,S,K,D]` into blocks of so many tokens."""
        dtype = accumulator_dtype(q.dtype)
        blocks = Blocks.split(k.astype(dtype), transitions, block, block, invert_unit_lower)
        q_blocks = _blocks(q.astype(dtype), block, k.shape[2])
        rows, scores = jax.tree.map(lambda x: x[:, :, None], blocks).rows(q_blocks)
        rows = rows.reshape(rows.shape[0], -1, *rows.shape[3:])
        return cls(rows, blocks.columns(), blocks.tree(), scores)


class _Operands(NamedTuple):
    """The arguments of the kernels, and the mask of XLA's part.

    Attributes:
      q: Queries at every level, `[L·B,H,S',W]` in their dtype.
      k: Keys at every level, `[L·B,K,S',W]`.
      segment_ids: int32 `[B,S']`, or None.
      mask: Which pairs within blocks are visible, bool `[B,1,1,N,R,R]`.
      pull_back: Take the cotangents of queries and of keys.
    """

    q: jax.Array
    k: jax.Array
    segment_ids: jax.Array | None
    mask: jax.Array
    pull_back: tuple[PullBack, PullBack]

    @classmethod
    def carry(
        cls, blocks: _InBlocks, segment_ids: jax.Array | None, dtype: jax.typing.DTypeLike
    ) -> Self:
        """Carries queries and keys to every level; ids are `[B,S]`."""
        q, pull_back_q = carry(blocks.q, None, blocks.tree, dtype)
        k, pull_back_k = carry(None, blocks.k, blocks.tree, dtype)
        block = blocks.scores.shape[-1]
        mask = jnp.tril(jnp.ones((1, 1, 1, 1, block, block), bool))
        if segment_ids is not None:
            segment_ids = pad_segments(segment_ids, block)
            ids = segment_ids.reshape(-1, block)
            shape = segment_ids.shape[0], 1, 1, -1, block, block
            mask &= same_segment(ids, ids).reshape(shape)
        return cls(q, k, segment_ids, mask, (pull_back_q, pull_back_k))

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
    blocks = _InBlocks.split(block, q, k, transitions)
    operands = _Operands.carry(blocks, segment_ids, q.dtype)
    scores = jnp.where(operands.mask, blocks.scores, -jnp.inf)
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
    split = functools.partial(_InBlocks.split, block)
    blocks, pull_back = jax.vjp(split, q, k, transitions)
    operands = _Operands.carry(blocks, segment_ids, q.dtype)
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
        x.reshape(*blocks.scores.shape[:-1])[..., None] for x in (*sums, delta)
    )
    exponents = jnp.where(operands.mask, scale * (blocks.scores - largest), -jnp.inf)
    weights = jnp.exp(exponents) * inverse
    o_bar_blocks, precision = _blocks(o_bar, block, kv_heads), kernel_precision(q.dtype)
    weights_bar = product("bkgnrd,bkncd->bkgnrc", o_bar_blocks, _blocks(v, block), precision)
    scores_bar = scale * weights * (weights_bar - delta)
    v_bar_own = product("bkgnrc,bkgnrd->bkncd", weights, o_bar_blocks, precision)
    v_bar += rows_first(v_bar_own.reshape(*v_bar_own.shape[:2], -1, d), v.shape[1])

    pull_back_q, pull_back_k = operands.pull_back
    rows_bar, _, tree_bar = pull_back_q(q_bar)
    _, columns_bar, keys_tree_bar = pull_back_k(k_bar)
    tree_bar = jax.tree.map(jnp.add, tree_bar, keys_tree_bar)
    q_bar, k_bar, transitions_bar = pull_back(
        _InBlocks(rows_bar, columns_bar, tree_bar, scores_bar)
    )
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
