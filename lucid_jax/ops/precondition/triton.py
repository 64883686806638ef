"""The Triton kernels as a backend: what they support, their tiles, and how they are called."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lucid_jax.ops import target
from lucid_jax.ops.blocks import (
    ColumnRanges,
    batch_panel_bounds,
    heads_first,
    narrow_bounds,
    pad_axis,
    put,
    take,
)
from lucid_jax.ops.documents import entering_documents, order_by_depth, pad_segments
from lucid_jax.ops.numerics import ceil_div
from lucid_jax.ops.precondition import beta as learnt_beta
from lucid_jax.ops.precondition.block_inverses import BlockInverses
from lucid_jax.ops.precondition.gram import Keys, normalize_keys
from lucid_jax.ops.precondition.triton_schedule import Schedule, column_parts, inverse_rows
from pallas_kernels.scaling import key_scale
from pallas_kernels.triton.block_inverse import TILE, apply_inverse
from pallas_kernels.triton.diagonal import diagonal_inverses
from pallas_kernels.triton.key_gradient import cross_key_gradient, key_gradient
from pallas_kernels.triton.parts import width
from pallas_kernels.triton.product import product
from pallas_kernels.triton.scaled import Scaled
from pallas_kernels.triton.solve import Documents, solve
from pallas_kernels.triton.tiles import Tiles

# Pallas' interpreter instead of a GPU; the tests set it.
INTERPRET = False


def unsupported(k: jax.Array) -> str | None:
    """Says why the kernels cannot take this call, or returns None when they can."""
    if not INTERPRET and target.platform() != "gpu":
        return f"it needs a GPU; this is compiled for {target.platform()}"
    if k.dtype == jnp.float64:
        return "it computes in float16, bfloat16 or float32; got float64"
    if k.shape[-1] > 256:
        return f"it needs a head width of at most 256; got {k.shape[-1]}"
    return None


def unsupported_width(width: int) -> str | None:
    """Says why the kernels cannot take stripes in blocks of `width` rows, or returns None."""
    if width % 128:
        return f"it needs stripes of a width that 128 divides; got {width}"
    return None


@dataclasses.dataclass(frozen=True)
class TritonBackend:
    """The kernels for GPUs; see `backend.Backend`.

    `Keys` hold `k̃ [B,K,S',W]`, scaled and padded for the kernels, and padded segment ids.

    Attributes:
      schedule: Tiles for whole sequences; None for stripes, where each call chooses its own.
      width: Rows of a block of stripes; None for whole sequences.
      interpret: Whether Pallas' interpreter runs the kernels.
    """

    isolated: ClassVar[bool] = False

    schedule: Schedule | None = None
    width: int | None = None
    interpret: bool = False

    @classmethod
    def for_sequences(cls, k: jax.Array, precision: jax.lax.Precision | None) -> TritonBackend:
        """Makes the backend for whole sequences; float32 products are exact in any case."""
        del precision
        return cls(Schedule.choose(target.device_kind(), k.dtype, *k.shape), interpret=INTERPRET)

    @classmethod
    def for_stripes(cls, width: int) -> TritonBackend:
        """Makes the backend for stripes in blocks of `width` rows."""
        return cls(width=width, interpret=INTERPRET)

    def keys(
        self, k: jax.Array, segment_ids: jax.Array | None, beta: jax.Array | None = None
    ) -> Keys:
        """Normalises keys, where no inverse is needed, hence no β."""
        del beta
        d, multiple = k.shape[-1], self._schedule(k.dtype, k.shape).multiple
        k_hat = (normalize_keys(k) * key_scale(d)).astype(k.dtype)
        k_hat = pad_axis(heads_first(k_hat, multiple), 3, width(d))
        return Keys(k_hat, _pad_ids(segment_ids, multiple))

    def forward(
        self,
        k: jax.Array,
        rhs: jax.Array,
        segment_ids: jax.Array | None,
        beta: jax.Array | None,
    ) -> tuple[jax.Array, Scaled | None]:
        """Solves `A y = rhs`, in the dtype of `k`; the residual is `y` scaled, or None."""
        schedule = self._schedule(k.dtype, k.shape)
        keys, inverses = self.operands(schedule, k, segment_ids, beta)
        y, y_scaled, _ = self.solve(schedule, keys, inverses, rhs, k=k)
        return y, y_scaled

    def backward(
        self,
        k: jax.Array,
        y: jax.Array,
        y_scaled: Scaled | None,
        segment_ids: jax.Array | None,
        y_bar: jax.Array,
        dtype: jax.typing.DTypeLike,
        beta: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns `k̄` in `dtype` and `v̄`."""
        # The barrier makes the compiler compute keys and inverses again: kept since the forward
        # pass, they would take up to 1.7 times the memory of k, v and y.
        k, y_bar = jax.lax.optimization_barrier((k, y_bar))
        schedule = self._schedule(k.dtype, k.shape)
        keys, inverses = self.operands(schedule, k, segment_ids, beta)
        fused_y = (y_scaled or y) if schedule.fused else None
        v_bar, v_bar_scaled, upper = self.solve(
            schedule, keys, inverses, y_bar, reverse=True, k=k, y=fused_y
        )
        tiles = schedule.gradient
        k_bar = key_gradient(
            k, keys.k_hat, y, v_bar, keys.segment_ids, *column_limits(keys, tiles.rows),
            tiles=tiles, dtype=dtype, y_scaled=y_scaled, v_bar_scaled=v_bar_scaled, upper=upper,
            interpret=self.interpret,
        )  # fmt: skip
        return k_bar, v_bar

    def operands(
        self,
        schedule: Schedule,
        k: jax.Array,
        segment_ids: jax.Array | None = None,
        beta: jax.Array | None = None,
    ) -> tuple[Keys, jax.Array]:
        """Returns keys and inverses for a whole sequence, in the dtype of its products.

        It is float16 for bfloat16 keys, because bfloat16 rounds the entries of `A` to 8 bits, which
        is most of the error of `y`. With a learnt β it is not: rows of `y` are as small as β.
        """
        dtype = k.dtype if k.dtype == jnp.float32 or beta is not None else jnp.float16
        return self.diagonal(schedule, k, segment_ids, schedule.solve.rows, beta, dtype)

    def product(
        self, rows: Keys, columns: Keys, x: jax.Array, ranges: ColumnRanges | None = None
    ) -> jax.Array:
        """Multiplies `A_rc x` in float32.

        Where the rows are few, their programs share out the columns: each part of the columns
        takes copies of all rows, and the results are added up.
        """
        tiles = self._schedule(x.dtype, x.shape).product
        b, heads, length, _ = rows.k_hat.shape
        first, end = self._bounds(rows, columns, tiles, ranges)
        parts = column_parts(b * heads * length // tiles.rows, columns.length)
        if parts > 1:
            size = ceil_div(columns.length, parts * tiles.columns)
            start = jnp.repeat(jnp.arange(parts, dtype=jnp.int32) * size, length // tiles.rows)
            first = jnp.maximum(jnp.tile(first, (1, parts)), start)
            end = jnp.minimum(jnp.tile(end, (1, parts)), start + size)
            ids = rows.segment_ids
            rows = Keys(
                jnp.tile(rows.k_hat, (1, 1, parts, 1)),
                None if ids is None else jnp.tile(ids, (1, parts)),
            )
        out = product(
            rows.k_hat, columns.k_hat, x, rows.segment_ids, columns.segment_ids, first, end,
            tiles=tiles, interpret=self.interpret,
        )  # fmt: skip
        return out.reshape(b, parts, length, *out.shape[2:]).sum(1)

    def cross_gradient(
        self,
        k: jax.Array,
        rows: Keys,
        x: jax.Array,
        columns: Keys,
        x_columns: jax.Array,
        ranges: ColumnRanges | None = None,
    ) -> jax.Array:
        """Returns `k̄` in float32 of the rows of `−A_rc`, with cotangent `x_i·x_j`."""
        tiles = self._schedule(k.dtype, k.shape).gradient
        return cross_key_gradient(
            k, rows.k_hat, x, columns.k_hat, x_columns, rows.segment_ids, columns.segment_ids,
            *self._bounds(rows, columns, tiles, ranges), tiles=tiles, interpret=self.interpret,
        )  # fmt: skip

    def inverses(
        self,
        k: jax.Array,
        segment_ids: jax.Array | None,
        stripe: int,
        beta: jax.Array | None = None,
    ) -> jax.Array | BlockInverses:
        """Inverts the diagonal blocks of the kernel, or larger ones where they are faster."""
        b, s, heads, d = k.shape
        schedule = self._schedule(k.dtype, (b, stripe, heads, d))
        block = inverse_rows(target.device_kind(), k.dtype, stripe, b * heads, s, d)
        if block is None:
            return self.diagonal(schedule, k, segment_ids, schedule.solve.rows, beta)[1]
        keys, small = self.diagonal(schedule, k, segment_ids, 128, beta)
        return BlockInverses.join(keys, small.astype(jnp.float32).sum(3), block, d)

    def solve_stripe(
        self,
        keys: Keys,
        inverses: jax.Array | BlockInverses,
        index: jax.Array,
        rhs: jax.Array,
        *,
        reverse: bool = False,
    ) -> jax.Array:
        """Solves `A y = rhs` within one stripe, or the transposed system if `reverse`."""
        schedule = self._schedule(keys.k_hat.dtype, rhs.shape)
        if isinstance(inverses, BlockInverses):
            return self._solve_by_inverses(schedule, keys, inverses, index, rhs, reverse)
        blocks = keys.length // inverses.shape[-1]
        inverses = take(inverses, index * blocks, blocks, 2)
        return self.solve(schedule, keys, inverses, rhs, reverse=reverse)[0]

    def diagonal(
        self,
        schedule: Schedule,
        k: jax.Array,
        segment_ids: jax.Array | None,
        rows: int,
        beta: jax.Array | None = None,
        dtype: jax.typing.DTypeLike | None = None,
    ) -> tuple[Keys, jax.Array]:
        """Normalises keys, and inverts the diagonal blocks of `rows` rows."""
        segments = _pad_ids(segment_ids, schedule.multiple)
        k_hat, inverses = diagonal_inverses(
            k, segments, learnt_beta.roots(beta, schedule.multiple), rows=rows,
            multiple=schedule.multiple, dtype=dtype or k.dtype, interpret=self.interpret,
        )  # fmt: skip
        return Keys(k_hat, segments), inverses

    def solve(
        self,
        schedule: Schedule,
        keys: Keys,
        inverses: jax.Array,
        rhs: jax.Array,
        *,
        reverse: bool = False,
        k: jax.Array | None = None,
        y: jax.Array | Scaled | None = None,
    ) -> tuple[jax.Array, Scaled | None, jax.Array | None]:
        """Returns the solution in the dtype of `k`, or of the keys without it; see `solve`."""
        tiles = schedule.transposed if reverse else schedule.solve
        documents = _documents(keys, tiles.rows, reverse=reverse)
        dtype = keys.k_hat.dtype if k is None else k.dtype
        return solve(
            keys.k_hat, inverses, rhs, keys.segment_ids, documents, dtype=dtype,
            tiles=tiles, reverse=reverse, k=k, y=y, interpret=self.interpret,
        )  # fmt: skip

    def _solve_by_inverses(
        self,
        schedule: Schedule,
        keys: Keys,
        inverses: BlockInverses,
        index: jax.Array,
        rhs: jax.Array,
        reverse: bool,
    ) -> jax.Array:
        """Solves one stripe block after block, each by the product with its inverse."""
        b, length, heads, _ = rhs.shape
        size = inverses.whole.shape[-1]
        count, parts = length // size, column_parts(b * heads * size // TILE, size)
        y = jnp.zeros(rhs.shape, keys.k_hat.dtype)
        for i in reversed(range(count)) if reverse else range(count):
            own, left = slice(i * size, (i + 1) * size), rhs[:, i * size : (i + 1) * size]
            solved = slice((i + 1) * size, None) if reverse else slice(0, i * size)
            columns = keys.slice(solved)
            if columns.length:
                whole = dataclasses.replace(self, schedule=schedule, width=None)
                left = left - whole.product(keys.slice(own), columns, y[:, solved])
            y_i = apply_inverse(
                *inverses, index * count + i, left, parts=parts, transposed=reverse,
                interpret=self.interpret,
            )  # fmt: skip
            y = put(y, y_i.sum(0), i * size, 1)
        return y

    def _schedule(self, dtype: jnp.dtype, shape: tuple[int, ...]) -> Schedule:
        return self.schedule or Schedule.choose(target.device_kind(), dtype, *shape)

    def _bounds(
        self, rows: Keys, columns: Keys, tiles: Tiles, ranges: ColumnRanges | None
    ) -> tuple[jax.Array, jax.Array]:
        bounds = tile_bounds(rows, columns, tiles)
        if ranges is None or self.width is None:
            return bounds
        return narrow_bounds(bounds, ranges, self.width, tiles.rows, tiles.columns)


def tile_bounds(rows: Keys, columns: Keys, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """Returns the first tile of columns of each block of rows `[B,N]`, and one past the last."""
    if rows.segment_ids is None or columns.segment_ids is None:
        shape = rows.k_hat.shape[0], rows.length // tiles.rows
        end = columns.length // tiles.columns
        return jnp.zeros(shape, jnp.int32), jnp.full(shape, end, jnp.int32)
    return batch_panel_bounds(rows.segment_ids, columns.segment_ids, tiles.rows, tiles.columns)


def _pad_ids(segment_ids: jax.Array | None, multiple: int) -> jax.Array | None:
    return None if segment_ids is None else pad_segments(segment_ids, multiple)


def _documents(keys: Keys, rows: int, *, reverse: bool) -> Documents | None:
    """Returns the documents of packed sequences for a solve in blocks of `rows` rows."""
    if keys.segment_ids is None:
        return None
    entering = entering_documents(keys.segment_ids, rows, reverse=reverse)
    return Documents(order_by_depth(entering, rows), *entering)


def column_limits(keys: Keys, rows: int) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns the first column that shares a document with each block `[B,N]`, and the end."""
    if keys.segment_ids is None:
        return None, None
    start, _ = entering_documents(keys.segment_ids, rows)
    end, _ = entering_documents(keys.segment_ids, rows, reverse=True)
    return start, keys.length - jnp.flip(end, 1)
