"""Blockwise preconditioning in plain XLA: every platform, memory linear in S.

Rows are solved in blocks of R against panels of C columns, left-looking:

    forward    y_i = A_ii⁻¹ (v_i − Σ_{j<i} A_ij y_j)          i ascending
    backward   v̄_i = A_ii⁻ᵀ (ȳ_i − Σ_{j>i} A_ji v̄_j)          i descending

`A` is symmetric off the diagonal, so the backward sweep reads the same tiles. While it holds
a tile it also has all that the key gradient needs, `W_ji = −A_ji (v̄_j·y_i)`, because `v̄_j` is
final for `j > i`: one sweep of five products a tile, no second pass. Rows that are not solved
yet are zero, so a panel that reaches past the block adds nothing and needs no causal mask.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import (
    ColumnRanges,
    add,
    heads_first,
    narrow_bounds,
    panel_bounds,
    panel_width,
    put,
    rows_first,
    take,
)
from lucid_jax.ops.numerics import accumulator_dtype, ceil_div, product, round_up
from lucid_jax.ops.precondition.gram import Keys, diagonal_inverses, gram_tile, key_gradient


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows of a block (a power of two) and columns of a panel (a multiple of the rows)."""

    rows: int
    columns: int

    @classmethod
    def for_sequence(cls, length: int) -> Tiles:
        """Takes blocks of 128 rows, or one block that holds a shorter sequence."""
        rows = min(128, max(16, 1 << (length - 1).bit_length()))
        return cls(rows, min(panel_width(), round_up(length, rows)))

    @classmethod
    def for_stripes(cls, width: int) -> Tiles:
        """Takes tiles that divide blocks of `width` rows."""
        rows = width if width <= 128 else math.gcd(width, 128)
        most = min(panel_width(), width)
        panels = range(most - most % rows, 0, -rows)
        return cls(rows, next(c for c in panels if width % c == 0))


@dataclasses.dataclass(frozen=True)
class XlaBackend:
    """The blockwise backend; see `backend.Backend`.

    Attributes:
      precision: Precision of products.
      width: Rows of a block of stripes, None for whole sequences.
    """

    isolated: ClassVar[bool] = True

    precision: jax.lax.Precision | None = None
    width: int | None = None

    @classmethod
    def for_sequences(cls, k: jax.Array, precision: jax.lax.Precision | None) -> XlaBackend:
        """Makes the backend for whole sequences."""
        return cls(precision)

    @classmethod
    def for_stripes(cls, width: int) -> XlaBackend:
        """Makes the backend for stripes in blocks of `width` rows."""
        return cls(width=width)

    def _tiles(self, length: int) -> Tiles:
        return Tiles.for_stripes(self.width) if self.width else Tiles.for_sequence(length)

    def keys(
        self, k: jax.Array, segment_ids: jax.Array | None, beta: jax.Array | None = None
    ) -> Keys:
        """Normalises keys; those of whole sequences are padded to whole panels."""
        multiple = 1 if self.width else self._tiles(k.shape[1]).columns
        return Keys.normalize(k, segment_ids, multiple, beta)

    def forward(
        self,
        k: jax.Array,
        rhs: jax.Array,
        segment_ids: jax.Array | None,
        beta: jax.Array | None,
    ) -> tuple[jax.Array, None]:
        """Solves `A y = rhs`, in the dtype of `k`."""
        length, keys = k.shape[1], self.keys(k, segment_ids, beta)
        rhs = keys.align(rhs).astype(accumulator_dtype(rhs.dtype))
        y = _solve(self.precision, self._tiles(length), length, keys, rhs)
        return rows_first(y, length), None

    def backward(
        self,
        k: jax.Array,
        y: jax.Array,
        residual: None,
        segment_ids: jax.Array | None,
        y_bar: jax.Array,
        dtype: jax.typing.DTypeLike,
        beta: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns `k̄` in `dtype` and `v̄`."""
        length, keys = k.shape[1], self.keys(k, segment_ids, beta)
        v_bar, k_hat_bar = _solve_transposed(
            self.precision, self._tiles(length), length, keys, keys.align(y), keys.align(y_bar)
        )
        root = math.sqrt(k.shape[-1])
        k_bar = key_gradient(k.astype(dtype), rows_first(k_hat_bar, length) / root)
        return k_bar, rows_first(v_bar, length)

    def product(
        self, rows: Keys, columns: Keys, x: jax.Array, ranges: ColumnRanges | None = None
    ) -> jax.Array:
        """Multiplies `A_rc x`, in the accumulator dtype."""
        x, c = columns.align(x), self._tiles(columns.length).columns

        def term(a, panel, row, column):
            return product("bkrc,bkcd->bkrd", a, take(x, column, c), self.precision)

        return rows_first(self._sum_over_columns(rows, columns, ranges, term), rows.length)

    def cross_gradient(
        self,
        k: jax.Array,
        rows: Keys,
        x: jax.Array,
        columns: Keys,
        x_columns: jax.Array,
        ranges: ColumnRanges | None = None,
    ) -> jax.Array:
        """Returns `k̄` of the rows of `−A_rc`, with cotangent `x_i·x_j`."""
        x, x_columns = rows.align(x), columns.align(x_columns)
        r, c = self._tiles(rows.length).rows, self._tiles(columns.length).columns

        def term(a, panel, row, column):
            x_r, x_c = take(x, row, r), take(x_columns, column, c)
            w = -a * product("bkrd,bkcd->bkrc", x_r, x_c, self.precision)
            return product("bkrc,bkcd->bkrd", w, panel.k_hat, self.precision)

        out = self._sum_over_columns(rows, columns, ranges, term)
        root = math.sqrt(k.shape[-1])
        return key_gradient(k.astype(out.dtype), rows_first(out, k.shape[1]) / root)

    def inverses(
        self,
        k: jax.Array,
        segment_ids: jax.Array | None,
        stripe: int,
        beta: jax.Array | None = None,
    ) -> None:
        """Returns None: `solve_stripe` makes the inverses of its own stripe."""

    def solve_stripe(
        self, keys: Keys, inverses: None, index: jax.Array, rhs: jax.Array, *, reverse: bool = False
    ) -> jax.Array:
        """Solves `A y = rhs` within one stripe, or the transposed system if `reverse`."""
        if reverse:
            # A is symmetric off its diagonal: the transpose is the same solve, backwards.
            return jnp.flip(self.solve_stripe(keys.flip(), inverses, index, jnp.flip(rhs, 1)), 1)
        length = keys.length
        y = _solve(self.precision, self._tiles(length), length, keys, heads_first(rhs, 1))
        return rows_first(y, length)

    def _sum_over_columns(
        self, rows: Keys, columns: Keys, ranges: ColumnRanges | None, term: Callable
    ) -> jax.Array:
        tiles = Tiles(self._tiles(rows.length).rows, self._tiles(columns.length).columns)
        bounds = _panel_bounds(rows, columns, tiles)
        if ranges is not None and self.width is not None:
            bounds = narrow_bounds(bounds, ranges, self.width, tiles.rows, tiles.columns)
        return _sum_over_columns(self.precision, tiles, rows, columns, bounds, term)


def _solve(precision, tiles: Tiles, length: int, keys: Keys, rhs: jax.Array) -> jax.Array:
    """Solves by forward substitution: `y [B,K,S',D]` in the compute dtype, from float32 `rhs`."""
    r, c, n = tiles.rows, tiles.columns, ceil_div(length, tiles.rows)
    inverses = diagonal_inverses(keys.take(0, n * r), r, precision)
    first, _ = _panel_bounds(keys, keys, tiles)

    def solve_block(i, y):
        block = keys.take(i * r, r)

        def visit(p, update):
            a = gram_tile(block, keys.take(p * c, c), precision)
            return update + product("bkrc,bkcd->bkrd", a, take(y, p * c, c), precision)

        update = jax.lax.fori_loop(
            first[i], ceil_div(i * r, c), visit, jnp.zeros_like(rhs[:, :, :r])
        )
        y_i = product(
            "bkrs,bksd->bkrd",
            inverses[:, :, i],
            take(rhs, i * r, r) - update,
            jax.lax.Precision.HIGHEST,
        )
        return put(y, y_i, i * r)

    return jax.lax.fori_loop(0, n, solve_block, jnp.zeros(rhs.shape, keys.k_hat.dtype))


def _solve_transposed(
    precision, tiles: Tiles, length: int, keys: Keys, y: jax.Array, y_bar: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Solves by backward substitution, and adds up the key gradient in the same sweep.

    Returns:
      `v̄ [B,K,S',D]` in the compute dtype and `√D·k̂̄ [B,K,S',D]` in float32.
    """
    r, c, n = tiles.rows, tiles.columns, ceil_div(length, tiles.rows)
    inverses = diagonal_inverses(keys.take(0, n * r), r, precision)
    _, end = _panel_bounds(keys, keys, tiles)

    def solve_block(step, carry):
        v_bar, k_bar = carry
        i = n - 1 - step
        block, y_i = keys.take(i * r, r), take(y, i * r, r)
        zero = jnp.zeros(y_i.shape, k_bar.dtype)

        def visit(p, carry):
            k_bar, update, k_bar_i = carry
            panel, v_bar_p = keys.take(p * c, c), take(v_bar, p * c, c)
            a = gram_tile(block, panel, precision)
            update = update + product("bkrc,bkcd->bkrd", a, v_bar_p, precision)
            w = -a * product("bkrd,bkcd->bkrc", y_i, v_bar_p, precision)
            k_bar_i = k_bar_i + product("bkrc,bkcd->bkrd", w, panel.k_hat, precision)
            k_bar_p = product("bkrc,bkrd->bkcd", w, block.k_hat, precision)
            return add(k_bar, k_bar_p, p * c), update, k_bar_i

        end_i = jnp.minimum(end[i], ceil_div(n * r, c))
        k_bar, update, k_bar_i = jax.lax.fori_loop(
            (i + 1) * r // c, end_i, visit, (k_bar, zero, zero)
        )
        v_bar_i = product(
            "bksr,bksd->bkrd",
            inverses[:, :, i],
            take(y_bar, i * r, r).astype(zero.dtype) - update,
            jax.lax.Precision.HIGHEST,
        ).astype(v_bar.dtype)
        k_bar_i = k_bar_i + diagonal_gradient(precision, block, y_i, v_bar_i)
        return put(v_bar, v_bar_i, i * r), add(k_bar, k_bar_i, i * r)

    v_bar = jnp.zeros(y.shape, y.dtype)
    k_bar = jnp.zeros(y.shape, accumulator_dtype(y.dtype))
    return jax.lax.fori_loop(0, n, solve_block, (v_bar, k_bar))


def diagonal_gradient(precision, block: Keys, y: jax.Array, v_bar: jax.Array) -> jax.Array:
    """Returns the share of one diagonal block in `√D·k̂̄ [B,K,R,D]`, in float32."""
    a = gram_tile(block, block, precision)
    w = -a * product("bkrd,bkcd->bkrc", v_bar, y, precision)
    w = jnp.tril(w, -1)
    w = w + w.swapaxes(2, 3)
    return product("bkrc,bkcd->bkrd", w, block.k_hat, precision)


def _sum_over_columns(
    precision,
    tiles: Tiles,
    rows: Keys,
    columns: Keys,
    bounds: tuple[jax.Array, jax.Array],
    term: Callable[[jax.Array, Keys, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Sums a term over the tiles of `A_rc` within the bounds of each block of rows.

    Args:
      precision: Precision of the product of keys.
      tiles: R rows and C columns of a tile.
      rows: S' keys.
      columns: P' keys.
      bounds: The first panel of each block of rows, and one past the last.
      term: Maps a tile `[B,K,R,C]`, the keys of its columns, and the positions of its first
        row and first column to `[B,K,R,D]` in the accumulator dtype.

    Returns:
      `[B,K,S',D]` in the accumulator dtype.
    """
    r, c = tiles.rows, tiles.columns
    first, end = bounds

    def visit_block(i, out):
        block = rows.take(i * r, r)

        def visit(p, total):
            panel = columns.take(p * c, c)
            return total + term(gram_tile(block, panel, precision), panel, i * r, p * c)

        total = jax.lax.fori_loop(first[i], end[i], visit, take(out, i * r, r))
        return put(out, total, i * r)

    zero = jnp.zeros(rows.k_hat.shape, accumulator_dtype(rows.k_hat.dtype))
    return jax.lax.fori_loop(0, rows.length // r, visit_block, zero)


def _panel_bounds(rows: Keys, columns: Keys, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    return panel_bounds(
        rows.segment_ids,
        columns.segment_ids,
        tiles.rows,
        tiles.columns,
        num_rows=rows.length,
        num_columns=columns.length,
    )
