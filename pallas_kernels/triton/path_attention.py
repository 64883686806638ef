"""Softmax attention whose queries and keys have a level for each pair of blocks, as PaTH's have.

`solve` says what levels are. XLA has attended within blocks; the kernels add the blocks before. At
level l the queries of a block whose number has the bit l meet the keys of the `2^l` blocks before
it that lack it, so that one program goes through the levels, and loads its queries anew for each.
The weights of the gradients are computed again from the saved maxima and norms, as in
`attention_gradient`, and no sum needs atomics.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.call import pallas_call
from pallas_kernels.scaling import LOG2E
from pallas_kernels.triton import tile
from pallas_kernels.triton.parts import zero_tile
from pallas_kernels.triton.tiles import Tiles


@functools.partial(jax.jit, static_argnames=("scale", "block", "tiles", "interpret"))
def attend_levels(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    start: jax.Array | None,
    total: jax.Array,
    largest: jax.Array,
    norm: jax.Array,
    *,
    scale: float,
    block: int,
    tiles: Tiles,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the attention of all blocks, and what its gradient needs.

    Args:
      q: Queries of L levels `[L·B,H,S',W]`.
      k: Keys of L levels `[L·B,K,S',W]`.
      v: Values `[B,S,K,D]`.
      segment_ids: int32 `[B,S']`, or None.
      start: int32 `[B,S'/R]`, the first key of each block of R queries, or None.
      total: The values within blocks, weighted: float32 `[B,H,S',W]`.
      largest: The largest product within its block of each query, float32 `[B,H,S']`.
      norm: The sum of its weights there, relative to that.
      scale: Factor of the logits.
      block: Rows of the blocks that levels number, a multiple of R.
      tiles: Tile sizes.
      interpret: Whether to run in Pallas' interpreter.

    Returns:
      `o [B,S,H,D]`; the largest product of each query and one over its norm, float32 `[B,H,S']`.
    """
    b, s, _, d = v.shape
    body = functools.partial(
        _forward_kernel, scale=scale * LOG2E, block=block, tiles=tiles, interpret=interpret
    )
    shapes = jax.ShapeDtypeStruct((b, s, q.shape[1], d), v.dtype), largest, largest
    arrays = q, k, v, segment_ids, start, total, largest, norm
    return _call(body, "lucid_path_attention", q, b, shapes, tiles, interpret)(*arrays)


@functools.partial(jax.jit, static_argnames=("scale", "block", "tiles", "interpret"))
def level_query_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    start: jax.Array | None,
    o_bar: jax.Array,
    largest: jax.Array,
    inverse: jax.Array,
    delta: jax.Array,
    *,
    scale: float,
    block: int,
    tiles: Tiles,
    interpret: bool = False,
) -> jax.Array:
    """Returns the gradient of the queries at every level, float32 `[L·B,H,S',W]`.

    Args:
      q, k, v, segment_ids, start, scale, block, tiles, interpret: As in `attend_levels`.
      o_bar: The cotangent of the result `[B,S,H,D]`.
      largest: The maxima that `attend_levels` returned.
      inverse: One over the norms that it returned.
      delta: `o_i·ō_i` of each query, float32 `[B,H,S']`.
    """
    body = functools.partial(
        _query_kernel, scale=scale, block=block, tiles=tiles, interpret=interpret
    )
    shape = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    arrays = q, k, v, segment_ids, start, o_bar, largest, inverse, delta
    name = "lucid_path_attention_query_gradient"
    return _call(body, name, q, v.shape[0], shape, tiles, interpret)(*arrays)


@functools.partial(jax.jit, static_argnames=("scale", "block", "tiles", "interpret"))
def level_key_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    end: jax.Array | None,
    o_bar: jax.Array,
    largest: jax.Array,
    inverse: jax.Array,
    delta: jax.Array,
    *,
    scale: float,
    block: int,
    tiles: Tiles,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of the keys at every level and of the values.

    Args:
      q, k, v, segment_ids, o_bar, largest, inverse, delta, scale, block, tiles, interpret: As in
        `level_query_gradient`, but the rows of tiles are keys.
      end: int32 `[B,S'/R]`, one past the last query of each block of R keys, or None.

    Returns:
      float32 `[L·B,K,S',W]`, and without the part within blocks float32 `[B,S,K,D]`.
    """
    body = functools.partial(
        _key_kernel, scale=scale, block=block, tiles=tiles, interpret=interpret
    )
    shapes = (jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (k, v))
    arrays = q, k, v, segment_ids, end, o_bar, largest, inverse, delta
    name = "lucid_path_attention_key_gradient"
    return _call(body, name, k, v.shape[0], tuple(shapes), tiles, interpret)(*arrays)


def _call(body, name: str, rows: jax.Array, batch: int, out_shape, tiles: Tiles, interpret: bool):
    return pallas_call(
        body,
        # Heads first, so that programs that run together read the same keys.
        grid=(rows.shape[1], rows.shape[2] // tiles.rows, batch),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=name,
    )


def _forward_kernel(
    # Inputs.
    q_ref,  # [L·B,H,S',W]
    k_ref,  # [L·B,K,S',W]
    v_ref,  # [B,S,K,D]
    segments_ref,  # [B,S'] or None
    start_ref,  # [B,S'/R] or None
    total_ref,  # [B,H,S',W]
    largest_in_ref,  # [B,H,S']
    norm_ref,  # [B,H,S']
    # Outputs.
    o_ref,  # [B,S,H,D]
    largest_ref,  # [B,H,S']
    inverse_ref,  # [B,H,S']
    # Static.
    *,
    scale: float,
    block: int,
    tiles: Tiles,
    interpret: bool,
):
    h, b = pl.program_id(0), pl.program_id(2)
    # The last blocks have the most keys, so they start first.
    at = pl.num_programs(1) - 1 - pl.program_id(1)
    (planes, heads, padded, _), (batch, length, kv_heads, _) = q_ref.shape, v_ref.shape
    r, c, dtype = tiles.rows, tiles.columns, q_ref.dtype
    kv, row, levels = h // (heads // kv_heads), at * r, planes // batch
    s = None if padded == length else length
    segments_i = tile.load_segments(segments_ref, b, row, r)
    start = 0 if start_ref is None else plgpu.load(start_ref.at[b, at])

    def visit_level(step, carry):
        level = levels - 1 - step
        plane = level * batch + b
        q_i = tile.load_keys(q_ref, plane, h, row, r)

        def visit(t, carry):
            total, largest, norm = carry
            k_j = tile.load_keys(k_ref, plane, kv, t * c, c)
            logits = tile.dot_rows(q_i, k_j)
            segments_j = tile.load_segments(segments_ref, b, t * c, c)
            logits = tile.mask(logits, segments_i, segments_j, -jnp.inf)
            new_largest = jnp.maximum(largest, jnp.max(logits, 1))
            exponents = tile.exponents(logits, new_largest[:, None], scale, dtype)
            weights = tile.exp2(exponents, dtype, interpret, bounded=False)
            weights = tile.mask(weights, segments_i, segments_j)
            decay = jnp.exp2((largest - new_largest) * scale)
            v_j = tile.load_rows(v_ref, b, t * c, c, kv, s)
            total = total * decay[:, None] + tile.dot(weights.astype(dtype), v_j)
            return total, new_largest, norm * decay + jnp.sum(weights, 1)

        return jax.lax.fori_loop(*_earlier(row, block, level, start, c), visit, carry)

    total = tile.load_keys(total_ref, b, h, row, r)
    largest, norm = (plgpu.load(x.at[b, h, pl.ds(row, r)]) for x in (largest_in_ref, norm_ref))
    total, largest, norm = jax.lax.fori_loop(0, levels, visit_level, (total, largest, norm))
    inverse = 1 / norm
    tile.store_rows(o_ref, b, row, r, h, total * inverse[:, None], s)
    for ref, x in ((largest_ref, largest), (inverse_ref, inverse)):
        plgpu.store(ref.at[b, h, pl.ds(row, r)], x)


def _query_kernel(
    # Inputs.
    q_ref,  # [L·B,H,S',W]
    k_ref,  # [L·B,K,S',W]
    v_ref,  # [B,S,K,D]
    segments_ref,  # [B,S'] or None
    start_ref,  # [B,S'/R] or None
    o_bar_ref,  # [B,S,H,D]
    largest_ref,  # [B,H,S']
    inverse_ref,  # [B,H,S']
    delta_ref,  # [B,H,S']
    # Output.
    q_bar_ref,  # [L·B,H,S',W]
    # Static.
    *,
    scale: float,
    block: int,
    tiles: Tiles,
    interpret: bool,
):
    h, b = pl.program_id(0), pl.program_id(2)
    # The last blocks have the most keys, so they start first.
    at = pl.num_programs(1) - 1 - pl.program_id(1)
    (planes, heads, padded, _), (batch, length, kv_heads, d) = q_ref.shape, v_ref.shape
    r, c, dtype = tiles.rows, tiles.columns, q_ref.dtype
    kv, row, levels = h // (heads // kv_heads), at * r, planes // batch
    s = None if padded == length else length
    segments_i = tile.load_segments(segments_ref, b, row, r)
    start = 0 if start_ref is None else plgpu.load(start_ref.at[b, at])
    o_bar_i = tile.load_rows(o_bar_ref, b, row, r, h, s)
    largest, inverse, delta = (
        plgpu.load(ref.at[b, h, pl.ds(row, r)])[:, None]
        for ref in (largest_ref, inverse_ref, delta_ref)
    )

    def visit_level(step, carry):
        level = levels - 1 - step
        plane = level * batch + b
        q_i = tile.load_keys(q_ref, plane, h, row, r)

        def visit(t, total):
            k_j = tile.load_keys(k_ref, plane, kv, t * c, c)
            v_j = tile.load_rows(v_ref, b, t * c, c, kv, s)
            logits = tile.dot_rows(q_i, k_j)
            exponents = tile.exponents(logits, largest, scale * LOG2E, dtype)
            weights = tile.exp2(exponents, dtype, interpret, bounded=False) * inverse
            logits_bar = weights * (tile.dot_rows(o_bar_i, v_j) - delta)
            segments_j = tile.load_segments(segments_ref, b, t * c, c)
            logits_bar = tile.mask(logits_bar, segments_i, segments_j)
            return total + tile.dot(logits_bar.astype(dtype), k_j)

        zeros = zero_tile(r, d)
        total = jax.lax.fori_loop(*_earlier(row, block, level, start, c), visit, zeros)
        tile.store_keys(q_bar_ref, plane, h, row, total * scale)
        return carry

    jax.lax.fori_loop(0, levels, visit_level, row)


def _key_kernel(
    # Inputs.
    q_ref,  # [L·B,H,S',W]
    k_ref,  # [L·B,K,S',W]
    v_ref,  # [B,S,K,D]
    segments_ref,  # [B,S'] or None
    end_ref,  # [B,S'/R] or None
    o_bar_ref,  # [B,S,H,D]
    largest_ref,  # [B,H,S']
    inverse_ref,  # [B,H,S']
    delta_ref,  # [B,H,S']
    # Outputs.
    k_bar_ref,  # [L·B,K,S',W]
    v_bar_ref,  # [B,S,K,D]
    # Static.
    *,
    scale: float,
    block: int,
    tiles: Tiles,
    interpret: bool,
):
    kv, at, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    (planes, heads, padded, _), (batch, length, kv_heads, d) = q_ref.shape, v_ref.shape
    r, c, dtype = tiles.rows, tiles.columns, q_ref.dtype
    row, levels, group = at * r, planes // batch, heads // kv_heads
    s = None if padded == length else length
    segments_i = tile.load_segments(segments_ref, b, row, r)
    end = padded if end_ref is None else plgpu.load(end_ref.at[b, at])
    v_i = tile.load_rows(v_ref, b, row, r, kv, s)

    def visit_level(step, v_bar):
        level = levels - 1 - step
        plane = level * batch + b
        k_i = tile.load_keys(k_ref, plane, kv, row, r)
        first, last = _later(row, block, level, end, c)

        def visit(n, totals):
            """Visits the `n`-th pair of a tile of queries and a query head."""
            k_bar, v_bar = totals
            t, h = tile.divide(n, group)
            start, h = (first + t) * c, kv * group + h
            q_j = tile.load_keys(q_ref, plane, h, start, c)
            o_bar_j = tile.load_rows(o_bar_ref, b, start, c, h, s)
            largest, inverse, delta = (
                plgpu.load(ref.at[b, h, pl.ds(start, c)])[None, :]
                for ref in (largest_ref, inverse_ref, delta_ref)
            )
            # With the rounding errors of the forward pass.
            logits = tile.dot_rows_mirrored(k_i, q_j)
            exponents = tile.exponents(logits, largest, scale * LOG2E, dtype)
            weights = tile.exp2(exponents, dtype, interpret, bounded=False) * inverse
            segments_j = tile.load_segments(segments_ref, b, start, c)
            weights = tile.mask(weights, segments_i, segments_j)
            weights_bar = tile.dot_rows(v_i, o_bar_j)
            logits_bar = weights * (weights_bar - delta)
            v_bar += tile.dot(weights.astype(dtype), o_bar_j)
            return k_bar + tile.dot(logits_bar.astype(dtype), q_j), v_bar

        zeros = zero_tile(r, d)
        count = jnp.maximum(last - first, 0) * group
        k_bar, v_bar = jax.lax.fori_loop(0, count, visit, (zeros, v_bar))
        tile.store_keys(k_bar_ref, plane, kv, row, k_bar * scale)
        return v_bar

    v_bar = jax.lax.fori_loop(0, levels, visit_level, zero_tile(r, d))
    tile.store_rows(v_bar_ref, b, row, r, kv, v_bar, s)


def _earlier(row, block: int, level, start, columns: int) -> tuple[jax.Array, jax.Array]:
    """Returns the first tile of keys that queries meet at a level, and one past the last."""
    group = row // block >> level
    end = (group << level) * block
    first = jnp.maximum(end - (block << level), start)
    # Without the bit of the level they meet none.
    return first // columns, (group & 1) * (end // columns)


def _later(row, block: int, level, end, columns: int) -> tuple[jax.Array, jax.Array]:
    """Returns the first tile of queries that keys meet at a level, and one past the last."""
    group = row // block >> level
    first = (group + 1 << level) * block
    last = jnp.minimum(first + (block << level), end)
    return first // columns, (1 - (group & 1)) * ((last + columns - 1) // columns)
