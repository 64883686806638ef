"""`precondition` by the Mosaic GPU kernels: keys of 16 bits, no prefix."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import heads_first, pad_axis, rows_first
from lucid_jax.ops.documents import (
    entering_documents,
    is_contiguous,
    order_by_depth,
    pad_segments,
)
from lucid_jax.ops.precondition.gram import key_gradient, normalize_keys
from pallas_kernels.mosaic_gpu.inverse import inverses
from pallas_kernels.mosaic_gpu.key_gradient import key_gradient as scaled_key_gradient
from pallas_kernels.mosaic_gpu.solve import Items, solve
from pallas_kernels.mosaic_gpu.tile import COLUMNS, ROWS, TILES
from pallas_kernels.scaling import key_gradient_scale, key_scale, largest_exponent

# The parameters of Pallas' interpreter, instead of a GPU; the tests set them.
INTERPRET: Any = None


@jax.custom_vjp
def precondition(k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """`lucid_jax.precondition` of `[B,S,K,D]` in float16 or bfloat16, D at most 128."""
    return _forward(k, v, segment_ids)[0]


def _forward(k, v, segment_ids):
    y = _solve(k, v, segment_ids, reverse=False)
    return y, (k, y, segment_ids)


def _backward(residuals, y_bar):
    k, y, segment_ids = residuals
    d = k.shape[-1]
    v_bar = _solve(k, y_bar, segment_ids, reverse=True)
    k_hat, y_systems, v_bar_systems = map(_systems, (_scaled_keys(k), y, v_bar))
    ids = limits = None
    if segment_ids is not None:
        ids = pad_segments(segment_ids, ROWS)
        limits = _limits(ids)
    shift = largest_exponent(d)
    k_hat_bar = scaled_key_gradient(
        k_hat, y_systems, v_bar_systems, ids, limits, shift=shift,
        scale=key_gradient_scale(d, shift), interpret=INTERPRET,
    )  # fmt: skip
    return key_gradient(k, _tokens(k_hat_bar, k)), v_bar, None


precondition.defvjp(_forward, _backward)


def _solve(k, rhs, segment_ids, *, reverse):
    k_hat, shift = _systems(_scaled_keys(k)), largest_exponent(k.shape[-1])
    ids = None if segment_ids is None else pad_segments(segment_ids, ROWS)
    terms = inverses(k_hat, ids, shift=shift, interpret=INTERPRET)
    entering = items = None
    if ids is not None:
        entering = entering_documents(ids, ROWS, reverse=reverse)
        items = _items(ids, entering, reverse)
    y = solve(
        k_hat, _systems(rhs), terms, ids, items, shift=shift, programs=_multiprocessors(),
        reverse=reverse, interpret=INTERPRET,
    )  # fmt: skip
    if entering is None:
        return _tokens(y[0], k)
    # Of each block, the rows that the document has which enters it are in the first plane.
    row = jnp.arange(ROWS, dtype=jnp.int32)
    is_first = row < entering.size[..., None]
    is_first = is_first.reshape(len(is_first), -1)
    if reverse:
        is_first = jnp.flip(is_first, 1)
    first, second = (_tokens(x, k) for x in y)
    return jnp.where(is_first[:, : k.shape[1], None, None], first, second)


def _items(ids, entering, reverse):
    blocks, order = entering.start.shape[1], order_by_depth(entering, ROWS)
    position, is_second = order % blocks, order >= blocks
    start, size = (jnp.take_along_axis(x, position, 1) for x in entering)
    chain = jnp.where(is_second, position, start // ROWS)
    first_tile = jnp.where(is_second, position * TILES, start // COLUMNS)
    begin, end = jnp.where(is_second, size, 0), jnp.where(is_second, ROWS, size)
    if reverse:
        begin, end = ROWS - end, ROWS - begin
    is_mixed = jnp.broadcast_to(~is_contiguous(ids)[:, None], order.shape)
    table = jnp.stack([position, chain, first_tile, begin, end, is_mixed.astype(jnp.int32)], 2)
    return Items(table, jnp.max(jnp.sum(begin < end, 1, dtype=jnp.int32), keepdims=True))


def _limits(ids):
    start, _ = entering_documents(ids, ROWS)
    end, _ = entering_documents(ids, ROWS, reverse=True)
    end = ids.shape[1] - jnp.flip(end, 1)
    rows = ids.reshape(len(ids), -1, ROWS)
    is_uniform = (rows == rows[..., :1]).all(2) & is_contiguous(ids)[:, None]
    return jnp.stack([start, end, is_uniform.astype(jnp.int32)], 2)


def _scaled_keys(k):
    return (normalize_keys(k) * key_scale(k.shape[-1])).astype(k.dtype)


def _systems(x):
    """Turns `[B,S,K,D]` into `[B·K,S',W]`, padded with zeros."""
    x = heads_first(x, ROWS)
    x = x.reshape(-1, *x.shape[2:])
    return pad_axis(x, 2, 64 if x.shape[2] <= 64 else 128)


def _tokens(x, like):
    """Inverts `_systems`."""
    b, s, heads, d = like.shape
    return rows_first(x[..., :d].reshape(b, heads, -1, d), s)


def _multiprocessors() -> int:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return 1 if INTERPRET else device.num_cores if device else jax.devices()[0].core_count
