"""The Mosaic kernels for TPUs as a backend: what they support, their tiles, how they are called."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.ops import target
from lucid_jax.ops.blocks import (
    ColumnRanges,
    batch_panel_bounds,
    heads_first,
    narrow_bounds,
    pad_axis,
    rows_first,
)
from lucid_jax.ops.by_batch import by_batch
from lucid_jax.ops.numerics import round_up
from lucid_jax.ops.precondition import beta as learnt_beta
from lucid_jax.ops.precondition.gram import Keys, key_gradient, normalize_keys
from pallas_kernels.mosaic_tpu import tile
from pallas_kernels.mosaic_tpu.cross_gradient import cross_key_gradient
from pallas_kernels.mosaic_tpu.diagonal import diagonal_inverses
from pallas_kernels.mosaic_tpu.product import product
from pallas_kernels.mosaic_tpu.solve import solve
from pallas_kernels.mosaic_tpu.solve_transposed import solve_transposed
from pallas_kernels.mosaic_tpu.tiles import Tiles, vmem_capacity
from pallas_kernels.scaling import key_scale

# Pallas' TPU interpreter instead of a TPU; the tests set its parameters.
INTERPRET: tile.Interpret = False
_SMALLEST_VMEM = 16 * 2**20


def unsupported(k: jax.Array) -> str | None:
    """Says why the kernels cannot take this call, or returns None when they can."""
    if not INTERPRET and target.platform() != "tpu":
        return f"it needs a TPU; this is compiled for {target.platform()}"
    if k.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it computes in bfloat16 or float32; got {k.dtype.name}"
    if k.shape[-1] > 256:
        return f"it needs a head width of at most 256; got {k.shape[-1]}"
    return None


def unsupported_width(width: int) -> str | None:
    """Says why the kernels cannot take stripes in blocks of `width` rows, or returns None."""
    if width % tile.BLOCK:
        return f"it needs stripes of a width that {tile.BLOCK} divides; got {width}"
    return None


@dataclasses.dataclass(frozen=True)
class MosaicTpuBackend:
    """The kernels for TPUs; see `backend.Backend`.

    `Keys` hold `k̃ [B,K,S',W]`, scaled and padded for the kernels, and padded segment ids.

    Attributes:
      tiles: Tiles for whole sequences; None for stripes, where each call chooses its own.
      width: Rows of a block of stripes; None for whole sequences.
      interpret: Parameters of Pallas' TPU interpreter, or False.
    """

    isolated: ClassVar[bool] = True

    tiles: Tiles | None = None
    width: int | None = None
    interpret: tile.Interpret = False

    @classmethod
    def for_sequences(cls, k: jax.Array, precision: jax.lax.Precision | None) -> MosaicTpuBackend:
        """Makes the backend for whole sequences; its products keep the operands' precision."""
        del precision
        _, s, _, d = k.shape
        return cls(Tiles.choose(k.dtype, s, d, _capacity()), interpret=INTERPRET)

    @classmethod
    def for_stripes(cls, width: int) -> MosaicTpuBackend:
        """Makes the backend for stripes in blocks of `width` rows."""
        return cls(width=width, interpret=INTERPRET)

    def keys(
        self, k: jax.Array, segment_ids: jax.Array | None, beta: jax.Array | None = None
    ) -> Keys:
        """Normalises and scales keys."""
        k_hat = (normalize_keys(k) * key_scale(k.shape[-1])).astype(k.dtype)
        multiple = self.tiles.rows if self.tiles else 1
        k_hat = pad_axis(heads_first(k_hat, multiple), 3, tile.width(k.shape[-1]))
        if segment_ids is not None:
            segment_ids = pad_axis(segment_ids, 1, k_hat.shape[2])
        return Keys(k_hat, segment_ids, learnt_beta.roots(beta, multiple))

    def forward(
        self,
        k: jax.Array,
        rhs: jax.Array,
        segment_ids: jax.Array | None,
        beta: jax.Array | None,
    ) -> tuple[jax.Array, None]:
        """Solves `A y = rhs`, in the dtype of `k`."""
        tiles = self.tiles
        assert tiles is not None

        @by_batch
        def run(k, rhs, segment_ids, beta):
            return self._solve(tiles, self.keys(k, segment_ids, beta), rhs)

        return run(k, rhs, segment_ids, beta), None

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
        tiles = self.tiles
        assert tiles is not None

        @by_batch
        def run(k, y, segment_ids, y_bar, beta):
            options = self._options(tiles, k.shape[-1])
            rows = _Systems.from_keys(self.keys(k, segment_ids, beta), tiles)
            inverses = diagonal_inverses(
                rows.k_hat, rows.row_segments, rows.root_beta, transposed=True, **options
            )
            _, end = rows.blocks()
            v_bar, k_hat_bar = solve_transposed(
                rows.k_hat, inverses, _systems(y, tiles), _systems(y_bar, tiles),
                rows.row_segments, rows.column_segments, end, **options,
            )  # fmt: skip
            k_bar = key_gradient(k.astype(dtype), _batch(k_hat_bar, k.shape))
            return k_bar, _batch(v_bar, y.shape)

        return run(k, y, segment_ids, y_bar, beta)

    def product(
        self, rows: Keys, columns: Keys, x: jax.Array, ranges: ColumnRanges | None = None
    ) -> jax.Array:
        """Multiplies `A_rc x` in float32."""
        tiles = self._rectangle_tiles(x, columns)

        def run(rows, columns, x):
            row_systems, column_systems = (_Systems.from_keys(k, tiles) for k in (rows, columns))
            out = product(
                row_systems.k_hat, column_systems.k_hat, _systems(x, tiles),
                *row_systems.rectangle(column_systems, ranges, self.width),
                **self._options(tiles, x.shape[-1]),
            )  # fmt: skip
            return _batch(out, (x.shape[0], rows.length, *x.shape[2:]))

        return (by_batch(run) if ranges is None else run)(rows, columns, x)

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
        tiles = self._rectangle_tiles(k, columns)

        def run(k, rows, x, columns, x_columns):
            row_systems, column_systems = (_Systems.from_keys(k, tiles) for k in (rows, columns))
            k_hat_bar = cross_key_gradient(
                row_systems.k_hat, _systems(x, tiles),
                column_systems.k_hat, _systems(x_columns, tiles),
                *row_systems.rectangle(column_systems, ranges, self.width),
                **self._options(tiles, k.shape[-1]),
            )  # fmt: skip
            return key_gradient(k.astype(k_hat_bar.dtype), _batch(k_hat_bar, k.shape))

        return (by_batch(run) if ranges is None else run)(k, rows, x, columns, x_columns)

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
        tiles = Tiles.choose(keys.k_hat.dtype, keys.length, rhs.shape[-1], _capacity())
        length, ids, roots = round_up(keys.length, tiles.rows), keys.segment_ids, keys.root_beta
        keys = Keys(
            pad_axis(keys.k_hat, 2, length),
            None if ids is None else pad_axis(ids, 1, length),
            None if roots is None else pad_axis(roots, 2, length),
        )
        return self._solve(tiles, keys, rhs)

    def _solve(self, tiles: Tiles, keys: Keys, rhs: jax.Array) -> jax.Array:
        options = self._options(tiles, rhs.shape[-1])
        rows = _Systems.from_keys(keys, tiles)
        inverses = diagonal_inverses(
            rows.k_hat, rows.row_segments, rows.root_beta, transposed=False, **options
        )
        first, _ = rows.blocks()
        y = solve(
            rows.k_hat, inverses, _systems(rhs, tiles), rows.row_segments, rows.column_segments,
            first, **options,
        )  # fmt: skip
        return _batch(y, rhs.shape)

    def _rectangle_tiles(self, like: jax.Array, columns: Keys) -> Tiles:
        if self.tiles:
            return self.tiles
        assert self.width is not None
        d = like.shape[-1]
        return Tiles.for_rectangle(like.dtype, self.width, columns.length, d, _capacity())

    def _options(self, tiles: Tiles, d: int) -> dict[str, Any]:
        return {"d": d, "tiles": tiles, "interpret": self.interpret}


def _capacity() -> int:
    return _SMALLEST_VMEM if INTERPRET else vmem_capacity()


class _Systems(NamedTuple):
    """Keys and segment ids as the kernels take them: M = B·K triangular systems.

    Attributes:
      k_hat: `k̃ [M,S',W]`, zero where padded.
      batch: B.
      segment_ids: int32 `[B,S']`, or None.
      tiles: R and C.
      root_beta: `√β [M,S'/R,1,R]`, or None.
    """

    k_hat: jax.Array
    batch: int
    segment_ids: jax.Array | None
    tiles: Tiles
    root_beta: jax.Array | None

    @classmethod
    def from_keys(cls, keys: Keys, tiles: Tiles) -> _Systems:
        """Takes keys `k̃ [B,K,S',W]`, whose number the tiles divide."""
        b, heads, *row = keys.k_hat.shape
        roots = keys.root_beta
        if roots is not None:
            roots = roots.reshape(b * heads, -1, 1, tiles.rows)
        return cls(keys.k_hat.reshape(b * heads, *row), b, keys.segment_ids, tiles, roots)

    @property
    def row_segments(self) -> jax.Array | None:
        """int32 `[B,S'/R,1,R]`, or None."""
        return self._segments(self.tiles.rows)

    @property
    def column_segments(self) -> jax.Array | None:
        """int32 `[B,S'/C,1,C]`, or None."""
        return self._segments(self.tiles.columns)

    def _segments(self, size: int) -> jax.Array | None:
        ids = self.segment_ids
        return None if ids is None else ids.reshape(self.batch, -1, 1, size)

    def blocks(self) -> tuple[jax.Array, jax.Array]:
        """Returns the first block that each block shares a segment with, and one past the last."""
        return self._bounds(self, self.tiles.rows)

    def rectangle(
        self, columns: _Systems, ranges: ColumnRanges | None, width: int | None
    ) -> tuple[Any, ...]:
        """Returns the segment ids and bounds of these rows against `columns`, for the kernels.

        Args:
          columns: The columns of the rectangle.
          ranges: The columns that each `width` rows take; None is all.
          width: Rows that share a range.
        """
        ids = self.row_segments, columns.column_segments
        bounds = self._bounds(columns, self.tiles.columns)
        if ranges is None or width is None:
            return *ids, *bounds
        bounds = narrow_bounds(bounds, ranges, width, self.tiles.rows, self.tiles.columns)
        block_ranges = tuple(jnp.repeat(x, width // self.tiles.rows) for x in ranges)
        return *ids, *bounds, block_ranges

    def _bounds(self, columns: _Systems, size: int) -> tuple[jax.Array, jax.Array]:
        rows = self.tiles.rows
        if self.segment_ids is None or columns.segment_ids is None:
            shape = self.batch, self.k_hat.shape[1] // rows
            end = columns.k_hat.shape[1] // size
            return jnp.zeros(shape, jnp.int32), jnp.full(shape, end, jnp.int32)
        return batch_panel_bounds(self.segment_ids, columns.segment_ids, rows, size)


def _systems(x: jax.Array, tiles: Tiles) -> jax.Array:
    """Turns `[B,S,K,D]` into `[M,S',W]`, zero-padded."""
    x = pad_axis(heads_first(x, tiles.rows), 3, tile.width(x.shape[3]))
    return x.reshape(-1, *x.shape[2:])


def _batch(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Turns `[M,S',W]` into the shape `[B,S,K,D]`."""
    b, s, heads, d = shape
    return rows_first(x.reshape(b, heads, *x.shape[1:]), s)[..., :d]
