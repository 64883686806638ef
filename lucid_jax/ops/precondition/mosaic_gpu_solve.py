"""The solve and the gradient of its keys by the Mosaic GPU kernels: their arguments and calls."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import heads_first, pad_axis, rows_first
from lucid_jax.ops.documents import (
    Entering,
    entering_documents,
    is_contiguous,
    order_by_depth,
    pad_segments,
)
from lucid_jax.ops.precondition.gram import key_gradient, normalize_keys
from pallas_kernels.mosaic_gpu.inverse import inverses
from pallas_kernels.mosaic_gpu.key_gradient import key_gradient as scaled_key_gradient
from pallas_kernels.mosaic_gpu.solve import Items
from pallas_kernels.mosaic_gpu.solve import solve as solve_systems
from pallas_kernels.mosaic_gpu.tile import ROWS, width
from pallas_kernels.scaling import entry_scale, key_gradient_scale, key_scale, largest_exponent


def solve(
    k: jax.Array,
    rhs: jax.Array,
    segment_ids: jax.Array | None,
    *,
    programs: int,
    reverse: bool = False,
    interpret: Any = None,
) -> jax.Array:
    """Returns the solution of `A y = rhs`, or of `Aᵀ y = rhs`: `[B,S,K,D]` in the dtype of `k`.

    Args:
      k: Keys `[B,S,K,D]`, float16 or bfloat16, D at most 128.
      rhs: The right-hand sides `[B,S,K,D]`, dtype of `k`.
      segment_ids: int32 `[B,S]`, or None.
      programs: Programs of the solve, at most the number of multiprocessors.
      reverse: Whether to solve the transposed system.
      interpret: The parameters of Pallas' interpreter, or None for a GPU.
    """
    k_hat, d = _scaled_keys(k), k.shape[-1]
    ids = None if segment_ids is None else pad_segments(segment_ids, ROWS)
    terms = inverses(k_hat, ids, shift=largest_exponent(d), interpret=interpret)
    entering = items = None
    if ids is not None:
        entering = entering_documents(ids, ROWS, reverse=reverse)
        items = _items(ids, entering, reverse)
    # Entries of products go up to 2¹² or less; without a shift the kernel subtracts nothing.
    shift = max(0.0, largest_exponent(d) - 12)
    y = solve_systems(
        k_hat, _systems(rhs), terms, ids, items, scale=entry_scale(d, shift), shift=shift,
        programs=programs, reverse=reverse, interpret=interpret,
    )  # fmt: skip
    if entering is None:
        return _tokens(y[0], k)
    # Of each block, the rows that the document has which enters it are in the first plane.
    row = jnp.arange(ROWS, dtype=jnp.int32)[None, None]
    is_first = row < entering.size[..., None]
    is_first = is_first.reshape(len(is_first), -1)
    if reverse:
        is_first = jnp.flip(is_first, 1)
    first, second = (_tokens(x, k) for x in y)
    return jnp.where(is_first[:, : k.shape[1], None, None], first, second)


def gradient_of_keys(
    k: jax.Array,
    y: jax.Array,
    v_bar: jax.Array,
    segment_ids: jax.Array | None,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Returns `k̄ [B,S,K,D]`, dtype of `k`, of `y = A⁻¹ v`.

    Args:
      k: Keys `[B,S,K,D]`, float16 or bfloat16, D at most 128.
      y: `[B,S,K,D]`, dtype of `k`.
      v_bar: `v̄ = A⁻ᵀ ȳ [B,S,K,D]`, dtype of `k`.
      segment_ids: int32 `[B,S]`, or None.
      interpret: The parameters of Pallas' interpreter, or None for a GPU.
    """
    d = k.shape[-1]
    ids = limits = None
    if segment_ids is not None:
        ids = pad_segments(segment_ids, ROWS)
        limits = _limits(ids)
    y, v_bar = _systems(y), _systems(v_bar)
    shift = largest_exponent(d)
    k_hat_bar = scaled_key_gradient(
        _scaled_keys(k), y, v_bar, _units(y, v_bar, ids), ids, limits, shift=shift,
        scale=key_gradient_scale(d, shift), interpret=interpret,
    )  # fmt: skip
    return key_gradient(k, _tokens(k_hat_bar, k))


def _items(ids: jax.Array, entering: Entering, reverse: bool) -> Items:
    blocks, order = entering.start.shape[1], order_by_depth(entering, ROWS)
    position, is_second = order % blocks, order >= blocks
    start, size = (jnp.take_along_axis(x, position, 1) for x in entering)
    chain = jnp.where(is_second, position, start // ROWS)
    first_column = jnp.where(is_second, position * ROWS, start)
    begin, end = jnp.where(is_second, size, 0), jnp.where(is_second, ROWS, size)
    # The next block tells where the document begins that leaves this one.
    next_block = jnp.minimum(position + 1, blocks - 1)
    following = jnp.take_along_axis(entering.start, next_block, 1) - position * ROWS
    begin_leaving = jnp.clip(following, begin, end)
    end_leaving = end
    if reverse:
        begin, end = ROWS - end, ROWS - begin
        begin_leaving, end_leaving = ROWS - end_leaving, ROWS - begin_leaving
    is_mixed = jnp.broadcast_to(~is_contiguous(ids)[:, None], order.shape).astype(jnp.int32)
    columns = position, chain, first_column, begin, end, begin_leaving, end_leaving, is_mixed
    most = jnp.max(jnp.sum(begin < end, 1, dtype=jnp.int32), keepdims=True)
    return Items(jnp.stack(columns, 2), most)


def _units(y: jax.Array, v_bar: jax.Array, ids: jax.Array | None) -> jax.Array:
    """Returns the units of rows `[M,S]` that the kernel of the key gradient takes."""
    (y_own, y_all), (v_own, v_all) = (_sizes(x, ids) for x in (y, v_bar))
    # The limits keep powers of two finite where all values are zero, or close to infinity.
    return jnp.clip(jnp.maximum(y_own + v_all, y_all + v_own) - 15, -50, 110)


def _sizes(x: jax.Array, ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns u with `‖x_i‖ ≤ 2^u`, of each row and of all rows of its segment, float32 `[M,S]`."""
    sizes = jnp.abs(x.astype(jnp.float32))
    sizes = jnp.where(sizes < jnp.inf, sizes, 0).max(2)
    if ids is None:
        largest = jnp.broadcast_to(sizes.max(1, keepdims=True), sizes.shape)
    else:
        ids = jnp.repeat(ids, len(x) // len(ids), 0)
        runs = jnp.cumsum(jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0, 1)
        runs = jnp.where(is_contiguous(ids)[:, None], runs, 0)
        of_runs = jax.vmap(lambda x, i: jax.ops.segment_max(x, i, x.size)[i])
        largest = of_runs(sizes, runs)
    room = 1 + math.ceil(math.log2(x.shape[2]) / 2)
    own, whole = (jnp.floor(jnp.log2(jnp.maximum(s, 2.0**-126))) + room for s in (sizes, largest))
    return own, whole


def _limits(ids: jax.Array) -> jax.Array:
    """Returns the limits of columns of each block that the kernel of the key gradient takes."""
    start, _ = entering_documents(ids, ROWS)
    end, _ = entering_documents(ids, ROWS, reverse=True)
    end = ids.shape[1] - jnp.flip(end, 1)
    rows = ids.reshape(len(ids), -1, ROWS)
    is_uniform = (rows == rows[..., :1]).all(2) & is_contiguous(ids)[:, None]
    return jnp.stack([start, end, is_uniform.astype(jnp.int32)], 2)


def _scaled_keys(k: jax.Array) -> jax.Array:
    """Returns `k̃ [B·K,S',W]`, float16."""
    return _systems((normalize_keys(k) * key_scale(k.shape[-1])).astype(jnp.float16))


def _systems(x: jax.Array) -> jax.Array:
    """Turns `[B,S,K,D]` into `[B·K,S',W]`, padded with zeros."""
    x = heads_first(x, ROWS)
    x = x.reshape(-1, *x.shape[2:])
    return pad_axis(x, 2, width(x.shape[2]))


def _tokens(x: jax.Array, like: jax.Array) -> jax.Array:
    """Inverts `_systems`."""
    b, s, heads, d = like.shape
    return rows_first(x[..., :d].reshape(b, heads, -1, d), s)
