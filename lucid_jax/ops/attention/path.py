"""Blockwise causal softmax attention with PaTH's transitions in plain XLA.

The schedule is that of `xla`: blocks of R queries visit panels of C keys with a running maximum and
sum, and the backward sweep recomputes the weights. Keys are carried to every level
(`precondition.carry`) before, queries while their block is at hand, so that the memory that grows
as S·log₂(S/R) is that of the KV heads. Scores within a block come first: every query sees itself
there, so that no maximum starts without a key.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.ops.attention import path_triton
from lucid_jax.ops.blocks import add, heads_first, panel_bounds, put, rows_first, same_segment, take
from lucid_jax.ops.documents import pad_segments
from lucid_jax.ops.isolation import bad_tokens, clear, mark, spread
from lucid_jax.ops.numerics import accumulator_dtype, ceil_div, finite, product
from lucid_jax.ops.precondition.carry import (
    Blocks,
    add_at,
    at_levels,
    by_segment,
    carries,
    full_product,
    take_at,
    visit_earlier,
)
from lucid_jax.ops.precondition.xla import Tiles
from lucid_jax.ops.remat import save_for_backward
from lucid_jax.ops.transitions import Transitions


def attention(
    kernels: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    precision: jax.lax.Precision | None,
    transitions: Transitions,
) -> jax.Array:
    """Computes `softmax(scale·s + causal) v`; shapes as in the public op.

    `kernels` says whether the Triton kernels run it, whose products keep the operands' precision.
    """
    return _attention(kernels, scale, precision, q, k, v, segment_ids, transitions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(kernels, scale, precision, q, k, v, segment_ids, transitions):
    return _attention_fwd(kernels, scale, precision, q, k, v, segment_ids, transitions)[0]


class _Residuals(NamedTuple):
    """The arrays that the backward pass needs, with zeros for bad tokens.

    The largest logit and the norm are those of sorted tokens: `[B,K,G,S']`, see `xla`. From the
    kernels they are scores and inverse norms `[B,H,S']`.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array | None
    transitions: Transitions
    o: jax.Array
    largest: jax.Array
    norm: jax.Array
    bad: jax.Array


def _attention_fwd(kernels, scale, precision, q, k, v, segment_ids, transitions):
    bad_keys = bad_tokens(k, v) | transitions.bad_tokens()
    k, v, transitions = clear(k, bad_keys), clear(v, bad_keys), transitions.map(clear, bad_keys)
    bad_queries = bad_tokens(q)
    q = clear(q, bad_queries)
    group = q.shape[2] // k.shape[2]
    bad = bad_queries | jnp.repeat(spread(bad_keys, segment_ids), group, 2)
    sort, restore = by_segment(segment_ids)
    arguments = jax.tree.map(sort, (q, k, v, segment_ids, transitions))
    if kernels:
        o, *sums = path_triton.forward(scale, *arguments)
    else:
        o, *sums = _forward(scale, precision, *arguments)
    o = save_for_backward(mark(restore(o), bad))
    largest, norm = map(save_for_backward, sums)
    return o, _Residuals(q, k, v, segment_ids, transitions, o, largest, norm, bad)


def _attention_bwd(kernels, scale, precision, residuals, o_bar):
    q, k, v, segment_ids, transitions, o, largest, norm, bad = residuals
    bad |= bad_tokens(o_bar)
    o, o_bar = clear(o, bad), clear(o_bar, bad).astype(q.dtype)
    sort, restore = by_segment(segment_ids)
    arguments = jax.tree.map(sort, (q, k, v, segment_ids, transitions, o, o_bar))
    if kernels:
        gradients = path_triton.backward(scale, (largest, norm), *arguments)
    else:
        gradients = _backward(scale, precision, (largest, norm), *arguments)
    q_bar, k_bar, v_bar, transitions_bar = jax.tree.map(restore, gradients)
    # A bad query reaches the gradients of all keys and transitions that it sees.
    bad_keys = bad.reshape(*k.shape[:3], -1).any(-1)
    bad_keys = spread(bad_keys, segment_ids, reverse=True)
    return (
        mark(q_bar, bad),
        mark(k_bar, bad_keys),
        mark(v_bar, bad_keys),
        None,
        transitions_bar.map(mark, bad_keys),
    )


_attention.defvjp(_attention_fwd, _attention_bwd)


class _Scores(NamedTuple):
    """The scores of blocks of R queries against panels of C keys.

    Attributes:
      keys: Carried keys `[L,B,K,S',D]` in the compute dtype.
      segment_ids: int32 `[B,S']`, or None.
      first: The first panel of each block of queries: int32 `[N]`.
    """

    keys: jax.Array
    segment_ids: jax.Array | None
    first: jax.Array

    @classmethod
    def from_keys(cls, tiles: Tiles, keys: jax.Array, segment_ids: jax.Array | None) -> _Scores:
        """Pads the segment ids and finds the bounds."""
        r, c, n = tiles.rows, tiles.columns, keys.shape[-2]
        ids = None if segment_ids is None else pad_segments(segment_ids, c)
        return cls(keys, ids, panel_bounds(ids, ids, r, c, num_rows=n, num_columns=n)[0])

    def mask(self, row: jax.Array, rows: int, column: jax.Array, columns: int) -> jax.Array | bool:
        """Returns which pairs of a tile share a segment, `[B,1,1,R,C]`, or True."""
        ids = self.segment_ids
        if ids is None:
            return True
        return same_segment(take(ids, row, rows, 1), take(ids, column, columns, 1))[:, :, None]


def _carry_keys(tiles: Tiles, k: jax.Array, transitions: Transitions):
    """Returns carried keys `[L,B,K,S',D]`, and the blocks and their `carries`.

    All are in the accumulator dtype.
    """
    k = k.astype(accumulator_dtype(k.dtype))
    blocks = Blocks.split(k, transitions, tiles.rows, tiles.columns)
    columns, tree = blocks.columns(), blocks.tree()
    return at_levels(None, columns, tree), (blocks, carries(tree, columns))


def _carry_queries(q_i: jax.Array, block: tuple[Blocks, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Carries the queries of a block.

    Args:
      q_i: `[B,K,G,R,D]`.
      block: One block and its `carries`, without the axis N.

    Returns:
      The queries at every level `[L,B,K,G,R,D]`, and the scores within the block `[B,K,G,R,R]`,
      in the accumulator dtype.
    """
    own, matrices = block
    rows, scores = jax.tree.map(lambda x: x[:, :, None], own).rows(q_i.astype(own.k.dtype))
    return full_product("bkgrd,bklde->lbkgre", rows, matrices), scores


def _block(blocks: tuple[Blocks, jax.Array], i: jax.Array) -> tuple[Blocks, jax.Array]:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 2, keepdims=False), blocks)


def _masked(logits: jax.Array, mask: jax.Array | bool) -> jax.Array:
    """Gives hidden keys a finite logit, so that a panel without a visible key leaves no NaN."""
    return jnp.where(mask, logits, jnp.finfo(logits.dtype).min)


def _forward(scale, precision, q, k, v, segment_ids, transitions):
    """Returns `o`, the largest logits and the norms."""
    tiles, length, dtype = Tiles.for_sequence(q.shape[1]), q.shape[1], accumulator_dtype(q.dtype)
    r, c = tiles.rows, tiles.columns
    keys, blocks = _carry_keys(tiles, k, transitions)
    panels = _Scores.from_keys(tiles, keys.astype(k.dtype), segment_ids)
    q_all, v_all = _grouped(q, k.shape[2], c), heads_first(v, c)
    causal = jnp.tril(jnp.ones((r, r), bool))

    def attend_block(i, carry):
        o, largest, norm = carry
        q_i, scores = _carry_queries(take(q_all, i * r, r), _block(blocks, i))
        q_i = q_i.astype(q.dtype)

        def visit(level, start, width, carry):
            k_p = take_at(panels.keys, level, start, width)
            dots = product("bkgrd,bkcd->bkgrc", q_i[level], k_p, precision)
            return add_panel(dots, panels.mask(i * r, r, start, width), start, width, carry)

        def add_panel(dots, mask, start, width, carry):
            total, largest, norm = carry
            logits = _masked(finite(scale * dots), mask)
            new_largest = jnp.maximum(largest, logits.max(-1))
            weights = jnp.where(mask, jnp.exp(logits - new_largest[..., None]), 0)
            decay = jnp.exp(largest - new_largest)
            v_p = take(v_all, start, width)
            total = total * decay[..., None] + product("bkgrc,bkcd->bkgrd", weights, v_p, precision)
            return total, new_largest, norm * decay + weights.sum(-1)

        zero = jnp.zeros(q_i.shape[1:-1], dtype)
        carry = jnp.zeros(q_i.shape[1:], dtype), zero + jnp.finfo(dtype).min, zero
        carry = add_panel(scores, causal & panels.mask(i * r, r, i * r, r), i * r, r, carry)
        total, largest_i, norm_i = visit_earlier(i, panels.first[i], r, c, visit, carry)
        return (
            put(o, total / norm_i[..., None], i * r),
            put(largest, largest_i, i * r, -1),
            put(norm, norm_i, i * r, -1),
        )

    zero = jnp.zeros(q_all.shape[:-1], dtype)
    o, largest, norm = jax.lax.fori_loop(
        0, ceil_div(length, r), attend_block, (jnp.zeros(q_all.shape, q.dtype), zero, zero)
    )
    return _ungrouped(o, length), largest, norm


def _backward(scale, precision, sums, q, k, v, segment_ids, transitions, o, o_bar):
    """Returns the cotangents of `q`, `k`, `v` and the transitions, in their dtypes.

    `sums` are the largest logits and the norms.
    """
    tiles, length, dtype = Tiles.for_sequence(q.shape[1]), q.shape[1], accumulator_dtype(q.dtype)
    r, c, kv_heads = tiles.rows, tiles.columns, k.shape[2]
    (keys, blocks), pull_back = jax.vjp(functools.partial(_carry_keys, tiles), k, transitions)
    panels = _Scores.from_keys(tiles, keys.astype(k.dtype), segment_ids)
    q_all, v_all = _grouped(q, kv_heads, c), heads_first(v, c)
    o_bar_all = _grouped(o_bar, kv_heads, c)
    delta = jnp.sum(_grouped(o, kv_heads, c).astype(dtype) * o_bar_all.astype(dtype), -1)
    causal = jnp.tril(jnp.ones((r, r), bool))

    def visit_block(i, carry):
        q_bar, keys_bar, v_bar, blocks_bar = carry
        (rows_i, scores), pull_back_queries = jax.vjp(
            _carry_queries, take(q_all, i * r, r), _block(blocks, i)
        )
        q_i, o_bar_i = rows_i.astype(q.dtype), take(o_bar_all, i * r, r)
        largest_i, norm_i, delta_i = (take(x, i * r, r, -1)[..., None] for x in (*sums, delta))

        def pull_back_panel(dots, mask, start, width, v_bar):
            """Returns the cotangent of the scores, and `v̄` with the share of a panel."""
            logits = _masked(finite(scale * dots), mask)
            weights = jnp.where(mask, jnp.exp(logits - largest_i) / norm_i, 0)
            v_p = take(v_all, start, width)
            v_bar_p = product("bkgrc,bkgrd->bkcd", weights, o_bar_i, precision)
            weights_bar = product("bkgrd,bkcd->bkgrc", o_bar_i, v_p, precision)
            return scale * weights * (weights_bar - delta_i), add(v_bar, v_bar_p, start)

        def visit(level, start, width, carry):
            rows_bar, keys_bar, v_bar = carry
            k_p = take_at(panels.keys, level, start, width)
            dots = product("bkgrd,bkcd->bkgrc", q_i[level], k_p, precision)
            mask = panels.mask(i * r, r, start, width)
            dots_bar, v_bar = pull_back_panel(dots, mask, start, width, v_bar)
            rows_bar_p = product("bkgrc,bkcd->bkgrd", dots_bar, k_p, precision)
            k_bar_p = product("bkgrc,bkgrd->bkcd", dots_bar, q_i[level], precision)
            return (
                rows_bar.at[level].add(rows_bar_p),
                add_at(keys_bar, k_bar_p, level, start),
                v_bar,
            )

        mask = causal & panels.mask(i * r, r, i * r, r)
        scores_bar, v_bar = pull_back_panel(scores, mask, i * r, r, v_bar)
        carry = jnp.zeros_like(rows_i), keys_bar, v_bar
        rows_bar, keys_bar, v_bar = visit_earlier(i, panels.first[i], r, c, visit, carry)
        q_bar_i, block_bar = pull_back_queries((rows_bar, scores_bar))
        blocks_bar = jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 2), blocks_bar, block_bar
        )
        return put(q_bar, q_bar_i, i * r), keys_bar, v_bar, blocks_bar

    carry = (
        jnp.zeros_like(q_all),
        jnp.zeros_like(keys),
        jnp.zeros(v_all.shape, dtype),
        jax.tree.map(jnp.zeros_like, blocks),
    )
    q_bar, keys_bar, v_bar, blocks_bar = jax.lax.fori_loop(
        0, ceil_div(length, r), visit_block, carry
    )
    k_bar, transitions_bar = pull_back((keys_bar, blocks_bar))
    v_bar = rows_first(v_bar, length).astype(v.dtype)
    return _ungrouped(q_bar, length), k_bar, v_bar, transitions_bar


def _grouped(x: jax.Array, kv_heads: int, multiple: int) -> jax.Array:
    """Turns `[B,S,H,D]` into `[B,K,G,S',D]`; a group of query heads shares its keys."""
    b, _, h, d = x.shape
    return heads_first(x, multiple).reshape(b, kv_heads, h // kv_heads, -1, d)


def _ungrouped(x: jax.Array, length: int) -> jax.Array:
    """Inverts `_grouped`."""
    b, kv_heads, group, padded, d = x.shape
    return rows_first(x.reshape(b, kv_heads * group, padded, d), length)
