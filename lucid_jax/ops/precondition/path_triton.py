"""The solve of LUCID-PaTH by the Triton kernels.

XLA makes the diagonal blocks and carries the keys within blocks (`carry`); `carry_triton` carries
them to every level. The kernel of the plain solve takes its tiles from the level of their blocks,
and another kernel adds up the gradient of the carried keys.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from lucid_jax.ops import target
from lucid_jax.ops.blocks import heads_first
from lucid_jax.ops.documents import pad_segments
from lucid_jax.ops.numerics import kernel_precision, product
from lucid_jax.ops.precondition import triton
from lucid_jax.ops.precondition.carry import Blocks
from lucid_jax.ops.precondition.carry_triton import PullBack, carry, invert_unit_lower
from lucid_jax.ops.precondition.gram import Keys, diagonal_blocks, normalize_keys
from lucid_jax.ops.precondition.triton_schedule import Schedule
from lucid_jax.ops.transitions import Transitions
from pallas_kernels.bf16_split import bf16_split
from pallas_kernels.scaling import key_scale
from pallas_kernels.triton.level_gradient import level_gradient


class _InBlocks(NamedTuple):
    """Keys and scores within blocks, by XLA, in the accumulator dtype.

    Attributes:
      rows: Keys at the starts of their blocks, `[B,K,N,R,D]`.
      columns: Keys at their ends, `[B,K,N,R,D]`.
      tree: `Blocks.tree`.
      scores: The scores within blocks, `[B,K,N,R,R]`.
    """

    rows: jax.Array
    columns: jax.Array
    tree: list[jax.Array]
    scores: jax.Array

    @classmethod
    def split(cls, schedule: Schedule, k: jax.Array, transitions: Transitions) -> Self:
        """Normalises keys `[B,S,K,D]` and splits them into blocks."""
        rows, columns = schedule.solve.rows, schedule.multiple
        k_hat = normalize_keys(k)
        blocks = Blocks.split(k_hat, transitions, rows, columns, invert_unit_lower)
        back, scores = blocks.rows(blocks.k)
        return cls(back, blocks.columns(), blocks.tree(), scores)


class _Operands(NamedTuple):
    """The arguments of the kernels, and the blocks that the inverses are of.

    Attributes:
      keys: `k̃` at every level, `[L·B,K,S',W]`, and padded segment ids.
      pull_back: Takes the cotangent of the keys before they were scaled.
      diagonal: The diagonal blocks of `A`, strictly lower, float32 `[B,K,N,R,R]`.
      inverses: `[B,K,N,T,R,R]`, as in `solve`.
    """

    keys: Keys
    pull_back: PullBack
    diagonal: jax.Array
    inverses: jax.Array

    @classmethod
    def carry(
        cls, blocks: _InBlocks, segment_ids: jax.Array | None, dtype: jax.typing.DTypeLike
    ) -> Self:
        """Carries the keys to every level; ids are `[B,S]`."""
        n, r, d = blocks.rows.shape[2:]
        k_hat, pull_back = carry(blocks.rows, blocks.columns, blocks.tree, dtype, key_scale(d))
        if segment_ids is not None:
            segment_ids = pad_segments(segment_ids, n * r)
        diagonal = diagonal_blocks(blocks.scores, d, segment_ids)
        inverses = invert_unit_lower(diagonal)
        terms = [inverses] if dtype == jnp.float32 else bf16_split(inverses, 2)
        return cls(Keys(k_hat, segment_ids), pull_back, diagonal, jnp.stack(terms, 3))


def solve(
    k: jax.Array, rhs: jax.Array, segment_ids: jax.Array | None, transitions: Transitions
) -> jax.Array:
    """Solves `A y = rhs` in the dtype of `k`, tokens sorted by segment."""
    schedule = _schedule(k)
    blocks = _InBlocks.split(schedule, k, transitions)
    operands = _Operands.carry(blocks, segment_ids, k.dtype)
    return _solve(schedule, operands, rhs)


def solve_transposed(
    k: jax.Array,
    y: jax.Array,
    segment_ids: jax.Array | None,
    y_bar: jax.Array,
    transitions: Transitions,
) -> tuple[jax.Array, jax.Array, Transitions]:
    """Returns the cotangents of `k`, of the right-hand sides and of the transitions."""
    schedule = _schedule(k)
    split = functools.partial(_InBlocks.split, schedule)
    blocks, pull_back = jax.vjp(split, k, transitions)
    operands = _Operands.carry(blocks, segment_ids, k.dtype)
    keys = operands.keys
    v_bar = _solve(schedule, operands, y_bar, reverse=True)
    carried_bar = level_gradient(
        keys.k_hat, y, v_bar, keys.segment_ids,
        *triton.column_limits(keys, schedule.gradient.rows),
        block=schedule.solve.rows, tiles=schedule.gradient, interpret=triton.INTERPRET,
    )  # fmt: skip
    v_blocks, y_blocks = (
        heads_first(x, schedule.multiple).reshape(blocks.rows.shape) for x in (v_bar, y)
    )
    precision = kernel_precision(k.dtype)
    weight = product("bknrd,bkncd->bknrc", v_blocks, y_blocks, precision)
    scores_bar = -operands.diagonal * weight / math.sqrt(k.shape[-1])
    blocks_bar = _InBlocks(*operands.pull_back(carried_bar), scores_bar)
    k_bar, transitions_bar = pull_back(blocks_bar)
    return k_bar, v_bar, transitions_bar


def _schedule(k: jax.Array) -> Schedule:
    """Returns tiles within the blocks of the levels, which are those of the solve.

    The keys of the rows are loaded with each tile, so that fewer tiles in flight fit.
    """
    found = Schedule.choose(target.device_kind(), k.dtype, *k.shape)
    solve, transposed = (
        dataclasses.replace(x, stages=min(x.stages, 3)) for x in (found.solve, found.transposed)
    )
    gradient = found.gradient if found.gradient.rows <= solve.rows else transposed
    return Schedule(solve, transposed, found.product, gradient)


def _solve(schedule: Schedule, operands: _Operands, rhs: jax.Array, **options) -> jax.Array:
    backend = triton.TritonBackend(schedule, interpret=triton.INTERPRET)
    return backend.solve(schedule, operands.keys, operands.inverses, rhs, **options)[0]
