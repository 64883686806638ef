"""Blockwise causal softmax attention in plain XLA: memory linear in S.

The fallback where no library kernel takes the call. Blocks of R queries visit panels of C keys
with a running maximum and sum; the backward sweep recomputes the weights from both, which are
saved (Dao et al., FlashAttention-2, arXiv 2307.08691).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import (
    add,
    heads_first,
    pad_axis,
    panel_bounds,
    panel_width,
    put,
    rows_first,
    same_segment,
    take,
)
from lucid_jax.ops.isolation import bad_tokens, clear, mark, spread
from lucid_jax.ops.numerics import accumulator_dtype, ceil_div, finite, product, round_up
from lucid_jax.ops.query_positions import QueryPositions
from lucid_jax.ops.remat import save_for_backward

_ROWS = 128


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    precision: jax.lax.Precision | None,
) -> jax.Array:
    """Computes `softmax(scale·q kᵀ + causal) v`; shapes as in the public op."""
    return _attention(scale, precision, q, k, v, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(scale, precision, q, k, v, segment_ids):
    return _attention_fwd(scale, precision, q, k, v, segment_ids)[0]


def _attention_fwd(scale, precision, q, k, v, segment_ids):
    at = QueryPositions.whole_sequence(q.shape[1], segment_ids)
    return forward(scale, precision, q, k, v, at)


def _attention_bwd(scale, precision, residuals, o_bar):
    q_bar, *kv_bar = backward(scale, precision, residuals, o_bar)
    return q_bar, *(x.astype(q_bar.dtype) for x in kv_bar), None


_attention.defvjp(_attention_fwd, _attention_bwd)


class _Tiles(NamedTuple):
    """Blocks of R queries against panels of C keys, padded, with their masks and bounds."""

    rows: int
    columns: int
    positions: jax.Array
    segment_ids: jax.Array | None
    key_segment_ids: jax.Array | None
    first: jax.Array
    end: jax.Array

    @classmethod
    def choose(cls, at: QueryPositions, keys: int) -> _Tiles:
        c = min(panel_width(), round_up(keys, min(_ROWS, round_up(keys, 16))))
        r = min(_ROWS, c)
        num_rows, num_columns = round_up(at.positions.shape[0], r), round_up(keys, c)
        positions = pad_axis(at.positions, 0, num_rows)
        ids, key_ids = at.segment_ids, at.key_segment_ids
        if ids is not None and key_ids is not None:
            ids, key_ids = pad_axis(ids, 1, num_rows), pad_axis(key_ids, 1, num_columns)
        first, _ = panel_bounds(ids, key_ids, r, c, num_rows=num_rows, num_columns=num_columns)
        end = positions.reshape(-1, r).max(1) // c + 1
        return cls(r, c, positions, ids, key_ids, first, end)

    def grouped(self, x: jax.Array, kv_heads: int) -> jax.Array:
        """Turns `[B,T,H,D]` into `[B,K,G,T',D]`; a group of query heads shares its keys."""
        b, _, h, d = x.shape
        x = heads_first(x, self.rows)
        return x.reshape(b, kv_heads, h // kv_heads, -1, d)

    def ungrouped(self, x: jax.Array, length: int) -> jax.Array:
        """Inverts `grouped`."""
        b, kv_heads, group, padded, d = x.shape
        return rows_first(x.reshape(b, kv_heads * group, padded, d), length)

    def logits(self, scale, precision, q_i, k_p, i, p) -> tuple[jax.Array, jax.Array]:
        """Returns the logits `[B,K,G,R,C]` of block `i` against panel `p`, and their mask."""
        r, c = self.rows, self.columns
        logits = finite(scale * product("bkgrd,bkcd->bkgrc", q_i, k_p, precision))
        keys = (p * c + jnp.arange(c, dtype=jnp.int32))[None, :]
        mask = (take(self.positions, i * r, r, 0)[:, None] >= keys)[None, None, None]
        if self.segment_ids is not None and self.key_segment_ids is not None:
            ids = take(self.segment_ids, i * r, r, 1)
            key_ids = take(self.key_segment_ids, p * c, c, 1)
            mask = mask & same_segment(ids, key_ids)[:, :, None]
        # A finite mask value, so that a panel without a visible key leaves no NaN.
        return jnp.where(mask, logits, jnp.finfo(logits.dtype).min), mask


class _Residuals(NamedTuple):
    """The arrays that `backward` needs.

    The largest logit and the norm are kept apart: the logarithm of the norm would be lost where
    logits are large.

    Attributes:
      q: Queries `[B,T,H,D]`; they, `k` and `v` have zeros for bad tokens.
      k: Keys `[B,S,K,D]`.
      v: Values `[B,S,K,D]`.
      at: The positions of the queries among the keys.
      o: The result.
      largest: The largest logit of each query `[B,K,G,T']`.
      norm: The sum of the exponentials of its logits, relative to the largest.
      bad: The queries `[B,T,H]` whose results depend on bad tokens.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    at: QueryPositions
    o: jax.Array
    largest: jax.Array
    norm: jax.Array
    bad: jax.Array


def forward(
    scale: float,
    precision: jax.lax.Precision | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    at: QueryPositions,
) -> tuple[jax.Array, _Residuals]:
    """Attends with T queries to S keys.

    Args:
      scale: Factor of the logits.
      precision: Precision of products.
      q: Queries `[B,T,H,D]`.
      k: Keys `[B,S,K,D]`.
      v: Values `[B,S,K,D]`.
      at: The positions of the queries among the keys.

    Returns:
      `o [B,T,H,D]`, dtype of `q`, and the residuals that `backward` needs.
    """
    t, kv_heads, dtype = q.shape[1], k.shape[2], accumulator_dtype(q.dtype)
    bad_keys = bad_tokens(k, v)
    k, v = clear(k, bad_keys), clear(v, bad_keys)
    reached = spread(bad_keys, at.key_segment_ids)[:, at.positions]
    bad_queries = bad_tokens(q)
    q = clear(q, bad_queries)
    bad = bad_queries | jnp.repeat(reached, q.shape[2] // kv_heads, 2)
    tiles = _Tiles.choose(at, k.shape[1])
    r, c = tiles.rows, tiles.columns
    q_all, k_all, v_all = tiles.grouped(q, kv_heads), heads_first(k, c), heads_first(v, c)

    def attend_block(i, carry):
        o, largest, norm = carry
        q_i = take(q_all, i * r, r)

        def visit(p, carry):
            total, largest, norm = carry
            k_p, v_p = take(k_all, p * c, c), take(v_all, p * c, c)
            logits, mask = tiles.logits(scale, precision, q_i, k_p, i, p)
            new_largest = jnp.maximum(largest, logits.max(-1))
            weights = jnp.where(mask, jnp.exp(logits - new_largest[..., None]), 0)
            decay = jnp.exp(largest - new_largest)
            total = total * decay[..., None] + product("bkgrc,bkcd->bkgrd", weights, v_p, precision)
            return total, new_largest, norm * decay + weights.sum(-1)

        shape = q_i.shape[:-1]
        total, largest_i, norm_i = jax.lax.fori_loop(
            tiles.first[i],
            tiles.end[i],
            visit,
            (
                jnp.zeros(q_i.shape, dtype),
                jnp.full(shape, jnp.finfo(dtype).min, dtype),
                jnp.zeros(shape, dtype),
            ),
        )
        return (
            put(o, total / norm_i[..., None], i * r),
            put(largest, largest_i, i * r, -1),
            put(norm, norm_i, i * r, -1),
        )

    zero = jnp.zeros(q_all.shape[:-1], dtype)
    o, largest, norm = jax.lax.fori_loop(
        0, ceil_div(t, r), attend_block, (jnp.zeros(q_all.shape, q.dtype), zero, zero)
    )
    o = save_for_backward(mark(tiles.ungrouped(o, t), bad))
    largest, norm = save_for_backward(largest), save_for_backward(norm)
    return o, _Residuals(q, k, v, at, o, largest, norm, bad)


def backward(
    scale: float, precision: jax.lax.Precision | None, residuals: _Residuals, o_bar: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `q̄` in its dtype, and the shares of these queries in `k̄` and `v̄`.

    The shares are in the accumulator dtype, for callers that add up several.
    """
    q, k, v, at, o, largest, norm, bad = residuals
    bad |= bad_tokens(o_bar)
    o, o_bar = clear(o, bad), clear(o_bar, bad)
    t, s, kv_heads, dtype = q.shape[1], k.shape[1], k.shape[2], accumulator_dtype(q.dtype)
    tiles = _Tiles.choose(at, s)
    r, c = tiles.rows, tiles.columns
    q_all, k_all, v_all = tiles.grouped(q, kv_heads), heads_first(k, c), heads_first(v, c)
    o_bar_all = tiles.grouped(o_bar.astype(q.dtype), kv_heads)
    # The sum of o·ō over D equals the sum of the weights times their cotangents.
    delta = jnp.sum(tiles.grouped(o, kv_heads).astype(dtype) * o_bar_all.astype(dtype), -1)

    def visit_block(i, carry):
        q_bar, k_bar, v_bar = carry
        q_i, o_bar_i = take(q_all, i * r, r), take(o_bar_all, i * r, r)
        largest_i, norm_i, delta_i = (take(x, i * r, r, -1) for x in (largest, norm, delta))

        def visit(p, carry):
            q_bar_i, k_bar, v_bar = carry
            k_p, v_p = take(k_all, p * c, c), take(v_all, p * c, c)
            logits, mask = tiles.logits(scale, precision, q_i, k_p, i, p)
            weights = jnp.exp(logits - largest_i[..., None]) / norm_i[..., None]
            weights = jnp.where(mask, weights, 0)
            v_bar_p = product("bkgrc,bkgrd->bkcd", weights, o_bar_i, precision)
            weights_bar = product("bkgrd,bkcd->bkgrc", o_bar_i, v_p, precision)
            logits_bar = scale * weights * (weights_bar - delta_i[..., None])
            q_bar_i = q_bar_i + product("bkgrc,bkcd->bkgrd", logits_bar, k_p, precision)
            k_bar_p = product("bkgrc,bkgrd->bkcd", logits_bar, q_i, precision)
            return q_bar_i, add(k_bar, k_bar_p, p * c), add(v_bar, v_bar_p, p * c)

        q_bar_i, k_bar, v_bar = jax.lax.fori_loop(
            tiles.first[i], tiles.end[i], visit, (jnp.zeros(q_i.shape, dtype), k_bar, v_bar)
        )
        return put(q_bar, q_bar_i, i * r), k_bar, v_bar

    q_bar, k_bar, v_bar = jax.lax.fori_loop(
        0,
        ceil_div(t, r),
        visit_block,
        (jnp.zeros_like(q_all), jnp.zeros(k_all.shape, dtype), jnp.zeros(v_all.shape, dtype)),
    )
    # A bad query reaches the gradients of all keys that it sees.
    heads = bad.reshape(*bad.shape[:2], kv_heads, -1).any(-1)
    bad_keys = jnp.zeros((k.shape[0], s, kv_heads), bool).at[:, at.positions].set(heads)
    bad_keys = spread(bad_keys, at.key_segment_ids, reverse=True)
    k_bar, v_bar = (mark(rows_first(x, s), bad_keys) for x in (k_bar, v_bar))
    return mark(tiles.ungrouped(q_bar, t), bad), k_bar, v_bar
