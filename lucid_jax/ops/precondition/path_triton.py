"""The solve of LUCID-PaTH by the Triton kernels.

XLA carries the keys to every level (`carry`) and makes the diagonal blocks. The kernel of the plain
solve then takes its tiles from the level of their blocks, and another kernel adds up the gradient
of the carried keys.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from lucid_jax.ops import target
from lucid_jax.ops.blocks import heads_first, pad_axis
from lucid_jax.ops.documents import pad_segments
from lucid_jax.ops.numerics import kernel_precision, product
from lucid_jax.ops.precondition import triton
from lucid_jax.ops.precondition.carry import carry_keys
from lucid_jax.ops.precondition.gram import Keys, diagonal_blocks, invert_unit_lower
from lucid_jax.ops.precondition.triton_schedule import Schedule
from lucid_jax.ops.transitions import Transitions
from pallas_kernels.bf16_split import bf16_split
from pallas_kernels.scaling import key_scale
from pallas_kernels.triton.level_gradient import level_gradient
from pallas_kernels.triton.parts import width


class _Operands(NamedTuple):
    """The arguments of the kernels, and the blocks that the inverses are of.

    Attributes:
      keys: `k̃ [L·B,K,S',W]` in the dtype of the keys, and padded segment ids.
      diagonal: The diagonal blocks of `A`, strictly lower, float32 `[B,K,N,R,R]`.
      inverses: `[B,K,N,T,R,R]`, as in `solve`.
    """

    keys: Keys
    diagonal: jax.Array
    inverses: jax.Array

    @classmethod
    def from_carried(
        cls,
        carried: jax.Array,
        scores: jax.Array,
        segment_ids: jax.Array | None,
        dtype: jax.typing.DTypeLike,
    ) -> Self:
        """Makes the operands from the results of `carry_keys` and ids `[B,S]`."""
        d = carried.shape[-1]
        k_hat = (carried * key_scale(d)).astype(dtype).reshape(-1, *carried.shape[2:])
        k_hat = pad_axis(k_hat, 3, width(d))
        if segment_ids is not None:
            segment_ids = pad_segments(segment_ids, carried.shape[3])
        diagonal = diagonal_blocks(scores, d, segment_ids)
        inverses = invert_unit_lower(diagonal)
        terms = [inverses] if dtype == jnp.float32 else bf16_split(inverses, 2)
        return cls(Keys(k_hat, segment_ids), diagonal, jnp.stack(terms, 3))


def solve(
    k: jax.Array, rhs: jax.Array, segment_ids: jax.Array | None, transitions: Transitions
) -> jax.Array:
    """Solves `A y = rhs` in the dtype of `k`, tokens sorted by segment."""
    schedule = _schedule(k)
    carried = carry_keys(k, transitions, schedule.solve.rows, schedule.multiple)
    operands = _Operands.from_carried(*carried, segment_ids, k.dtype)
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
    rows, multiple = schedule.solve.rows, schedule.multiple
    carry = functools.partial(carry_keys, rows=rows, columns=multiple)
    carried, pull_back = jax.vjp(carry, k, transitions)
    operands = _Operands.from_carried(*carried, segment_ids, k.dtype)
    keys = operands.keys
    v_bar = _solve(schedule, operands, y_bar, reverse=True)
    carried_bar = level_gradient(
        keys.k_hat, y, v_bar, keys.segment_ids,
        *triton.column_limits(keys, schedule.gradient.rows),
        block=rows, tiles=schedule.gradient, interpret=triton.INTERPRET,
    )[..., : k.shape[-1]].reshape(carried[0].shape)  # fmt: skip
    v_blocks, y_blocks = (
        heads_first(x, multiple).reshape(*operands.diagonal.shape[:4], -1) for x in (v_bar, y)
    )
    precision = kernel_precision(k.dtype)
    weight = product("bknrd,bkncd->bknrc", v_blocks, y_blocks, precision)
    scores_bar = -operands.diagonal * weight / math.sqrt(k.shape[-1])
    k_bar, transitions_bar = pull_back((carried_bar, scores_bar))
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
