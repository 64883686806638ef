"""Blockwise preconditioning in plain XLA: every platform, memory linear in S.

Rows are solved in blocks of R against panels of C columns, left-looking:

    forward    y_i = A_ii⁻¹ (v_i − Σ_{j<i} A_ij y_j)          i ascending
    backward   v̄_i = A_ii⁻ᵀ (ȳ_i − Σ_{j>i} A_ji v̄_j)          i descending

`A` is symmetric off the diagonal, so the backward sweep reads the same tiles. While
it holds a tile it also has all that the key gradient needs, `W_ji = −A_ji (v̄_j·y_i)`,
because `v̄_j` is final for `j > i`: one sweep of five products a tile, no second pass.
Rows not solved yet are zero, so a panel that reaches past the block adds nothing and
needs no causal mask. A prefix is a rectangle of the same tiles, taken off `v` first.
`BlockOps` are those tiles for a solve across devices (`lucid_jax.parallel.context_attention`).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import (
    add,
    heads_first,
    panel_bounds,
    panel_width,
    put,
    round_up,
    rows_first,
    take,
    within,
)
from lucid_jax.ops.precondition.gram import (
    Keys,
    accumulator_dtype,
    diagonal_inverses,
    gram_tile,
    key_gradient,
)
from lucid_jax.ops.precondition.prefix import Prefix
from lucid_jax.ops.remat import save_for_backward


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows of a block (a power of two) and columns of a panel (a multiple of the rows)."""

    rows: int
    columns: int

    @classmethod
    def choose(cls, length: int) -> Tiles:
        """Blocks of 128; a short sequence takes the one that holds it."""
        rows = min(128, max(16, 1 << (length - 1).bit_length()))
        return cls(rows, min(panel_width(), round_up(length, rows)))


def precondition(
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    prefix: Prefix | None,
    precision: jax.lax.Precision | None,
) -> jax.Array:
    """Solves `A_cc y = v − A_cp y_p` blockwise; shapes as in the public op."""
    return _precondition(precision, k, v, segment_ids, prefix)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _precondition(precision, k, v, segment_ids, prefix):
    return _precondition_fwd(precision, k, v, segment_ids, prefix)[0]


def _precondition_fwd(precision, k, v, segment_ids, prefix):
    length, tiles = k.shape[1], Tiles.choose(k.shape[1])
    keys = Keys.of(k, segment_ids, tiles.columns)
    rhs = heads_first(v, tiles.columns).astype(accumulator_dtype(v.dtype))
    if prefix is not None:
        rhs = rhs - _prefix_update(precision, tiles.rows, keys, prefix)
    y = rows_first(_solve(precision, tiles, length, keys, rhs).astype(v.dtype), length)
    y = save_for_backward(y)
    return y, (k, y, segment_ids, prefix)


def _precondition_bwd(precision, residuals, y_bar):
    k, y, segment_ids, prefix = residuals
    length, tiles = k.shape[1], Tiles.choose(k.shape[1])
    keys = Keys.of(k, segment_ids, tiles.columns)
    y, y_bar = (heads_first(x, tiles.columns) for x in (y, y_bar))
    v_bar, k_hat_bar = _solve_transposed(precision, tiles, length, keys, y, y_bar)
    prefix_bar = None
    if prefix is not None:
        k_hat_bar_of_prefix, prefix_bar = _prefix_update_transposed(
            precision, tiles, keys, prefix, v_bar
        )
        k_hat_bar = k_hat_bar + k_hat_bar_of_prefix
    root = math.sqrt(k.shape[-1])
    k_bar = key_gradient(k, rows_first(k_hat_bar, length) / root)
    return k_bar, rows_first(v_bar, length), None, prefix_bar


_precondition.defvjp(_precondition_fwd, _precondition_bwd)


def _solve(precision, tiles: Tiles, length: int, keys: Keys, rhs: jax.Array) -> jax.Array:
    """Forward substitution: `y [B,K,S',D]` in the compute dtype, from `rhs` in float32."""
    r, c, n = tiles.rows, tiles.columns, -(-length // tiles.rows)
    inverses = diagonal_inverses(keys.take(0, n * r), r, precision)
    first, _ = _bounds(keys, keys, r, c)

    def solve_block(i, y):
        block = keys.take(i * r, r)

        def visit(p, update):
            a = gram_tile(block, keys.take(p * c, c), precision)
            return update + _product("bkrc,bkcd->bkrd", a, take(y, p * c, c), precision)

        update = jax.lax.fori_loop(first[i], -(-i * r // c), visit, jnp.zeros_like(rhs[:, :, :r]))
        y_i = _product(
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
    """Backward substitution and key gradient in one sweep.

    Returns:
      `v̄ [B,K,S',D]` in the compute dtype and `√D·k̂̄ [B,K,S',D]` in float32.
    """
    r, c, n = tiles.rows, tiles.columns, -(-length // tiles.rows)
    inverses = diagonal_inverses(keys.take(0, n * r), r, precision)
    _, end = _bounds(keys, keys, r, c)

    def solve_block(step, carry):
        v_bar, k_bar = carry
        i = n - 1 - step
        block, y_i = keys.take(i * r, r), take(y, i * r, r)
        zero = jnp.zeros(y_i.shape, k_bar.dtype)

        def visit(p, carry):
            k_bar, update, k_bar_i = carry
            panel, v_bar_p = keys.take(p * c, c), take(v_bar, p * c, c)
            a = gram_tile(block, panel, precision)
            update = update + _product("bkrc,bkcd->bkrd", a, v_bar_p, precision)
            w = -a * _product("bkrd,bkcd->bkrc", y_i, v_bar_p, precision)
            k_bar_i = k_bar_i + _product("bkrc,bkcd->bkrd", w, panel.k_hat, precision)
            k_bar_p = _product("bkrc,bkrd->bkcd", w, block.k_hat, precision)
            return add(k_bar, k_bar_p, p * c), update, k_bar_i

        end_i = jnp.minimum(end[i], -(-n * r // c))
        k_bar, update, k_bar_i = jax.lax.fori_loop(
            (i + 1) * r // c, end_i, visit, (k_bar, zero, zero)
        )
        v_bar_i = _product(
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
    """`√D·k̂̄ [B,K,R,D]` in float32 of a diagonal block alone, given its `y` and `v̄`."""
    a = gram_tile(block, block, precision)
    w = -a * _product("bkrd,bkcd->bkrc", v_bar, y, precision)
    w = jnp.tril(w, -1)
    w = w + w.swapaxes(2, 3)
    return _product("bkrc,bkcd->bkrd", w, block.k_hat, precision)


def _rectangle_product(
    precision, tiles: Tiles, rows: Keys, columns: Keys, x: jax.Array, bounds
) -> jax.Array:
    """`A_rc x [B,K,S',D]` in float32, of the panels within bounds of each block of rows."""
    r, c = tiles.rows, tiles.columns

    def visit_block(i, out):
        block = rows.take(i * r, r)

        def visit(p, total):
            a = gram_tile(block, columns.take(p * c, c), precision)
            return total + _product("bkrc,bkcd->bkrd", a, take(x, p * c, c), precision)

        return put(out, _over_panels(bounds, i, visit, take(out, i * r, r)), i * r)

    zero = jnp.zeros(rows.k_hat.shape, accumulator_dtype(x.dtype))
    return jax.lax.fori_loop(0, rows.length // r, visit_block, zero)


def _rectangle_gradient(
    precision, tiles: Tiles, rows: Keys, x: jax.Array, columns: Keys, x_columns: jax.Array, bounds
) -> jax.Array:
    """`√D·k̂̄ [B,K,S',D]` in float32 of the rows of `−A_rc`, whose cotangent is `x_i·x_j`."""
    r, c = tiles.rows, tiles.columns

    def visit_block(i, out):
        block, x_i = rows.take(i * r, r), take(x, i * r, r)

        def visit(p, total):
            panel = columns.take(p * c, c)
            a = gram_tile(block, panel, precision)
            w = -a * _product("bkrd,bkcd->bkrc", x_i, take(x_columns, p * c, c), precision)
            return total + _product("bkrc,bkcd->bkrd", w, panel.k_hat, precision)

        return put(out, _over_panels(bounds, i, visit, take(out, i * r, r)), i * r)

    zero = jnp.zeros(rows.k_hat.shape, accumulator_dtype(x.dtype))
    return jax.lax.fori_loop(0, rows.length // r, visit_block, zero)


def _over_panels(bounds, i, visit, initial: jax.Array) -> jax.Array:
    first, end = bounds
    return jax.lax.fori_loop(first[i], end[i], visit, initial)


def _prefix_columns(prefix: Prefix) -> tuple[Keys, jax.Array, Tiles]:
    """The prefix as columns, its `y [B,K,P',D]`, and its tiles."""
    tiles = Tiles.choose(prefix.k.shape[1])
    columns = Keys.of(prefix.k, prefix.segment_ids, tiles.columns)
    return columns, heads_first(prefix.y, tiles.columns), tiles


def _prefix_update(precision, r: int, keys: Keys, prefix: Prefix) -> jax.Array:
    """`A_cp y_p [B,K,S',D]` in float32."""
    columns, y, tiles = _prefix_columns(prefix)
    bounds = _bounds(keys, columns, r, tiles.columns)
    return _rectangle_product(precision, Tiles(r, tiles.columns), keys, columns, y, bounds)


def _prefix_update_transposed(
    precision, tiles: Tiles, keys: Keys, prefix: Prefix, v_bar: jax.Array
) -> tuple[jax.Array, Prefix]:
    """The gradients of `v − A_cp y_p`, given that of its value: `√D·k̂̄` and of the prefix."""
    columns, y, own = _prefix_columns(prefix)
    bounds = _bounds(keys, columns, tiles.rows, own.columns)
    across = Tiles(tiles.rows, own.columns)
    k_bar = _rectangle_gradient(precision, across, keys, v_bar, columns, y, bounds)
    bounds = _bounds(columns, keys, own.rows, tiles.columns)
    back = Tiles(own.rows, tiles.columns)
    prefix_k_bar = _rectangle_gradient(precision, back, columns, y, keys, v_bar, bounds)
    prefix_y_bar = -_rectangle_product(precision, back, columns, keys, v_bar, bounds)
    length, root = prefix.k.shape[1], math.sqrt(prefix.k.shape[-1])
    return k_bar, Prefix(
        k=key_gradient(prefix.k, rows_first(prefix_k_bar, length) / root),
        y=rows_first(prefix_y_bar, length).astype(prefix.y.dtype),
    )


@dataclasses.dataclass(frozen=True)
class BlockOps:
    """The solve and the rectangles of `A` in blocks of `width` rows; see `pieces`."""

    width: int

    @property
    def _tiles(self) -> Tiles:
        rows = self.width if self.width <= 128 else math.gcd(self.width, 128)
        most = min(panel_width(), self.width)
        panels = range(most - most % rows, 0, -rows)
        return Tiles(rows, next(c for c in panels if self.width % c == 0))

    def keys(self, k: jax.Array, segment_ids: jax.Array | None) -> Keys:
        """Rows or columns of rectangles."""
        return Keys.of(k, segment_ids, 1)

    def inverses(self, k: jax.Array, segment_ids: jax.Array | None, rows: int) -> None:
        """None: the solve makes them."""

    def solve(
        self,
        keys: Keys,
        inverses: None,
        stripe: jax.Array,
        rhs: jax.Array,
        *,
        reverse: bool = False,
    ) -> jax.Array:
        """`A⁻¹ rhs`, or `A⁻ᵀ rhs` with `reverse`, in the dtype of the keys."""
        if reverse:
            return jnp.flip(self.solve(keys.flip(), inverses, stripe, jnp.flip(rhs, 1)), 1)
        length = keys.length
        return rows_first(_solve(None, self._tiles, length, keys, heads_first(rhs, 1)), length)

    def product(
        self, rows: Keys, columns: Keys, x: jax.Array, first: jax.Array, end: jax.Array
    ) -> jax.Array:
        """`A_rc x` in float32."""
        tiles, bounds = self._tiles, self._within(rows, columns, first, end)
        out = _rectangle_product(None, tiles, rows, columns, heads_first(x, 1), bounds)
        return rows_first(out, rows.length)

    def key_gradient(
        self,
        k: jax.Array,
        rows: Keys,
        x: jax.Array,
        columns: Keys,
        x_columns: jax.Array,
        first: jax.Array,
        end: jax.Array,
    ) -> jax.Array:
        """`k̄` in float32 of the rows of `−A_rc`, whose cotangent is `x_i·x_j`."""
        tiles, bounds = self._tiles, self._within(rows, columns, first, end)
        x, x_columns = (heads_first(x, 1) for x in (x, x_columns))
        out = _rectangle_gradient(None, tiles, rows, x, columns, x_columns, bounds)
        root = math.sqrt(k.shape[-1])
        return key_gradient(k.astype(out.dtype), rows_first(out, rows.length) / root)

    def _within(self, rows: Keys, columns: Keys, first, end) -> tuple[jax.Array, jax.Array]:
        tiles = self._tiles
        bounds = _bounds(rows, columns, tiles.rows, tiles.columns)
        return within(bounds, first, end, self.width, tiles.rows, tiles.columns)


def _product(spec: str, a: jax.Array, b: jax.Array, precision) -> jax.Array:
    """A product of operands in `b`'s dtype, accumulated in float32 (or float64)."""
    dtype = accumulator_dtype(b.dtype)
    return jnp.einsum(spec, a.astype(b.dtype), b, precision=precision, preferred_element_type=dtype)


def _bounds(rows: Keys, columns: Keys, r: int, c: int) -> tuple[jax.Array, jax.Array]:
    return panel_bounds(
        rows.segment_ids,
        columns.segment_ids,
        r,
        c,
        num_rows=rows.length,
        num_columns=columns.length,
    )
