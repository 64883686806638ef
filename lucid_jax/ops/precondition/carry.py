"""Rows and columns of PaTH's scores, carried through transitions so that tiles are plain products.

## Within blocks

For a block of R tokens, with W and β by rows (the UT transform, arXiv 2505.16381),

    M = (I + diag(β) stril(WWᵀ))⁻¹ diag(β),   U = M W,   E = M stril(WKᵀ)

    rows, back to the start of the block     q_iᵀ H_i ⋯ H_1      of  Q − tril(QWᵀ) U
    columns, forward to its end              H_R ⋯ H_{j+1} k_j   of  K − Eᵀ W
    scores within it                         tril(QKᵀ − tril(QWᵀ) E)
    the product of its transitions           T = H_R ⋯ H_1 = I − Wᵀ U

The inverse is safe at any size: up to its sign, its entry (t, s) for `s < t` is
`β_t w_tᵀ H_{t−1} ⋯ H_{s+1} w_s`, at most 2. No transition is inverted and nothing is divided by β:
with β = 1 transitions are singular. The solve takes about `14·R·D + 5·R²` operations a token for
this, all blocks in parallel: a twentieth of its substitution, `2·S·D`, for R = 128, D = 64 and
S = 32768.

## Between blocks

The numbers of two blocks j < i have a highest bit in which they differ, their level l. A multiple m
of `2^l` then lies between them, `j < m ≤ i`: i is one of the `2^l` blocks from m on, j one of the
`2^l` blocks before m. With the rows of i carried back to the start of block m, and the columns of j
forward to the same point, their scores are one plain product. So a block needs one vector for each
token and level: a row where bit l of its number is set, a column where it is not. They follow from
products with D×D matrices along a binary tree, all blocks in parallel.

For S/R blocks there are `L = ⌈log₂(S/R)⌉` levels. The vectors cost `2·S·D²·(L−1)` operations,
`2·D·L/S` of the causal scores (1/32 for D = 64 and S = 32768), and are rounded once, behind
products in float32. A tile of scores costs what it costs without transitions, and the blocks of a
head are as parallel as they are there. Memory is `S·D·L` numbers for each KV head. Where segments
are, tokens are sorted by them first, and the tiles are masked: a product between two tokens of a
segment then has no other factors.

A sweep over blocks that pushes all earlier keys through each of them would need `S·D` numbers, but
`D/R` of the scores' operations once more, one block after the other, and it would round a key at
each block or keep it in float32. Its gradient would have to store or recompute the pushed keys.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.ops.blocks import heads_first, rows_first, same_segment
from lucid_jax.ops.numerics import accumulator_dtype
from lucid_jax.ops.precondition.gram import invert_unit_lower, normalize_keys
from lucid_jax.ops.transitions import Transitions


def full_product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns `einsum(spec, a, b)` in full precision."""
    return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)


def unit_directions(w: jax.Array) -> jax.Array:
    """Returns `w/‖w‖₂` over the last axis, in the accumulator dtype; a zero stays zero."""
    return normalize_keys(w) / math.sqrt(w.shape[-1])


def dense_scores(
    q: jax.Array, k: jax.Array, transitions: Transitions, segment_ids: jax.Array | None
) -> jax.Array:
    """Returns all scores `[B,K,G,S,S]`, zero above the diagonal and between segments.

    `tril(QKᵀ) − tril(QWᵀ) (I + diag(β) stril(WWᵀ))⁻¹ diag(β) stril(WKᵀ)`, with every product
    masked by segments, which are then systems of their own.

    Args:
      q: Queries `[B,S,K,G,D]`.
      k: Keys `[B,S,K,D]`, of the same accumulator dtype as all others.
      transitions: The transitions.
      segment_ids: int32 `[B,S]`, or None.
    """
    w, beta = unit_directions(transitions.w), transitions.beta.swapaxes(1, 2)[..., None]
    mask = jnp.ones((1, 1, k.shape[1], k.shape[1]), bool)
    if segment_ids is not None:
        mask = same_segment(segment_ids, segment_ids)
    lower, below = jnp.tril(mask), jnp.tril(mask, -1)

    def of_keys(columns):
        return jnp.where(below, full_product("bskd,btkd->bkst", w, columns), 0)

    def of_queries(columns):
        return jnp.where(lower[:, :, None], full_product("bskgd,btkd->bkgst", q, columns), 0)

    mixed = jax.lax.linalg.triangular_solve(
        beta * of_keys(w), beta * of_keys(k), left_side=True, lower=True, unit_diagonal=True
    )
    return of_queries(k) - full_product("bkgst,bktu->bkgsu", of_queries(w), mixed)


class Blocks(NamedTuple):
    """The transitions and keys of blocks of R tokens, in the accumulator dtype.

    The arrays of one block lack the axis N.

    Attributes:
      k: Keys `[B,K,N,R,D]`.
      w: Unit directions `[B,K,N,R,D]`.
      u: `U [B,K,N,R,D]`.
      e: `E [B,K,N,R,R]`.
    """

    k: jax.Array
    w: jax.Array
    u: jax.Array
    e: jax.Array

    @classmethod
    def split(
        cls,
        k: jax.Array,
        transitions: Transitions,
        rows: int,
        columns: int,
        invert: Callable[[jax.Array], jax.Array] = invert_unit_lower,
    ) -> Blocks:
        """Splits sequences into blocks.

        Args:
          k: Keys `[B,S,K,D]` in the accumulator dtype.
          transitions: The transitions.
          rows: R.
          columns: C; sequences are padded with identities to a multiple of it.
          invert: Inverts like `invert_unit_lower`.
        """

        def blocks(x):
            x = heads_first(x, columns)
            return x.reshape(*x.shape[:2], -1, rows, x.shape[-1])

        k, w = blocks(k), blocks(unit_directions(transitions.w))
        beta = blocks(transitions.beta.astype(k.dtype)[..., None])
        products = full_product("...rd,...sd->...rs", w, w)
        mix = _inverse(invert, beta * products) * beta.swapaxes(-1, -2)
        u = full_product("...rs,...sd->...rd", mix, w)
        below = jnp.tril(full_product("...rd,...sd->...rs", w, k), -1)
        e = full_product("...rs,...st->...rt", mix, below)
        return cls(k, w, u, e)

    def columns(self) -> jax.Array:
        """Returns the keys carried to the ends of blocks, `[...,R,D]`."""
        return self.k - full_product("...rs,...rd->...sd", self.e, self.w)

    def rows(self, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns rows `[...,R,D]` carried to the start of their block, and scores within it.

        The scores are meaningful on and below the diagonal.
        """
        reads = jnp.tril(full_product("...rd,...sd->...rs", q, self.w))
        scores = full_product("...rd,...sd->...rs", q, self.k)
        scores -= full_product("...rs,...st->...rt", reads, self.e)
        return q - full_product("...rs,...sd->...rd", reads, self.u), scores

    def whole(self) -> jax.Array:
        """Returns the products of all transitions of blocks, `T [...,D,D]`."""
        eye = jnp.eye(self.w.shape[-1], dtype=self.w.dtype)
        return eye - full_product("...rd,...re->...de", self.w, self.u)

    def tree(self) -> list[jax.Array]:
        """Returns what carries vectors across `2^l` blocks, for every level l but the last.

        For level l they are `[B,K,2·P,D,D]` with `P = ⌈N/2^(l+1)⌉` pairs; a missing half is the
        identity. They multiply vectors from the right: that of the even half of a pair the rows of
        the odd half, that of the odd one the columns of the even one.
        """
        whole, n, tree = self.whole(), self.k.shape[2], []
        for _ in range(num_levels(n) - 1):
            if whole.shape[2] % 2:
                identity = jnp.eye(whole.shape[-1], dtype=whole.dtype)
                identity = jnp.broadcast_to(identity, whole[:, :, :1].shape)
                whole = jnp.concatenate([whole, identity], 2)
            is_odd = (np.arange(whole.shape[2]) % 2 == 1)[:, None, None]
            tree.append(jnp.where(is_odd, whole.swapaxes(-1, -2), whole))
            whole = full_product("...de,...ef->...df", whole[:, :, 1::2], whole[:, :, ::2])
        return tree


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _inverse(invert: Callable[[jax.Array], jax.Array], a: jax.Array) -> jax.Array:
    """`invert(a)` with the gradient of an inverse, not that of its substitutions."""
    return invert(a)


def _inverse_fwd(invert, a):
    return (invert(a),) * 2


def _inverse_bwd(invert, inverse, inverse_bar):
    del invert
    a_bar = full_product("...ji,...jk->...ik", inverse, inverse_bar)
    return (-jnp.tril(full_product("...ij,...kj->...ik", a_bar, inverse), -1),)


_inverse.defvjp(_inverse_fwd, _inverse_bwd)


def num_levels(blocks: int) -> int:
    """Returns L, at least 1."""
    return max(1, (blocks - 1).bit_length())


def has_bit(blocks: int, level: int) -> np.ndarray:
    """Returns which numbers of blocks have bit `level`: bool `[N]`."""
    return (np.arange(blocks) >> level & 1).astype(bool)


def level_of(i: jax.Array, j: jax.Array) -> jax.Array:
    """Returns the level of two different blocks, int32."""
    return 31 - jax.lax.clz((i ^ j).astype(jnp.int32))


def at_levels(
    rows: jax.Array | None, columns: jax.Array | None, tree: list[jax.Array]
) -> jax.Array:
    """Returns the vectors of all tokens at every level, `[L,B,H,S',D]`.

    Args:
      rows: `[B,H,N,R,D]`, at the starts of their blocks. None: zeros at the levels where a block
        has rows.
      columns: `[B,H,N,R,D]`, at the ends of their blocks. None: zeros likewise.
      tree: `Blocks.tree`, whose heads K divide H.
    """
    b, heads, n, r, d = next(x.shape for x in (rows, columns) if x is not None)
    levels = []
    for level in range(num_levels(n)):
        is_row = has_bit(n, level)[:, None, None]
        x = jnp.where(is_row, 0 if rows is None else rows, 0 if columns is None else columns)
        levels.append(x.reshape(b, heads, n * r, d))
        if level < len(tree):
            # Across the other half of a pair: rows back over the earlier, columns over the later.
            halves = tree[level].reshape(*tree[level].shape[:2], -1, 2, d, d)
            over = jnp.flip(halves, 3).reshape(tree[level].shape)
            over = jnp.repeat(over, 1 << level, 2)[:, :, :n]
            grouped = x.reshape(b, over.shape[1], -1, n, r, d)
            x = full_product("bkgnrd,bknde->bkgnre", grouped, over).reshape(x.shape)
            rows = None if rows is None else jnp.where(is_row, x, rows)
            columns = None if columns is None else jnp.where(is_row, columns, x)
    return jnp.stack(levels)


def carries(tree: list[jax.Array], like: jax.Array) -> jax.Array:
    """Returns the matrices that carry vectors to every level, `[B,K,N,L,D,D]`.

    They multiply rows at the start of a block, where bit l of its number is set, and columns at its
    end, where it is not.

    Args:
      tree: `Blocks.tree`.
      like: Vectors of the blocks, `[B,K,N,R,D]`.
    """
    b, heads, n, _, d = like.shape
    identity = jnp.broadcast_to(jnp.eye(d, dtype=like.dtype), (b, heads, n, d, d))
    matrices = at_levels(identity, identity, tree)
    return jnp.moveaxis(matrices.reshape(-1, b, heads, n, d, d), 0, 3)


def carry_keys(
    k: jax.Array, transitions: Transitions, rows: int, columns: int
) -> tuple[jax.Array, jax.Array]:
    """Normalises keys and carries them to every level.

    Args:
      k: Keys `[B,S,K,D]`.
      transitions: The transitions.
      rows: Rows of a block, R.
      columns: The length is padded to a multiple of it.

    Returns:
      Keys `[L,B,K,S',D]` and the scores within blocks `[B,K,N,R,R]`, in the accumulator dtype.
    """
    blocks = Blocks.split(normalize_keys(k), transitions, rows, columns)
    back, scores = blocks.rows(blocks.k)
    return at_levels(back, blocks.columns(), blocks.tree()), scores


def carry_to_end(k: jax.Array, transitions: Transitions) -> jax.Array:
    """Returns keys `[B,S,K,D]` carried to the end of the sequence, in the accumulator dtype."""
    k = k.astype(accumulator_dtype(k.dtype))
    rows = 64  # Any size will do.
    blocks = Blocks.split(k, transitions, rows, rows)
    whole = blocks.whole()
    last = jnp.broadcast_to(jnp.eye(k.shape[-1], dtype=k.dtype), whole[:, :, :1].shape)
    later = jnp.concatenate([whole[:, :, 1:], last], 2)
    over = jax.lax.associative_scan(
        functools.partial(full_product, "...de,...ef->...df"), later, reverse=True, axis=2
    )
    carried = full_product("...rd,...ed->...re", blocks.columns(), over)
    return rows_first(carried.reshape(*carried.shape[:2], -1, k.shape[-1]), k.shape[1])


def take_at(x: jax.Array, level: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Returns `size` rows of a level of `x [L,B,K,S',D]` from `start`."""
    sizes = 1, *x.shape[1:3], size, x.shape[4]
    return jax.lax.dynamic_slice(x, _index(level, start), sizes)[0]


def add_at(x: jax.Array, rows: jax.Array, level: jax.Array, start: jax.Array) -> jax.Array:
    """Returns `x [L,B,K,S',D]` with `rows` added to those of a level from `start`."""
    total = take_at(x, level, start, rows.shape[-2]) + rows
    return jax.lax.dynamic_update_slice(x, total[None], _index(level, start))


def _index(level: jax.Array, start: jax.Array) -> list[jax.Array]:
    return [jnp.asarray(x, jnp.int32) for x in (level, 0, 0, start, 0)]


def visit_earlier(i, first, rows: int, columns: int, visit, carry):
    """Visits the tiles of block `i` before its diagonal, each of one level.

    Args:
      i: int32 `[]`.
      first: int32 `[]`, the first panel.
      rows: Rows of a block.
      columns: Columns of a panel: a power of two of blocks, or all columns.
      visit: Maps the level, the first column, the static width of the tile, and the carry to
        the next carry.
      carry: What the first visit takes.
    """
    per = columns // rows
    own = i // per
    carry = jax.lax.fori_loop(
        first, own, lambda p, c: visit(level_of(i, p * per), p * columns, columns, c), carry
    )
    return _visit_blocks(i, own * per, i, rows, per, visit, carry)


def visit_later(i, first, end, rows: int, columns: int, visit, carry):
    """`visit_earlier` of the tiles behind the diagonal, in panels from `first` up to `end`."""
    per = columns // rows
    own = i // per
    carry = _visit_blocks(i, i + 1, (own + 1) * per, rows, per, visit, carry)
    return jax.lax.fori_loop(
        jnp.maximum(own + 1, first),
        end,
        lambda p, c: visit(level_of(i, p * per), p * columns, columns, c),
        carry,
    )


def _visit_blocks(i, start, end, rows: int, per: int, visit, carry):
    """Visits the blocks of the panel of block `i`, whose levels differ."""
    if per == 1:
        return carry
    return jax.lax.fori_loop(
        start, end, lambda j, c: visit(level_of(i, j), j * rows, rows, c), carry
    )


def by_segment(segment_ids: jax.Array | None) -> tuple[Callable, Callable]:
    """Returns functions that sort the tokens of arrays `[B,S,…]` by segment, and sort them back.

    Products of transitions then never leave a segment, wherever its tokens are.
    """
    if segment_ids is None:
        return lambda x: x, lambda x: x
    order = jnp.argsort(segment_ids, axis=1, stable=True)

    def permute(places):
        return lambda x: jnp.take_along_axis(
            x, places.reshape(places.shape + (1,) * (x.ndim - 2)), 1
        )

    return permute(order), permute(jnp.argsort(order, axis=1))
