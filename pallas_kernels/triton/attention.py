"""Causal softmax attention over packed sequences: it skips what segments hide.

One program attends with a block of queries of one head to the tiles of keys before it, with a
running maximum and sum (Dao, FlashAttention-2, arXiv 2307.08691). The document that enters the
block from the blocks before it bounds these tiles. Tiles inside of it need no mask.

A document that starts within the block shares none of these tiles, so what its rows have summed up
over them is dropped: it is zero, or NaN if a value was. The tiles of the block itself are visited
once for the document that enters the block and once for the others, each with the values of the
other side as zeros. So a NaN does not pass through a block from one document to another.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.call import pallas_call
from pallas_kernels.scaling import LOG2E
from pallas_kernels.triton import tile
from pallas_kernels.triton.parts import map_parts, zero_tile
from pallas_kernels.triton.tiles import Tiles

# A finite lower bound of the running maximum, so that a row without a visible key stays zero.
_LOWEST = -3e38


class Visible(NamedTuple):
    """The tokens of other blocks that each block sees, or is seen by: int32 `[B,N]`.

    Attributes:
      bound: The first token, or one past the last, of the document that enters or leaves the
        block; the bound of the block itself where there is none.
      unmasked: Likewise, of those that all tokens of the block see, or are seen by.
      size: The rows of the block that belong to that document.
    """

    bound: jax.Array
    unmasked: jax.Array
    size: jax.Array


@functools.partial(jax.jit, static_argnames=("scale", "tiles", "interpret"))
def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    visible: Visible | None,
    *,
    scale: float,
    tiles: Tiles,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `o = softmax(scale·q kᵀ + causal) v`, and what its gradient needs.

    Args:
      q: Queries `[B,S,H,D]`.
      k: Keys `[B,S,K,D]`.
      v: Values `[B,S,K,D]`.
      segment_ids: int32 `[B,N·R]`, or None.
      visible: The tokens that blocks of R queries see, or None where each sequence is one segment.
      scale: Factor of the logits.
      tiles: Tile sizes.
      interpret: Whether to run in Pallas' interpreter.

    Returns:
      `o [B,S,H,D]`; the largest product `q·k` of each query, and one over the sum of its
      exponentials relative to that, float32 `[B,H,N·R]`. Their logarithms are not added up, because
      one would be lost where logits are large.
    """
    b, s, heads, _ = q.shape
    blocks = pl.cdiv(s, tiles.rows)
    row_type = jax.ShapeDtypeStruct((b, heads, blocks * tiles.rows), jnp.float32)
    return pallas_call(
        functools.partial(_kernel, scale=scale * LOG2E, tiles=tiles, interpret=interpret),
        # Heads first, so that programs that run together read the same keys.
        grid=(heads, blocks, b),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), row_type, row_type),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="lucid_attention",
    )(q, k, v, segment_ids, *(visible or [None] * 3))


def _kernel(
    # Inputs.
    q_ref,  # [B,S,H,D]
    k_ref,  # [B,S,K,D]
    v_ref,  # [B,S,K,D]
    segments_ref,  # [B,N·R] or None
    start_ref,  # [B,N] or None
    unmasked_ref,  # [B,N] or None
    size_ref,  # [B,N] or None
    # Outputs.
    o_ref,  # [B,S,H,D]
    largest_ref,  # [B,H,N·R]
    inverse_ref,  # [B,H,N·R]
    # Static.
    *,
    scale: float,
    tiles: Tiles,
    interpret: bool,
):
    h, b = pl.program_id(0), pl.program_id(2)
    # The last blocks have the most keys, so they start first.
    block = pl.num_programs(1) - 1 - pl.program_id(1)
    length, heads, d = q_ref.shape[1:]
    kv = h // (heads // k_ref.shape[2])
    r, c, dtype = tiles.rows, tiles.columns, q_ref.dtype
    row = block * r
    s = None if length % r == 0 else length
    q_i = tile.load_rows(q_ref, b, row, r, h, s)
    segments_i = tile.load_segments(segments_ref, b, row, r)

    def visit(t, carry, *, masked: bool, begin=None, end=s):
        total, largest, norm = carry
        start = t * c
        k_j = tile.load_rows(k_ref, b, start, c, kv, s)
        logits = tile.dot_rows(q_i, k_j)
        if masked:
            segments_j = tile.load_segments(segments_ref, b, start, c)
            sees = tile.sees(row, start, segments_i, segments_j, r, c)
            logits = jnp.where(sees, logits, -jnp.inf)
        new_largest = jnp.maximum(largest, jnp.max(logits, 1))
        exponents = tile.exponents(logits, new_largest[:, None], scale, dtype)
        weights = tile.exp2(exponents, dtype, interpret, bounded=False)
        if masked:
            weights = jnp.where(sees, weights, 0)
        decay = jnp.exp2((largest - new_largest) * scale)
        v_j = tile.load_rows(v_ref, b, start, c, kv, end, begin=begin)
        total = total * decay[:, None] + tile.dot(weights.astype(dtype), v_j)
        return total, new_largest, norm * decay + jnp.sum(weights, 1)

    def select(rows, carry, others):
        """Takes the given rows of a carry, and the other rows of another one."""
        total = map_parts(lambda x, other: jnp.where(rows[:, None], x, other), carry[0], others[0])
        return total, *(jnp.where(rows, x, other) for x, other in zip(carry[1:], others[1:]))

    masked = functools.partial(visit, masked=True)
    unmasked = functools.partial(visit, masked=False)
    none = zero_tile(r, d), jnp.full(r, _LOWEST), jnp.zeros(r, jnp.float32)
    own, per_block = row // c, r // c
    if segments_ref is None:
        carry = jax.lax.fori_loop(0, own, unmasked, none)
        total, largest, norm = jax.lax.fori_loop(own, own + per_block, masked, carry)
    else:
        start, first, size = (
            plgpu.load(ref.at[b, block]) for ref in (start_ref, unmasked_ref, size_ref)
        )
        first = (first + c - 1) // c
        enters = jnp.arange(r) < size

        def visit_own(step, carry):
            part, t = tile.divide(step, per_block)
            t, starts = own + t, part == 1
            bound = row + size
            begin, end = jnp.where(starts, bound, row), jnp.where(starts, row + r, bound)
            new = masked(t, carry, begin=begin, end=jnp.minimum(end, length))
            return select(enters ^ starts, new, carry)

        entering = functools.partial(masked, begin=start)
        carry = jax.lax.fori_loop(start // c, first, entering, none)
        carry = jax.lax.fori_loop(first, own, unmasked, carry)
        total, largest, norm = jax.lax.fori_loop(
            per_block * (size == 0).astype(jnp.int32),
            per_block * (1 + (size < r).astype(jnp.int32)),
            visit_own,
            select(enters, carry, none),
        )
    inverse = 1 / norm
    tile.store_rows(o_ref, b, row, r, h, total * inverse[:, None], s)
    for ref, x in ((largest_ref, largest), (inverse_ref, inverse)):
        plgpu.store(ref.at[b, h, pl.ds(row, r)], x)
