"""The solve and the gradient of its keys by the Mosaic GPU kernels: their arguments and calls."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lucid_jax.ops.documents import (
    Entering,
    entering_documents,
    is_contiguous,
    order_by_depth,
    pad_segments,
)
from lucid_jax.ops.precondition.mosaic_gpu import pad_blocks
from pallas_kernels.mosaic_gpu.inverse import normalize_and_invert
from pallas_kernels.mosaic_gpu.key_gradient import key_gradient
from pallas_kernels.mosaic_gpu.solve import Items
from pallas_kernels.mosaic_gpu.solve import solve as solve_systems
from pallas_kernels.mosaic_gpu.tile import ROWS
from pallas_kernels.scaling import entry_scale, key_gradient_scale, key_scale, largest_exponent


@dataclasses.dataclass(frozen=True)
class Systems:
    """The systems `A y = v` of all sequences and heads, M = B·K.

    Attributes:
      k: Keys `[B,S',K,W]`, padded.
      segment_ids: int32 `[B,S']`, or None.
      k_hat: `k̃ [M,S',W]`, float16.
      inverses: Of the diagonal blocks, as `normalize_and_invert` returns them.
      head_dim: D.
      interpret: The parameters of Pallas' interpreter, or None for a GPU.
    """

    k: jax.Array
    segment_ids: jax.Array | None
    k_hat: jax.Array
    inverses: jax.Array
    head_dim: int
    interpret: Any

    @classmethod
    def prepare(cls, k: jax.Array, segment_ids: jax.Array | None, interpret: Any) -> Systems:
        """Normalises keys `[B,S,K,D]`, float16 or bfloat16, D at most 128; inverts blocks."""
        d = k.shape[-1]
        ids = None if segment_ids is None else pad_segments(segment_ids, ROWS)
        k = pad_blocks(k)
        k_hat, inverses = normalize_and_invert(
            k, ids, norm=key_scale(d) * math.sqrt(d), shift=largest_exponent(d), interpret=interpret
        )
        return cls(k, ids, k_hat, inverses, d, interpret)

    def solve(self, rhs: jax.Array, *, programs: int, reverse: bool = False) -> jax.Array:
        """Returns the solution of `A y = rhs`, or of `Aᵀ y = rhs`: `[B,S,K,D]`, dtype of `rhs`.

        Args:
          rhs: The right-hand sides `[B,S,K,D]`, dtype of the keys.
          programs: Programs, at most the number of multiprocessors.
          reverse: Whether to solve the transposed system.
        """
        (_, s, _, d), ids = rhs.shape, self.segment_ids
        entering = items = None
        if ids is not None:
            entering = entering_documents(ids, ROWS, reverse=reverse)
            items = _items(ids, entering, reverse)
        # Entries of products go up to 2¹² or less; without a shift the kernel subtracts nothing.
        shift = max(0.0, largest_exponent(d) - 12)
        y = solve_systems(
            self.k_hat, pad_blocks(rhs), self.inverses, ids, items, scale=entry_scale(d, shift),
            shift=shift, programs=programs, reverse=reverse, interpret=self.interpret,
        )  # fmt: skip
        if entering is None:
            return y[0][:, :s, :, :d]
        # Of each block, the rows that the document has which enters it are in the first plane.
        row = jnp.arange(ROWS, dtype=jnp.int32)[None, None]
        is_first = row < entering.size[..., None]
        is_first = is_first.reshape(len(is_first), -1)
        if reverse:
            is_first = jnp.flip(is_first, 1)
        return jnp.where(is_first[..., None, None], y[0], y[1])[:, :s, :, :d]

    def key_gradient(self, y: jax.Array, v_bar: jax.Array) -> jax.Array:
        """Returns `k̄ [B,S,K,D]` of `y = A⁻¹ v`, from `y` and `v̄ = A⁻ᵀ ȳ`, all of one dtype."""
        (_, s, _, d), ids = y.shape, self.segment_ids
        y, v_bar, shift = pad_blocks(y), pad_blocks(v_bar), largest_exponent(d)
        k_bar = key_gradient(
            self.k, self.k_hat, y, v_bar, _units(y, v_bar, ids), ids,
            None if ids is None else _limits(ids), norm=math.sqrt(d), shift=shift,
            scale=key_gradient_scale(d, shift), interpret=self.interpret,
        )  # fmt: skip
        return k_bar[:, :s, :, :d]


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
    _, s, heads, w = x.shape
    sizes = jnp.abs(x.astype(jnp.float32))
    # The barrier keeps XLA from reading all values again for the largest of a segment.
    sizes = jax.lax.optimization_barrier(jnp.where(sizes < jnp.inf, sizes, 0).max(3))
    sizes = sizes.swapaxes(1, 2).reshape(-1, s)
    if ids is None:
        largest = jnp.broadcast_to(sizes.max(1, keepdims=True), sizes.shape)
    else:
        runs = jnp.cumsum(jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0, 1)
        runs = jnp.repeat(jnp.where(is_contiguous(ids)[:, None], runs, 0), heads, 0)
        of_runs = jax.vmap(lambda x, i: jax.ops.segment_max(x, i, x.size)[i])
        largest = of_runs(sizes, runs)
    room = 1 + math.ceil(math.log2(w) / 2)
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
