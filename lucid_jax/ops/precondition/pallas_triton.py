"""Preconditioning by the Triton kernels: what they support, their tiles, and the vjp."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lucid_jax.ops import target
from lucid_jax.ops.blocks import batch_panel_bounds, heads_first, pad_axis, round_up
from lucid_jax.ops.precondition.gram import normalize_keys
from lucid_jax.ops.precondition.prefix import Prefix
from lucid_jax.ops.precondition.triton_schedule import Schedule
from lucid_jax.ops.remat import keep
from pallas_kernels.scaling import key_scale
from pallas_kernels.triton import tile
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
    segments = _padded(segment_ids, schedule.multiple)
    k_hat, inverses = diagonal_inverses(
        k, segments,
        rows=schedule.solve.rows, multiple=schedule.multiple, dtype=k.dtype, interpret=interpret,
    )  # fmt: skip
    rhs = v
    if prefix is not None:
        columns = _Columns.of(prefix, schedule)
        update = product(
            k_hat, columns.k_hat, prefix.y, segments, columns.segment_ids,
            *_bounds(k_hat, segments, columns.k_hat, columns.segment_ids, schedule.product),
            tiles=schedule.product, interpret=interpret,
        )  # fmt: skip
        rhs = v.astype(update.dtype) - update[:, : v.shape[1]]
    y, _ = solve(
        k_hat, inverses, rhs, segments, _first(k_hat, segments, schedule.solve, reverse=False),
        dtype=v.dtype, tiles=schedule.solve, interpret=interpret,
    )  # fmt: skip
    y = keep(y)
    return y, (k, y, segment_ids, prefix)


def _precondition_bwd(schedule, interpret, residuals, y_bar):
    k, y, segment_ids, prefix = residuals
    segments = _padded(segment_ids, schedule.multiple)
    k_hat, inverses = diagonal_inverses(
        k, segments,
        rows=schedule.solve.rows, multiple=schedule.multiple, dtype=k.dtype, interpret=interpret,
    )  # fmt: skip
    v_bar, upper = solve(
        k_hat, inverses, y_bar, segments,
        _first(k_hat, segments, schedule.transposed, reverse=True),
        dtype=y.dtype, tiles=schedule.transposed, reverse=True, y=y if schedule.fused else None,
        interpret=interpret,
    )  # fmt: skip
    k_bar = key_gradient(
        k, k_hat, y, v_bar, segments,
        *_bounds(k_hat, segments, k_hat, segments, schedule.gradient),
        tiles=schedule.gradient, dtype=k.dtype if prefix is None else jnp.float32,
        upper=upper, interpret=interpret,
    )  # fmt: skip
    if prefix is None:
        return k_bar, v_bar, None, None

    columns = _Columns.of(prefix, schedule)
    tiles = schedule.gradient
    k_bar += cross_key_gradient(
        k, k_hat, v_bar, columns.k_hat, prefix.y, segments, columns.segment_ids,
        *_bounds(k_hat, segments, columns.k_hat, columns.segment_ids, tiles),
        tiles=tiles, interpret=interpret,
    )  # fmt: skip
    prefix_k_bar = cross_key_gradient(
        prefix.k, columns.k_hat, prefix.y, k_hat, v_bar, columns.segment_ids, segments,
        *_bounds(columns.k_hat, columns.segment_ids, k_hat, segments, tiles),
        tiles=tiles, interpret=interpret,
    )  # fmt: skip
    prefix_y_bar = product(
        columns.k_hat, k_hat, v_bar, columns.segment_ids, segments,
        *_bounds(columns.k_hat, columns.segment_ids, k_hat, segments, schedule.product),
        tiles=schedule.product, interpret=interpret,
    )  # fmt: skip
    prefix_bar = Prefix(
        k=prefix_k_bar.astype(prefix.k.dtype),
        y=-prefix_y_bar[:, : prefix.y.shape[1]].astype(prefix.y.dtype),
    )
    return k_bar.astype(k.dtype), v_bar, None, prefix_bar


scheduled.defvjp(_precondition_fwd, _precondition_bwd)


@dataclasses.dataclass(frozen=True)
class _Columns:
    """A prefix as the kernels read it: `k̃ [B,K,P',W]` and padded segment ids."""

    k_hat: jax.Array
    segment_ids: jax.Array | None

    @classmethod
    def of(cls, prefix: Prefix, schedule: Schedule) -> _Columns:
        d = prefix.k.shape[-1]
        k_hat = (normalize_keys(prefix.k) * key_scale(d)).astype(prefix.k.dtype)
        k_hat = pad_axis(heads_first(k_hat, schedule.multiple), 3, tile.width(d))
        return cls(k_hat, _padded(prefix.segment_ids, schedule.multiple))


def _padded(segment_ids: jax.Array | None, multiple: int) -> jax.Array | None:
    if segment_ids is None:
        return None
    return pad_axis(segment_ids, 1, round_up(segment_ids.shape[1], multiple))


def _bounds(
    rows: jax.Array,
    row_segments: jax.Array | None,
    columns: jax.Array,
    column_segments: jax.Array | None,
    tiles: Tiles,
) -> tuple[jax.Array, jax.Array]:
    """First tile of columns of each block of rows `[B,N]`, and one past the last."""
    if row_segments is None or column_segments is None:
        shape = rows.shape[0], rows.shape[2] // tiles.rows
        return jnp.zeros(shape, jnp.int32), jnp.full(
            shape, columns.shape[2] // tiles.columns, jnp.int32
        )
    return batch_panel_bounds(row_segments, column_segments, tiles.rows, tiles.columns)


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
