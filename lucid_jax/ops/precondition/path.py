"""The blockwise solve of `xla` for LUCID-PaTH, whose keys are carried through transitions.

The sweeps are those of `xla`. A tile of `A` off the diagonal is a product of keys that were carried
to one point between its rows and columns (`carry`); a diagonal block is the exponential of scores
within the block. JAX differentiates what carries the keys, and the backward pass computes it again,
so that only the arguments and `y` are saved.

The tokens of a prefix are part of the sequence, because transitions lie between them and the keys
of a segment; their rows of `A` are those of the identity, with `y` as right-hand sides.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import (
    add,
    heads_first,
    panel_bounds,
    put,
    rows_first,
    take,
)
from lucid_jax.ops.documents import pad_segments
from lucid_jax.ops.numerics import ceil_div, product
from lucid_jax.ops.precondition import path_triton
from lucid_jax.ops.precondition.carry import (
    add_at,
    by_segment,
    carry_keys,
    full_product,
    take_at,
    visit_earlier,
    visit_later,
)
from lucid_jax.ops.precondition.gram import Keys, diagonal_blocks, gram_tile, invert_unit_lower
from lucid_jax.ops.precondition.xla import Tiles
from lucid_jax.ops.remat import save_for_backward
from lucid_jax.ops.transitions import Transitions


class _Gram(NamedTuple):
    """The tiles of `A`, R rows against C columns.

    Attributes:
      keys: Carried keys `[L,B,K,S',D]` in the compute dtype.
      segment_ids: int32 `[B,S']`, or None.
      diagonal: The blocks of A on its diagonal, strictly lower, `[B,K,N,R,R]` in the accumulator
        dtype.
      is_open: bool `[B,S']`, the rows that are not those of the identity; None is all.
      first_open: The first of them in any sequence, int32 `[]`.
      first: The first panel of each block of rows: int32 `[N]`.
      end: One past the last.
    """

    keys: jax.Array
    segment_ids: jax.Array | None
    diagonal: jax.Array
    is_open: jax.Array | None
    first_open: jax.Array
    first: jax.Array
    end: jax.Array

    @classmethod
    def from_scores(
        cls,
        columns: int,
        keys: jax.Array,
        scores: jax.Array,
        segment_ids: jax.Array | None,
        is_open: jax.Array | None,
    ) -> _Gram:
        """Makes the tiles from carried keys, the scores within blocks `[B,K,N,R,R]` and the open
        tokens `[B,S]`."""
        rows, length = scores.shape[-1], keys.shape[-2]
        if segment_ids is not None:
            segment_ids = pad_segments(segment_ids, columns)
        diagonal = diagonal_blocks(scores, keys.shape[-1], segment_ids)
        first_open = jnp.int32(0)
        if is_open is not None:
            first_open = is_open.any(0).argmax().astype(jnp.int32)
            is_open = jnp.pad(is_open, ((0, 0), (0, length - is_open.shape[1])))
            diagonal = jnp.where(is_open.reshape(-1, 1, length // rows, rows, 1), diagonal, 0)
        bounds = panel_bounds(
            segment_ids, segment_ids, rows, columns, num_rows=length, num_columns=length
        )
        return cls(keys, segment_ids, diagonal, is_open, first_open, *bounds)

    def take(self, level: jax.Array, start: jax.Array, size: int) -> Keys:
        """Returns `size` keys of a level from `start`."""
        ids = self.segment_ids
        ids = None if ids is None else take(ids, start, size, 1)
        return Keys(take_at(self.keys, level, start, size), ids)

    def where_open(self, x: jax.Array, start: jax.Array) -> jax.Array:
        """Returns rows `x [B,K,n,D]` from row `start` on, with zeros for those not open."""
        if self.is_open is None:
            return x
        return jnp.where(take(self.is_open, start, x.shape[2], 1)[:, None, :, None], x, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def precondition(
    kernels: bool,
    precision: jax.lax.Precision | None,
    solved: int,
    k: jax.Array,
    rhs: jax.Array,
    segment_ids: jax.Array | None,
    transitions: Transitions,
) -> jax.Array:
    """Solves `A y = rhs`, in the dtype of `k`; shapes as in the public op.

    Args:
      kernels: Whether the Triton kernels run it, which take no solved tokens.
      precision: Precision of products; those of the kernels keep the operands' precision.
      solved: The number of leading tokens whose `y` is `rhs`: their rows of `A` are those of the
        identity.
      k: Keys.
      rhs: Right-hand sides, in the dtype of `k`.
      segment_ids: int32, or None.
      transitions: The transitions.
    """
    return _precondition_fwd(kernels, precision, solved, k, rhs, segment_ids, transitions)[0]


def _precondition_fwd(kernels, precision, solved, k, rhs, segment_ids, transitions):
    sort, restore = by_segment(segment_ids)
    is_open = _open_tokens(solved, k)
    arguments = jax.tree.map(sort, (k, rhs, segment_ids, transitions, is_open))
    if kernels:
        y = path_triton.solve(*arguments[:-1])
    else:
        y = _solve(precision, Tiles.for_sequence(k.shape[1]), *arguments)
    y = save_for_backward(restore(y))
    return y, (k, y, segment_ids, transitions)


def _precondition_bwd(kernels, precision, solved, residuals, y_bar):
    k, y, segment_ids, transitions = residuals
    sort, restore = by_segment(segment_ids)
    is_open = _open_tokens(solved, k)
    arguments = jax.tree.map(sort, (k, y, segment_ids, y_bar, transitions, is_open))
    if kernels:
        gradients = path_triton.solve_transposed(*arguments[:-1])
    else:
        gradients = _solve_transposed(precision, Tiles.for_sequence(k.shape[1]), *arguments)
    k_bar, v_bar, transitions_bar = jax.tree.map(restore, gradients)
    return k_bar, v_bar, None, transitions_bar


precondition.defvjp(_precondition_fwd, _precondition_bwd)


def _open_tokens(solved: int, k: jax.Array) -> jax.Array | None:
    """Returns which tokens are to be solved, bool `[B,S]`, or None for all."""
    return jnp.broadcast_to(jnp.arange(k.shape[1]) >= solved, k.shape[:2]) if solved else None


def _solve(precision, tiles: Tiles, k, rhs, segment_ids, transitions, is_open) -> jax.Array:
    """Solves by forward substitution."""
    r, c, length = tiles.rows, tiles.columns, k.shape[1]
    keys, scores = carry_keys(k, transitions, r, c)
    gram = _Gram.from_scores(c, keys.astype(k.dtype), scores, segment_ids, is_open)
    inverses = invert_unit_lower(gram.diagonal)
    rhs = heads_first(rhs, c)

    def solve_block(i, y):
        def visit(level, start, width, update):
            block, panel = gram.take(level, i * r, r), gram.take(level, start, width)
            a = gram_tile(block, panel, precision)
            return update + product("bkrc,bkcd->bkrd", a, take(y, start, width), precision)

        rhs_i = take(rhs, i * r, r).astype(inverses.dtype)
        update = visit_earlier(i, gram.first[i], r, c, visit, jnp.zeros_like(rhs_i))
        update = gram.where_open(update, i * r)
        return put(y, full_product("bkrs,bksd->bkrd", inverses[:, :, i], rhs_i - update), i * r)

    # What comes before the first open row is solved.
    y = jax.lax.fori_loop(gram.first_open // r, ceil_div(length, r), solve_block, rhs)
    return rows_first(y, length)


def _solve_transposed(precision, tiles: Tiles, k, y, segment_ids, y_bar, transitions, is_open):
    """Solves by backward substitution, and adds up the gradient of the keys in the same sweep."""
    r, c, length = tiles.rows, tiles.columns, k.shape[1]
    n = ceil_div(length, r)
    (keys, scores), pull_back = jax.vjp(
        functools.partial(carry_keys, rows=r, columns=c), k, transitions
    )
    gram = _Gram.from_scores(c, keys.astype(k.dtype), scores, segment_ids, is_open)
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
            v_bar_p = gram.where_open(take(v_bar, start, width), start)
            a = gram_tile(block, panel, precision)
            update = update + product("bkrc,bkcd->bkrd", a, v_bar_p, precision)
            w = -a * product("bkrd,bkcd->bkrc", y_i, v_bar_p, precision)
            share = product("bkrc,bkcd->bkrd", w, panel.k_hat, precision)
            panel_bar = product("bkrc,bkrd->bkcd", w, block.k_hat, precision)
            keys_bar = add_at(keys_bar, panel_bar, level, start)
            return keys_bar, block_bar.at[level].add(share), update

        zero = jnp.zeros(y_i.shape, keys_bar.dtype)
        carry = keys_bar, jnp.zeros((keys.shape[0], *zero.shape), zero.dtype), zero
        first = gram.first_open // c
        keys_bar, block_bar, update = visit_later(i, first, end[i], r, c, visit, carry)
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
