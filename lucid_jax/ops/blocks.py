"""Blocks of rows and panels of columns: the bookkeeping that blockwise ops share."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.ops import target
from lucid_jax.ops.numerics import ceil_div, round_up


class ColumnRanges(NamedTuple):
    """The columns that each block of rows takes: int32 `[N]`, multiples of the block's width.

    Attributes:
      first: The first column.
      end: One past the last; not above `first` where there is none.
    """

    first: jax.Array
    end: jax.Array


def panel_width() -> int:
    """Returns the columns of a panel against blocks of 128 rows.

    On a CPU a square tile stays in cache, and a panel of 1024 takes twice the time
    (experiments/xla_precondition). An accelerator launches every tile, so it takes wider ones.
    """
    return 128 if target.platform() == "cpu" else 1024


def pad_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Pads the end of `axis` with zeros up to `size`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def heads_first(x: jax.Array, multiple: int) -> jax.Array:
    """Turns `[B,S,K,D]` into `[B,K,S',D]`, zero-padded to a multiple."""
    return pad_axis(x, 1, round_up(x.shape[1], multiple)).swapaxes(1, 2)


def rows_first(x: jax.Array, length: int) -> jax.Array:
    """Turns `[B,K,S',D]` into `[B,S,K,D]`, without the padding."""
    return x[:, :, :length].swapaxes(1, 2)


def take(x: jax.Array, start: jax.Array | int, size: int, axis: int = -2) -> jax.Array:
    """Returns `size` rows of `x` from `start`."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def put(x: jax.Array, rows: jax.Array, start: jax.Array | int, axis: int = -2) -> jax.Array:
    """Returns `x` with `rows` written at `start`."""
    return jax.lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), start, axis)


def add(x: jax.Array, rows: jax.Array, start: jax.Array | int, axis: int = -2) -> jax.Array:
    """Returns `x` with `rows` added to those at `start`."""
    return put(x, take(x, start, rows.shape[axis], axis) + rows, start, axis)


def same_segment(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Returns the mask `[B,1,R,C]` of equal segment ids, from `[B,R]` and `[B,C]`."""
    return rows[:, None, :, None] == columns[:, None, None, :]


def panel_bounds(
    rows: jax.Array | None,
    columns: jax.Array | None,
    row_block: int,
    panel: int,
    *,
    num_rows: int,
    num_columns: int,
) -> tuple[jax.Array, jax.Array]:
    """Finds the panels that may share a segment with each block of rows, in any sequence.

    Blocks whose ranges of ids do not overlap share no segment, so a loop within these bounds
    gives packed sequences their block-sparse cost. The tiles within the bounds are still masked.

    Args:
      rows: Segment ids `[B, num_rows]`, or None for one segment.
      columns: Segment ids `[B, num_columns]`, or None.
      row_block: Rows of a block; divides `num_rows`.
      panel: Columns of a panel; divides `num_columns`.
      num_rows: Rows, padding included.
      num_columns: Columns, padding included.

    Returns:
      The first panel `[num_rows/row_block]` and one past the last, int32; `end < first` where
      a block shares a segment with no panel.
    """
    n, m = num_rows // row_block, num_columns // panel
    if rows is None or columns is None:
        return jnp.zeros(n, jnp.int32), jnp.full(n, m, jnp.int32)
    first, end = batch_panel_bounds(rows, columns, row_block, panel)
    return first.min(0), end.max(0)


def batch_panel_bounds(
    rows: jax.Array, columns: jax.Array, row_block: int, panel: int
) -> tuple[jax.Array, jax.Array]:
    """`panel_bounds` of each sequence by itself, `[B, num_rows/row_block]` each."""
    b, m = rows.shape[0], columns.shape[1] // panel
    r = rows.reshape(b, -1, 1, row_block)
    c = columns.reshape(b, 1, m, panel)
    overlap = (r.min(-1) <= c.max(-1)) & (c.min(-1) <= r.max(-1))
    panels = jnp.arange(m, dtype=jnp.int32)
    return jnp.where(overlap, panels, m).min(-1), jnp.where(overlap, panels + 1, 0).max(-1)


def narrow_bounds(
    bounds: tuple[jax.Array, jax.Array], ranges: ColumnRanges, width: int, rows: int, columns: int
) -> tuple[jax.Array, jax.Array]:
    """Narrows bounds of tiles to those that hold a range of columns for each `width` rows.

    Args:
      bounds: The first tile of columns of each block of rows, and one past the last: `[…,N]`.
      ranges: A range of columns for each `width` rows: int32 `[N·rows/width]`.
      width: Rows that share a range.
      rows: Rows of a block; divides `width`.
      columns: Columns of a tile.
    """
    first = jnp.repeat(ranges.first // columns, width // rows)
    end = jnp.repeat(ceil_div(ranges.end, columns), width // rows)
    return jnp.maximum(bounds[0], first), jnp.minimum(bounds[1], end)
