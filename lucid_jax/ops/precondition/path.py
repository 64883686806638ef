"""The blockwise solve of `xla` for LUCID-PaTH, whose keys are carried through transitions.

The sweeps are those of `xla`. A tile of `A` off the diagonal is a product of keys that were carried
to one point between its rows and columns (`carry`); a diagonal block is the exponential of scores
within the block. JAX differentiates what carries the keys, and the backward pass computes it again,
so that only the arguments and `y` are saved.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import (
    add,
    heads_first,
    panel_bounds,
    put,
    rows_first,
    same_segment,
    take,
)
from lucid_jax.ops.documents import pad_segments
from lucid_jax.ops.numerics import accumulator_dtype, ceil_div, product
from lucid_jax.ops.precondition.carry import (
    Blocks,
    add_at,
    at_levels,
    by_segment,
    full_product,
    take_at,
    visit_earlier,
    visit_later,
)
from lucid_jax.ops.precondition.gram import Keys, gram_tile, invert_unit_lower, normalize_keys
from lucid_jax.ops.precondition.xla import Tiles
from lucid_jax.ops.transitions import Transitions


class _Gram(NamedTuple):
    """The tiles of `A`, R rows against C columns.

    Attributes:
      keys: Carried keys `[L,B,K,S',D]` in the compute dtype.
      segment_ids: int32 `[B,S']`, or None.
      diagonal: The blocks of A on its diagonal, strictly lower, `[B,K,N,R,R]` in the accumulator
        dtype.
      first: The first panel of each block of rows: int32 `[N]`.
      end: One past the last.
    """

    keys: jax.Array
    segment_ids: jax.Array | None
    diagonal: jax.Array
    first: jax.Array
    end: jax.Array

    @classmethod
    def from_scores(
        cls, columns: int, keys: jax.Array, scores: jax.Array, segment_ids: jax.Array | None
    ) -> _Gram:
        """Makes the tiles from carried keys and the scores within blocks `[B,K,N,R,R]`."""
        rows, length, root = scores.shape[-1], keys.shape[-2], math.sqrt(keys.shape[-1])
        diagonal = jnp.tril(jnp.exp(scores / root - root), -1)
        if segment_ids is not None:
            segment_ids = pad_segments(segment_ids, columns)
            ids = segment_ids.reshape(-1, rows)
            mask = same_segment(ids, ids).reshape(keys.shape[1], 1, -1, rows, rows)
            diagonal = jnp.where(mask, diagonal, 0)
        bounds = panel_bounds(
            segment_ids, segment_ids, rows, columns, num_rows=length, num_columns=length
        )
        return cls(keys, segment_ids, diagonal, *bounds)

    def take(self, level: jax.Array, start: jax.Array, size: int) -> Keys:
        """Returns `size` keys of a level from `start`."""
        ids = self.segment_ids
        ids = None if ids is None else take(ids, start, size, 1)
        return Keys(take_at(self.keys, level, start, size), ids)


def _carry_keys(tiles: Tiles, k: jax.Array, transitions: Transitions) -> tuple:
    """Returns carried keys `[L,B,K,S',D]` and the scores in blocks, in the accumulator dtype."""
    blocks = Blocks.split(normalize_keys(k), transitions, tiles.rows, tiles.columns)
    back, scores = blocks.rows(blocks.k)
    return at_levels(blocks, back), scores


@dataclasses.dataclass(frozen=True)
class XlaPathBackend:
    """The two methods of `backend.Backend` that solve whole sequences, with transitions.

    Attributes:
      precision: Precision of products.
    """

    isolated: ClassVar[bool] = True

    precision: jax.lax.Precision | None = None

    @classmethod
    def for_sequences(cls, k: jax.Array, precision: jax.lax.Precision | None) -> XlaPathBackend:
        """Makes the backend."""
        return cls(precision)

    def forward(
        self,
        k: jax.Array,
        rhs: jax.Array,
        segment_ids: jax.Array | None,
        transitions: Transitions,
    ) -> jax.Array:
        """Solves `A y = rhs`, in the dtype of `k`."""
        sort, restore = by_segment(segment_ids)
        arguments = jax.tree.map(sort, (k, rhs, segment_ids, transitions))
        return restore(_solve(self.precision, Tiles.for_sequence(k.shape[1]), *arguments))

    def backward(
        self,
        k: jax.Array,
        y: jax.Array,
        segment_ids: jax.Array | None,
        y_bar: jax.Array,
        transitions: Transitions,
    ) -> tuple[jax.Array, jax.Array, Transitions]:
        """Returns `k̄`, `v̄` and the cotangents of the transitions, in the dtype of `k`."""
        sort, restore = by_segment(segment_ids)
        arguments = jax.tree.map(sort, (k, y, segment_ids, y_bar, transitions))
        tiles = Tiles.for_sequence(k.shape[1])
        return jax.tree.map(restore, _solve_transposed(self.precision, tiles, *arguments))


def _solve(precision, tiles: Tiles, k, rhs, segment_ids, transitions) -> jax.Array:
    """Solves by forward substitution."""
    r, c, length = tiles.rows, tiles.columns, k.shape[1]
    keys, scores = _carry_keys(tiles, k, transitions)
    gram = _Gram.from_scores(c, keys.astype(k.dtype), scores, segment_ids)
    inverses = invert_unit_lower(gram.diagonal)
    rhs = heads_first(rhs.astype(accumulator_dtype(rhs.dtype)), c)

    def solve_block(i, y):
        def visit(level, start, width, update):
            block, panel = gram.take(level, i * r, r), gram.take(level, start, width)
            a = gram_tile(block, panel, precision)
            return update + product("bkrc,bkcd->bkrd", a, take(y, start, width), precision)

        rhs_i = take(rhs, i * r, r)
        update = visit_earlier(i, gram.first[i], r, c, visit, jnp.zeros_like(rhs_i))
        return put(y, full_product("bkrs,bksd->bkrd", inverses[:, :, i], rhs_i - update), i * r)

    y = jnp.zeros(rhs.shape, k.dtype)
    return rows_first(jax.lax.fori_loop(0, ceil_div(length, r), solve_block, y), length)


def _solve_transposed(precision, tiles: Tiles, k, y, segment_ids, y_bar, transitions):
    """Solves by backward substitution, and adds up the gradient of the keys in the same sweep."""
    r, c, length = tiles.rows, tiles.columns, k.shape[1]
    n = ceil_div(length, r)
    (keys, scores), pull_back = jax.vjp(functools.partial(_carry_keys, tiles), k, transitions)
    gram = _Gram.from_scores(c, keys.astype(k.dtype), scores, segment_ids)
    inverses = invert_unit_lower(gram.diagonal)
    end = jnp.minimum(gram.end, ceil_div(n * r, c))
    y, y_bar = heads_first(y, c), heads_first(y_bar, c)

    def solve_block(step, carry):
        v_bar, keys_bar = carry
        i = n - 1 - step
        y_i = take(y, i * r, r)

        def visit(level, start, width, carry):
            keys_bar, block_bar, update = carry
            block, panel = gram.take(level, i * r, r), gram.take(level, start, width)
            v_bar_p = take(v_bar, start, width)
            a = gram_tile(block, panel, precision)
            update = update + product("bkrc,bkcd->bkrd", a, v_bar_p, precision)
            w = -a * product("bkrd,bkcd->bkrc", y_i, v_bar_p, precision)
            share = product("bkrc,bkcd->bkrd", w, panel.k_hat, precision)
            panel_bar = product("bkrc,bkrd->bkcd", w, block.k_hat, precision)
            keys_bar = add_at(keys_bar, panel_bar, level, start)
            return keys_bar, block_bar.at[level].add(share), update

        zero = jnp.zeros(y_i.shape, keys_bar.dtype)
        carry = keys_bar, jnp.zeros((keys.shape[0], *zero.shape), zero.dtype), zero
        keys_bar, block_bar, update = visit_later(i, end[i], r, c, visit, carry)
        rhs = take(y_bar, i * r, r).astype(zero.dtype) - update
        v_bar_i = full_product("bksr,bksd->bkrd", inverses[:, :, i], rhs)
        return put(v_bar, v_bar_i, i * r), add(keys_bar, block_bar, i * r)

    v_bar, keys_bar = jax.lax.fori_loop(
        0, n, solve_block, (jnp.zeros(y.shape, y.dtype), jnp.zeros_like(keys))
    )
    v_blocks, y_blocks = (x.reshape(*x.shape[:2], -1, r, x.shape[-1]) for x in (v_bar, y))
    w = -gram.diagonal * product("bknrd,bkncd->bknrc", v_blocks, y_blocks, precision)
    root = math.sqrt(k.shape[-1])
    k_bar, transitions_bar = pull_back((keys_bar / root, w / root))
    return k_bar, rows_first(v_bar, length), transitions_bar
