"""Blockwise causal softmax attention in plain XLA: memory linear in S.

The fallback where no library kernel takes the call. Blocks of R query rows visit
panels of C keys with a running maximum and sum; the backward sweep recomputes the
weights from the saved log-sum-exp (Dao et al., FlashAttention-2, arXiv 2307.08691).
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
    round_up,
    rows_first,
    same_segment,
    take,
)
from lucid_jax.ops.precondition.gram import accumulator_dtype
from lucid_jax.ops.remat import keep

_ROWS = 128


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    precision: jax.lax.Precision | None,
) -> jax.Array:
    """`softmax(scale·q kᵀ + causal) v`; shapes as in the public op."""
    return _attention(scale, precision, q, k, v, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(scale, precision, q, k, v, segment_ids):
    return _attention_fwd(scale, precision, q, k, v, segment_ids)[0]


class _Layout(NamedTuple):
    """Query rows of a block and keys of a panel, for S' padded rows."""

    rows: int
    columns: int
    size: int

    @classmethod
    def of(cls, length: int) -> _Layout:
        columns = min(panel_width(), round_up(length, min(_ROWS, round_up(length, 16))))
        return cls(min(_ROWS, columns), columns, round_up(length, columns))

    def grouped(self, x: jax.Array, kv_heads: int) -> jax.Array:
        """`[B,T,H,D]` to `[B,K,G,T',D]`: a group of query heads shares its keys."""
        b, _, h, d = x.shape
        x = heads_first(x, self.columns)
        return x.reshape(b, kv_heads, h // kv_heads, self.size, d)

    def bounds(self, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """First panel of every block of rows, and one past its last."""
        first, _ = panel_bounds(
            segment_ids, segment_ids, self.rows, self.columns,
            num_rows=self.size, num_columns=self.size,
        )  # fmt: skip
        ends = jnp.arange(1, self.size // self.rows + 1, dtype=jnp.int32) * self.rows
        return first, -(-ends // self.columns)

    def logits(self, scale, precision, q_i, k_p, segment_ids, i, p) -> jax.Array:
        """Masked logits `[B,K,G,R,C]` of block `i` against panel `p`."""
        r, c = self.rows, self.columns
        logits = scale * _product("bkgrd,bkcd->bkgrc", q_i, k_p, precision)
        mask = (i * r + jnp.arange(r))[:, None] >= (p * c + jnp.arange(c))[None, :]
        if segment_ids is not None:
            same = same_segment(take(segment_ids, i * r, r, 1), take(segment_ids, p * c, c, 1))
            mask = mask & same[:, :, None]
        # Finite, so that a panel without any visible key leaves no NaN behind.
        return jnp.where(mask, logits, jnp.finfo(logits.dtype).min)


def _attention_fwd(scale, precision, q, k, v, segment_ids):
    b, t, h, d = q.shape
    kv_heads, dtype = k.shape[2], accumulator_dtype(q.dtype)
    layout = _Layout.of(t)
    r, c = layout.rows, layout.columns
    q_all, k_all, v_all = layout.grouped(q, kv_heads), heads_first(k, c), heads_first(v, c)
    segments = None if segment_ids is None else pad_axis(segment_ids, 1, layout.size)
    first, end = layout.bounds(segments)

    def attend_block(i, carry):
        o, lse = carry
        q_i = take(q_all, i * r, r)

        def visit(p, carry):
            total, largest, norm = carry
            k_p, v_p = take(k_all, p * c, c), take(v_all, p * c, c)
            logits = layout.logits(scale, precision, q_i, k_p, segments, i, p)
            new_largest = jnp.maximum(largest, logits.max(-1))
            weights = jnp.exp(logits - new_largest[..., None])
            decay = jnp.exp(largest - new_largest)
            total = total * decay[..., None] + _product(
                "bkgrc,bkcd->bkgrd", weights, v_p, precision
            )
            return total, new_largest, norm * decay + weights.sum(-1)

        rows = q_i.shape[:-1]
        total, largest, norm = jax.lax.fori_loop(
            first[i],
            end[i],
            visit,
            (
                jnp.zeros(q_i.shape, dtype),
                jnp.full(rows, jnp.finfo(dtype).min, dtype),
                jnp.zeros(rows, dtype),
            ),
        )
        return put(o, total / norm[..., None], i * r), put(lse, largest + jnp.log(norm), i * r, -1)

    o, lse = jax.lax.fori_loop(
        0,
        -(-t // r),
        attend_block,
        (jnp.zeros(q_all.shape, q.dtype), jnp.zeros(q_all.shape[:-1], dtype)),
    )
    o, lse = keep(rows_first(o.reshape(b, h, layout.size, d), t)), keep(lse)
    return o, (q, k, v, segment_ids, o, lse)


def _attention_bwd(scale, precision, residuals, o_bar):
    q, k, v, segment_ids, o, lse = residuals
    b, t, h, d = q.shape
    kv_heads, dtype = k.shape[2], accumulator_dtype(q.dtype)
    layout = _Layout.of(t)
    r, c = layout.rows, layout.columns
    q_all, k_all, v_all = layout.grouped(q, kv_heads), heads_first(k, c), heads_first(v, c)
    o_bar_all = layout.grouped(o_bar.astype(q.dtype), kv_heads)
    # The row sums of o·ō stand for those of weights times their cotangents.
    delta = jnp.sum(layout.grouped(o, kv_heads).astype(dtype) * o_bar_all, -1)
    segments = None if segment_ids is None else pad_axis(segment_ids, 1, layout.size)
    first, end = layout.bounds(segments)

    def visit_block(i, carry):
        q_bar, k_bar, v_bar = carry
        q_i, o_bar_i = take(q_all, i * r, r), take(o_bar_all, i * r, r)
        lse_i, delta_i = take(lse, i * r, r, -1), take(delta, i * r, r, -1)

        def visit(p, carry):
            q_bar_i, k_bar, v_bar = carry
            k_p, v_p = take(k_all, p * c, c), take(v_all, p * c, c)
            logits = layout.logits(scale, precision, q_i, k_p, segments, i, p)
            weights = jnp.exp(logits - lse_i[..., None])
            v_bar_p = _product("bkgrc,bkgrd->bkcd", weights, o_bar_i, precision)
            weights_bar = _product("bkgrd,bkcd->bkgrc", o_bar_i, v_p, precision)
            logits_bar = scale * weights * (weights_bar - delta_i[..., None])
            q_bar_i = q_bar_i + _product("bkgrc,bkcd->bkgrd", logits_bar, k_p, precision)
            k_bar_p = _product("bkgrc,bkgrd->bkcd", logits_bar, q_i, precision)
            return q_bar_i, add(k_bar, k_bar_p, p * c), add(v_bar, v_bar_p, p * c)

        q_bar_i, k_bar, v_bar = jax.lax.fori_loop(
            first[i], end[i], visit, (jnp.zeros(q_i.shape, dtype), k_bar, v_bar)
        )
        return put(q_bar, q_bar_i, i * r), k_bar, v_bar

    q_bar, k_bar, v_bar = jax.lax.fori_loop(
        0,
        -(-t // r),
        visit_block,
        (jnp.zeros_like(q_all), jnp.zeros(k_all.shape, dtype), jnp.zeros(v_all.shape, dtype)),
    )
    q_bar = rows_first(q_bar.reshape(b, h, layout.size, d), t)
    k_bar, v_bar = (rows_first(x, t).astype(k.dtype) for x in (k_bar, v_bar))
    return q_bar, k_bar, v_bar, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _product(spec: str, a: jax.Array, b: jax.Array, precision) -> jax.Array:
    """A product of operands in `b`'s dtype, accumulated in float32 (or float64)."""
    return jnp.einsum(
        spec,
        a.astype(b.dtype),
        b,
        precision=precision,
        preferred_element_type=accumulator_dtype(b.dtype),
    )
