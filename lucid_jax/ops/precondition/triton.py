"""Preconditioning by the Triton kernels: what they support, their tiles, and the vjp."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lucid_jax.ops import target
from lucid_jax.ops.blocks import (
    batch_panel_bounds,
    heads_first,
    pad_axis,
    put,
    round_up,
    take,
    within,
)
from lucid_jax.ops.precondition.block_inverses import BlockInverses
from lucid_jax.ops.precondition.gram import Keys, normalize_keys
from lucid_jax.ops.precondition.prefix import Prefix
from lucid_jax.ops.precondition.triton_schedule import (
    Schedule,
    column_parts,
    rows_of_inverses,
)
from lucid_jax.ops.remat import save_for_backward
from pallas_kernels.scaling import key_scale
from pallas_kernels.triton import tile
from pallas_kernels.triton.block_inverse import TILE, apply_inverse
from pallas_kernels.triton.diagonal import diagonal_inverses
from pallas_kernels.triton.key_gradient import cross_key_gradient, key_gradient
from pallas_kernels.triton.product import product
from pallas_kernels.triton.solve import solve
from pallas_kernels.triton.tiles import Tiles

# Pallas' interpreter instead of a GPU: the tests set it.
INTERPRET = False


def unsupported(k: jax.Array) -> str | None:
    """Why the kernels cannot take this call, or None when they can."""
    if not INTERPRET and target.platform() != "gpu":
        return f"it needs a GPU; this is compiled for {target.platform()}"
    if k.dtype == jnp.float64:
        return "it computes in float16, bfloat16 or float32; got float64"
    if k.shape[-1] > 256:
        return f"it needs a head width of at most 256; got {k.shape[-1]}"
    return None


def unsupported_width(width: int) -> str | None:
    """Why the kernels cannot take blocks of so many rows as `BlockOps`, or None."""
    if width % 128:
        return f"it needs stripes of a width that 128 divides; got {width}"
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
    schedule = Schedule.choose(target.device_kind(), k.dtype, *k.shape)
    return scheduled(schedule, INTERPRET, k, v, segment_ids, prefix)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scheduled(
    schedule: Schedule,
    interpret: bool,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    prefix: Prefix | None,
) -> jax.Array:
    """`precondition` with given tiles, in the dtype of its operands; the tuner's way in."""
    return _precondition_fwd(schedule, interpret, k, v, segment_ids, prefix)[0]


def _precondition_fwd(schedule, interpret, k, v, segment_ids, prefix):
    run = _Run(schedule, interpret)
    keys, inverses = run.diagonal(k, segment_ids, schedule.solve.rows)
    rhs = v
    if prefix is not None:
        columns = run.keys(prefix.k, prefix.segment_ids)
        update = run.product(keys, columns, prefix.y, run.bounds(keys, columns, schedule.product))
        rhs = v.astype(update.dtype) - update[:, : v.shape[1]]
    y, _ = run.solve(keys, inverses, rhs, v.dtype)
    y = save_for_backward(y)
    return y, (k, y, segment_ids, prefix)


def _precondition_bwd(schedule, interpret, residuals, y_bar):
    k, y, segment_ids, prefix = residuals
    # Keys and inverses are made again: kept since the forward pass, which a compiler that sees both
    # would do, they are up to 1.7 times as much as k, v and y.
    k, y_bar = jax.lax.optimization_barrier((k, y_bar))
    run, tiles = _Run(schedule, interpret), schedule.gradient
    keys, inverses = run.diagonal(k, segment_ids, schedule.solve.rows)
    v_bar, upper = run.solve(
        keys, inverses, y_bar, y.dtype, reverse=True, y=y if schedule.fused else None
    )
    k_bar = key_gradient(
        k, keys.k_hat, y, v_bar, keys.segment_ids, *run.bounds(keys, keys, tiles),
        tiles=tiles, dtype=k.dtype if prefix is None else jnp.float32, upper=upper,
        interpret=interpret,
    )  # fmt: skip
    if prefix is None:
        return k_bar, v_bar, None, None

    columns = run.keys(prefix.k, prefix.segment_ids)
    across, back = run.bounds(keys, columns, tiles), run.bounds(columns, keys, tiles)
    k_bar += run.cross_gradient(k, keys, v_bar, columns, prefix.y, across)
    prefix_k_bar = run.cross_gradient(prefix.k, columns, prefix.y, keys, v_bar, back)
    back = run.bounds(columns, keys, schedule.product)
    prefix_y_bar = run.product(columns, keys, v_bar, back)
    prefix_bar = Prefix(
        k=prefix_k_bar.astype(prefix.k.dtype),
        y=-prefix_y_bar[:, : prefix.y.shape[1]].astype(prefix.y.dtype),
    )
    return k_bar.astype(k.dtype), v_bar, None, prefix_bar


scheduled.defvjp(_precondition_fwd, _precondition_bwd)


@dataclasses.dataclass(frozen=True)
class _Run:
    """The kernels with their tiles; `Keys` hold `k̃ [B,K,S',W]` and padded segment ids."""

    schedule: Schedule
    interpret: bool

    def keys(self, k: jax.Array, segment_ids: jax.Array | None) -> Keys:
        """Normalised keys, where no inverse is needed."""
        d, multiple = k.shape[-1], self.schedule.multiple
        k_hat = (normalize_keys(k) * key_scale(d)).astype(k.dtype)
        k_hat = pad_axis(heads_first(k_hat, multiple), 3, tile.width(d))
        return Keys(k_hat, _padded(segment_ids, multiple))

    def diagonal(
        self, k: jax.Array, segment_ids: jax.Array | None, rows: int
    ) -> tuple[Keys, jax.Array]:
        """Normalised keys, and the inverses of the diagonal blocks of so many rows."""
        multiple = self.schedule.multiple
        segments = _padded(segment_ids, multiple)
        k_hat, inverses = diagonal_inverses(
            k, segments, rows=rows, multiple=multiple, dtype=k.dtype, interpret=self.interpret
        )
        return Keys(k_hat, segments), inverses

    def solve(
        self, keys: Keys, inverses, rhs, dtype, *, reverse: bool = False, y: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """`A⁻¹ rhs`, or `A⁻ᵀ rhs` with `reverse` and, given `y`, half of the key gradient."""
        tiles = self.schedule.transposed if reverse else self.schedule.solve
        first = _first(keys.k_hat, keys.segment_ids, tiles, reverse=reverse)
        return solve(
            keys.k_hat, inverses, rhs, keys.segment_ids, first, dtype=dtype, tiles=tiles,
            reverse=reverse, y=y, interpret=self.interpret,
        )  # fmt: skip

    def product(self, rows: Keys, columns: Keys, x: jax.Array, bounds) -> jax.Array:
        """`A_rc x`, float32, padded as the rows are.

        Where the rows are few, their programs share out the columns: each part of the columns
        has copies of all rows, and the results are added up.
        """
        tiles = self.schedule.product
        b, heads, length, _ = rows.k_hat.shape
        parts = column_parts(b * heads * length // tiles.rows, columns.length)
        first, end = bounds
        if parts > 1:
            size = -(-columns.length // (parts * tiles.columns))
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

    def cross_gradient(self, k, rows: Keys, x, columns: Keys, x_columns, bounds) -> jax.Array:
        """`k̄` of the rows of `−A_rc`, float32."""
        return cross_key_gradient(
            k, rows.k_hat, x, columns.k_hat, x_columns, rows.segment_ids, columns.segment_ids,
            *bounds, tiles=self.schedule.gradient, interpret=self.interpret,
        )  # fmt: skip

    @staticmethod
    def bounds(rows: Keys, columns: Keys, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
        """First tile of columns of each block of rows `[B,N]`, and one past the last."""
        if rows.segment_ids is None or columns.segment_ids is None:
            shape = rows.k_hat.shape[0], rows.length // tiles.rows
            end = columns.length // tiles.columns
            return jnp.zeros(shape, jnp.int32), jnp.full(shape, end, jnp.int32)
        return batch_panel_bounds(rows.segment_ids, columns.segment_ids, tiles.rows, tiles.columns)


@dataclasses.dataclass(frozen=True)
class BlockOps:
    """The solve and the rectangles of `A` in blocks of `width` rows; see `pieces`."""

    width: int

    def keys(self, k: jax.Array, segment_ids: jax.Array | None) -> Keys:
        """Rows or columns of rectangles."""
        return self._run(k.dtype, k.shape).keys(k, segment_ids)

    def inverses(
        self, k: jax.Array, segment_ids: jax.Array | None, rows: int
    ) -> jax.Array | BlockInverses:
        """Of the blocks of the kernel, or of larger ones where stripes are faster by them."""
        b, s, heads, d = k.shape
        run = self._run(k.dtype, (b, rows, heads, d))
        block = rows_of_inverses(target.device_kind(), k.dtype, rows, b * heads, s, d)
        if block is None:
            return run.diagonal(k, segment_ids, run.schedule.solve.rows)[1]
        keys, small = run.diagonal(k, segment_ids, 128)
        return BlockInverses.join(keys, small, block, d)

    def solve(
        self,
        keys: Keys,
        inverses: jax.Array | BlockInverses,
        stripe: jax.Array,
        rhs: jax.Array,
        *,
        reverse: bool = False,
    ) -> jax.Array:
        """`A⁻¹ rhs`, or `A⁻ᵀ rhs` with `reverse`, in the dtype of the keys."""
        dtype = keys.k_hat.dtype
        run = self._run(dtype, rhs.shape)
        if isinstance(inverses, BlockInverses):
            return _solve_by_inverses(run, keys, inverses, stripe, rhs, reverse)
        blocks = keys.length // inverses.shape[-1]
        inverses = take(inverses, stripe * blocks, blocks, 2)
        return run.solve(keys, inverses, rhs, dtype, reverse=reverse)[0]

    def product(
        self, rows: Keys, columns: Keys, x: jax.Array, first: jax.Array, end: jax.Array
    ) -> jax.Array:
        """`A_rc x` in float32."""
        run = self._run(x.dtype, x.shape)
        bounds = self._within(rows, columns, first, end, run.schedule.product)
        return run.product(rows, columns, x, bounds)

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
        run = self._run(k.dtype, k.shape)
        bounds = self._within(rows, columns, first, end, run.schedule.gradient)
        return run.cross_gradient(k, rows, x, columns, x_columns, bounds)

    def _run(self, dtype: jnp.dtype, shape: tuple[int, ...]) -> _Run:
        return _Run(Schedule.choose(target.device_kind(), dtype, *shape), INTERPRET)

    def _within(self, rows: Keys, columns: Keys, first, end, tiles: Tiles):
        bounds = _Run.bounds(rows, columns, tiles)
        return within(bounds, first, end, self.width, tiles.rows, tiles.columns)


def _solve_by_inverses(
    run: _Run,
    keys: Keys,
    inverses: BlockInverses,
    stripe: jax.Array,
    rhs: jax.Array,
    reverse: bool,
) -> jax.Array:
    """`A⁻¹ rhs`, or its transpose, block after block."""
    b, length, heads, _ = rhs.shape
    size = inverses.whole.shape[-1]
    count, parts = length // size, column_parts(b * heads * size // TILE, size)
    y = jnp.zeros(rhs.shape, keys.k_hat.dtype)
    for i in reversed(range(count)) if reverse else range(count):
        own, left = slice(i * size, (i + 1) * size), rhs[:, i * size : (i + 1) * size]
        solved = slice((i + 1) * size, None) if reverse else slice(0, i * size)
        columns = keys.slice(solved)
        if columns.length:
            rows = keys.slice(own)
            bounds = run.bounds(rows, columns, run.schedule.product)
            left = left - run.product(rows, columns, y[:, solved], bounds)
        y_i = apply_inverse(
            *inverses, stripe * count + i, left, parts=parts, transposed=reverse,
            interpret=run.interpret,
        )  # fmt: skip
        y = put(y, y_i.sum(0), i * size, 1)
    return y


def _padded(segment_ids: jax.Array | None, multiple: int) -> jax.Array | None:
    if segment_ids is None:
        return None
    return pad_axis(segment_ids, 1, round_up(segment_ids.shape[1], multiple))


def _first(k_hat, segments, tiles: Tiles, *, reverse: bool) -> jax.Array:
    """First position that each position of the solve may depend on: `[B,N]`, ascending."""
    r, n = tiles.rows, k_hat.shape[2] // tiles.rows
    if segments is None:
        return jnp.zeros((k_hat.shape[0], n), jnp.int32)
    first, end = batch_panel_bounds(segments, segments, r, r)
    if reverse:
        first = (n - end)[:, ::-1]
    # A block that is finished then implies that all those before it are which it read.
    return jax.lax.cummin(first, axis=1, reverse=True)
