"""Rows and panels of rows: the bookkeeping that the blockwise XLA ops share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.ops import target


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


def panel_width() -> int:
    """Columns of a panel against blocks of 128 rows.

    On a CPU a square tile stays in cache: a panel of 1024 takes twice the time
    (experiments/xla_precondition). An accelerator launches every tile, so fewer, wider.
    """
    return 128 if target.platform() == "cpu" else 1024


def pad_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Zero-pads the end of `axis` up to `size`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def heads_first(x: jax.Array, multiple: int) -> jax.Array:
    """`[B,S,K,D]` to `[B,K,S',D]`, zero-padded to a multiple."""
    return pad_axis(x, 1, round_up(x.shape[1], multiple)).swapaxes(1, 2)


def rows_first(x: jax.Array, length: int) -> jax.Array:
    """`[B,K,S',D]` to `[B,S,K,D]`, without the padding."""
    return x[:, :, :length].swapaxes(1, 2)


def take(x: jax.Array, start: jax.Array | int, size: int, axis: int = -2) -> jax.Array:
    """`size` rows of `x` from `start`."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def put(x: jax.Array, rows: jax.Array, start: jax.Array | int, axis: int = -2) -> jax.Array:
    """`x` with `rows` written at `start`."""
    return jax.lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), start, axis)


def add(x: jax.Array, rows: jax.Array, start: jax.Array | int, axis: int = -2) -> jax.Array:
    """`x` with `rows` added to those at `start`."""
    return put(x, take(x, start, rows.shape[axis], axis) + rows, start, axis)


def same_segment(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Mask `[B,1,R,C]` of equal segment ids, from `[B,R]` and `[B,C]`."""
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
    """First panel and one past the last that can share a segment with each block of rows.

    Blocks whose ranges of ids do not overlap in any batch row share no segment. A
    loop within these bounds gives packed rows their block-sparse cost; what it
    visits in vain is still masked.

    Args:
      rows: Segment ids `[B, num_rows]`, or None for one segment.
      columns: Segment ids `[B, num_columns]`, or None.
      row_block: Rows of a block; divides `num_rows`.
      panel: Columns of a panel; divides `num_columns`.
      num_rows: QueryPositions, padding included.
      num_columns: Columns, padding included.

    Returns:
      `first [num_rows/row_block]` and `end`, int32; `end < first` where there is none.
    """
    n, m = num_rows // row_block, num_columns // panel
    if rows is None or columns is None:
        return jnp.zeros(n, jnp.int32), jnp.full(n, m, jnp.int32)
    first, end = batch_panel_bounds(rows, columns, row_block, panel)
    return first.min(0), end.max(0)


def batch_panel_bounds(
    rows: jax.Array, columns: jax.Array, row_block: int, panel: int
) -> tuple[jax.Array, jax.Array]:
    """`panel_bounds` of each batch row by itself: `[B, num_rows/row_block]` each."""
    b, m = rows.shape[0], columns.shape[1] // panel
    r = rows.reshape(b, -1, 1, row_block)
    c = columns.reshape(b, 1, m, panel)
    overlap = (r.min(-1) <= c.max(-1)) & (c.min(-1) <= r.max(-1))
    panels = jnp.arange(m, dtype=jnp.int32)
    return jnp.where(overlap, panels, m).min(-1), jnp.where(overlap, panels + 1, 0).max(-1)


def within(
    bounds: tuple[jax.Array, jax.Array],
    first: jax.Array,
    end: jax.Array,
    width: int,
    rows: int,
    columns: int,
) -> tuple[jax.Array, jax.Array]:
    """Bounds of tiles, narrowed to those that hold a range of columns for each `width` rows.

    Args:
      bounds: First tile of columns of each block of rows, and one past the last: `[…,N]`.
      first: int32 `[N·rows/width]`, the first column.
      end: int32, likewise, one past the last.
      width: Rows that share a range.
      rows: Rows of a block; divides `width`.
      columns: Columns of a tile.
    """
    first, end = (jnp.repeat(x, width // rows) for x in (first // columns, -(-end // columns)))
    return jnp.maximum(bounds[0], first), jnp.minimum(bounds[1], end)
