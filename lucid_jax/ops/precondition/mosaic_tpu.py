"""Preconditioning by the Mosaic kernels for TPUs: what they support, their tiles, and the vjp."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.ops import target
from lucid_jax.ops.blocks import (
    batch_panel_bounds,
    heads_first,
    pad_axis,
    round_up,
    rows_first,
    within,
)
from lucid_jax.ops.precondition.gram import Keys, key_gradient, normalize_keys
from lucid_jax.ops.precondition.prefix import Prefix
from lucid_jax.ops.remat import save_for_backward
from pallas_kernels.mosaic_tpu import tile
from pallas_kernels.mosaic_tpu.cross_gradient import cross_key_gradient
from pallas_kernels.mosaic_tpu.diagonal import diagonal_inverses
from pallas_kernels.mosaic_tpu.product import product
from pallas_kernels.mosaic_tpu.solve import solve
from pallas_kernels.mosaic_tpu.solve_transposed import solve_transposed
from pallas_kernels.mosaic_tpu.tiles import Tiles, vmem_capacity
from pallas_kernels.scaling import key_scale

# Pallas' TPU interpreter instead of a TPU: the tests set its parameters.
INTERPRET: tile.Interpret = False
_SMALLEST_VMEM = 16 * 2**20


def unsupported(k: jax.Array) -> str | None:
    """Why the kernels cannot take this call, or None when they can."""
    if not INTERPRET and target.platform() != "tpu":
        return f"it needs a TPU; this is compiled for {target.platform()}"
    if k.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it computes in bfloat16 or float32; got {k.dtype.name}"
    if k.shape[-1] > 256:
        return f"it needs a head width of at most 256; got {k.shape[-1]}"
    return None


def unsupported_width(width: int) -> str | None:
    """Why the kernels cannot take blocks of so many rows as `BlockOps`, or None."""
    if width % tile.BLOCK:
        return f"it needs stripes of a width that {tile.BLOCK} divides; got {width}"
    return None


def precondition(
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    prefix: Prefix | None,
    precision: jax.lax.Precision | None,
) -> jax.Array:
    """Solves `A_cc y = v − A_cp y_p`; shapes as in the public op."""
    del precision  # The operands have it, and their products keep it.
    return tiled(_choose_tiles(k), INTERPRET, k, v, segment_ids, prefix)


def _choose_tiles(k: jax.Array) -> Tiles:
    return Tiles.choose(k.dtype, k.shape[1], k.shape[3], _capacity())


def _capacity() -> int:
    return _SMALLEST_VMEM if INTERPRET else vmem_capacity()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def tiled(
    tiles: Tiles,
    interpret: tile.Interpret,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    prefix: Prefix | None,
) -> jax.Array:
    """`precondition` with given tiles, in the dtype of its operands."""
    return _precondition_fwd(tiles, interpret, k, v, segment_ids, prefix)[0]


def _precondition_fwd(tiles, interpret, k, v, segment_ids, prefix):
    y = _fold_vmap(functools.partial(_solve, tiles, interpret))(k, v, segment_ids, prefix)
    y = save_for_backward(y)
    return y, (k, y, segment_ids, prefix)


def _precondition_bwd(tiles, interpret, residuals, y_bar):
    run = _fold_vmap(functools.partial(_solve_transposed, tiles, interpret))
    k_bar, v_bar, prefix_bar = run(*residuals, y_bar)
    return k_bar, v_bar, None, prefix_bar


tiled.defvjp(_precondition_fwd, _precondition_bwd)


def _fold_vmap(f: Callable) -> Callable:
    """`f` of arrays that all lead with B, with mapped axes folded into B.

    The kernels copy from whole arrays in HBM, to which `pallas_call` can add no axis.
    """
    f = jax.custom_batching.custom_vmap(f)

    @f.def_vmap
    def folded(size, mapped, *arguments):
        def fold(x, is_mapped):
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = f(*jax.tree.map(fold, arguments, tuple(mapped)))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return f


def _solve(tiles, interpret, k, v, segment_ids, prefix):
    run = _options(k.shape[-1], tiles, interpret)
    rows = _Sequence.of(k, segment_ids, tiles)
    rhs = _systems(v, tiles)
    if prefix is not None:
        columns = _Sequence.of(prefix.k, prefix.segment_ids, tiles)
        update = product(
            rows.k_hat, columns.k_hat, _systems(prefix.y, tiles), *rows.tiles_of(columns), **run
        )
        rhs = rhs.astype(update.dtype) - update
    return _batch(_substitute(rows, rhs, run), v.shape)


def _substitute(rows: _Sequence, rhs: jax.Array, run: dict[str, Any]) -> jax.Array:
    inverses = diagonal_inverses(rows.k_hat, rows.row_segments, transposed=False, **run)
    first, _ = rows.blocks()
    return solve(rows.k_hat, inverses, rhs, rows.row_segments, rows.column_segments, first, **run)


@dataclasses.dataclass(frozen=True)
class BlockOps:
    """The solve and the rectangles of `A` in blocks of `width` rows; see `pieces`."""

    width: int

    def keys(self, k: jax.Array, segment_ids: jax.Array | None) -> Keys:
        """Rows or columns of rectangles: `k̃ [B,K,S,W]`."""
        k_hat = pad_axis(heads_first(_scaled(k), 1), 3, tile.width(k.shape[-1]))
        return Keys(k_hat, segment_ids)

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
        tiles = Tiles.choose(keys.k_hat.dtype, keys.length, rhs.shape[-1], _capacity())
        length, ids = round_up(keys.length, tiles.rows), keys.segment_ids
        keys = Keys(
            pad_axis(keys.k_hat, 2, length), None if ids is None else pad_axis(ids, 1, length)
        )
        rows = _Sequence.of_keys(keys, tiles)
        y = _substitute(rows, _systems(rhs, tiles), _options(rhs.shape[-1], tiles, INTERPRET))
        return _batch(y, rhs.shape)

    def product(
        self, rows: Keys, columns: Keys, x: jax.Array, first: jax.Array, end: jax.Array
    ) -> jax.Array:
        """`A_rc x` in float32."""
        run = self._run(x, columns)
        rows_, columns_ = (_Sequence.of_keys(keys, run["tiles"]) for keys in (rows, columns))
        out = product(
            rows_.k_hat, columns_.k_hat, _systems(x, run["tiles"]),
            *rows_.tiles_of(columns_, (first, end, self.width)), **run,
        )  # fmt: skip
        return _batch(out, (x.shape[0], rows.length, *x.shape[2:]))

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
        run = self._run(k, columns)
        rows_, columns_ = (_Sequence.of_keys(keys, run["tiles"]) for keys in (rows, columns))
        x, x_columns = (_systems(x, run["tiles"]) for x in (x, x_columns))
        k_hat_bar = cross_key_gradient(
            rows_.k_hat, x, columns_.k_hat, x_columns,
            *rows_.tiles_of(columns_, (first, end, self.width)), **run,
        )  # fmt: skip
        return key_gradient(k.astype(k_hat_bar.dtype), _batch(k_hat_bar, k.shape))

    def _run(self, like: jax.Array, columns: Keys) -> dict[str, Any]:
        d, capacity = like.shape[-1], _capacity()
        tiles = Tiles.for_rectangle(like.dtype, self.width, columns.length, d, capacity)
        return _options(d, tiles, INTERPRET)


def _solve_transposed(tiles, interpret, k, y, segment_ids, prefix, y_bar):
    run = _options(k.shape[-1], tiles, interpret)
    rows = _Sequence.of(k, segment_ids, tiles)
    inverses = diagonal_inverses(rows.k_hat, rows.row_segments, transposed=True, **run)
    _, end = rows.blocks()
    v_bar, k_hat_bar = solve_transposed(
        rows.k_hat, inverses, _systems(y, tiles), _systems(y_bar, tiles),
        rows.row_segments, rows.column_segments, end, **run,
    )  # fmt: skip
    prefix_bar = None
    if prefix is not None:
        prefix_y = _systems(prefix.y, tiles)
        columns = _Sequence.of(prefix.k, prefix.segment_ids, tiles)
        k_hat_bar += cross_key_gradient(
            rows.k_hat, v_bar, columns.k_hat, prefix_y, *rows.tiles_of(columns), **run
        )
        back = columns.tiles_of(rows)
        prefix_k_bar = cross_key_gradient(columns.k_hat, prefix_y, rows.k_hat, v_bar, *back, **run)
        prefix_y_bar = -product(columns.k_hat, rows.k_hat, v_bar, *back, **run)
        prefix_bar = Prefix(
            k=key_gradient(prefix.k, _batch(prefix_k_bar, prefix.k.shape)),
            y=_batch(prefix_y_bar, prefix.y.shape).astype(prefix.y.dtype),
        )
    return key_gradient(k, _batch(k_hat_bar, k.shape)), _batch(v_bar, y.shape), prefix_bar


def _options(d: int, tiles: Tiles, interpret: tile.Interpret) -> dict[str, Any]:
    return {"d": d, "tiles": tiles, "interpret": interpret}


class _Sequence(NamedTuple):
    """Keys and segment ids as the kernels take them: every batch row and head is a system.

    Attributes:
      k_hat: `k̃ [M,S',W]`, M = B·K, zero where padded.
      batch: B.
      segment_ids: int32 `[B,S']`, or None.
      tiles: R and C.
    """

    k_hat: jax.Array
    batch: int
    segment_ids: jax.Array | None
    tiles: Tiles

    @classmethod
    def of(cls, k: jax.Array, segment_ids: jax.Array | None, tiles: Tiles) -> _Sequence:
        k_hat = _systems(_scaled(k), tiles)
        if segment_ids is not None:
            segment_ids = pad_axis(segment_ids, 1, k_hat.shape[1])
        return cls(k_hat, k.shape[0], segment_ids, tiles)

    @classmethod
    def of_keys(cls, keys: Keys, tiles: Tiles) -> _Sequence:
        """Of `k̃ [B,K,S,W]`, as rows or as columns, which the tiles divide."""
        b, heads, *row = keys.k_hat.shape
        return cls(keys.k_hat.reshape(b * heads, *row), b, keys.segment_ids, tiles)

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
        """The first block of R rows that each shares a segment with, and one past the last."""
        return self._bounds(self, self.tiles.rows)

    def tiles_of(
        self, columns: _Sequence, ranges: tuple[jax.Array, jax.Array, int] | None = None
    ) -> tuple:
        """Segment ids of these rows and of those columns, and bounds, as kernels take them.

        Args:
          columns: Of the rectangle.
          ranges: First column and one past the last of each so many rows; None takes all.
        """
        bounds = self._bounds(columns, self.tiles.columns)
        if ranges is None:
            return self.row_segments, columns.column_segments, *bounds
        first, end, width = ranges
        bounds = within(bounds, first, end, width, self.tiles.rows, self.tiles.columns)
        of_blocks = tuple(jnp.repeat(x, width // self.tiles.rows) for x in (first, end))
        return self.row_segments, columns.column_segments, *bounds, of_blocks

    def _bounds(self, columns: _Sequence, size: int) -> tuple[jax.Array, jax.Array]:
        rows = self.tiles.rows
        if self.segment_ids is None or columns.segment_ids is None:
            shape = self.batch, self.k_hat.shape[1] // rows
            end = columns.k_hat.shape[1] // size
            return jnp.zeros(shape, jnp.int32), jnp.full(shape, end, jnp.int32)
        return batch_panel_bounds(self.segment_ids, columns.segment_ids, rows, size)


def _systems(x: jax.Array, tiles: Tiles) -> jax.Array:
    """`[B,S,K,D]` to `[M,S',W]`, zero-padded."""
    x = pad_axis(heads_first(x, tiles.rows), 3, tile.width(x.shape[3]))
    return x.reshape(-1, *x.shape[2:])


def _scaled(k: jax.Array) -> jax.Array:
    """`k̃ [B,S,K,D]`."""
    return (normalize_keys(k) * key_scale(k.shape[-1])).astype(k.dtype)


def _batch(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`[M,S',W]` to the shape `[B,S,K,D]`."""
    b, s, heads, d = shape
    return rows_first(x.reshape(b, heads, *x.shape[1:]), s)[..., :d]
