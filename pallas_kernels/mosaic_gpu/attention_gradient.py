"""The gradients of `attention`, which compute the weights again from the saved maxima and norms.

One kernel is parallel in queries, the other in keys, so that neither needs atomics and both are
bitwise reproducible. With the weights `P`, `P̄ = ō vᵀ` and `δ_i = o_i·ō_i`:

    L̄ = P ∘ (P̄ − δ),  q̄ = scale·L̄ k,  k̄ = scale·L̄ᵀ q,  v̄ = Pᵀ ō

`P` and `L̄` are rounded to the dtype of the inputs, float16 to multiples of 2⁻²⁴.

A program with a block of keys visits the tiles of queries behind it before those of the block
itself. The document that leaves the block bounds them, and what other rows have summed up by then
is dropped, for the reason that `attention` gives.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import tile
from pallas_kernels.mosaic_gpu.attention_tile import (
    LOWEST,
    drop_rows,
    mask_where,
    query_block,
    rows_of_head,
    sees,
    store_rows,
    turns_for,
    visit_all,
)
from pallas_kernels.scaling import LOG2E

# Columns of a tile, and the tiles of a ring, for heads of W.
_QUERY_TILES = {64: (64, 5), 80: (64, 4), 128: (64, 4)}
# More tiles would leave less of the cache to registers that are spilled.
_KEY_TILES = {64: (64, 4), 80: (64, 4), 128: (64, 2)}


def row_factors(
    o: jax.Array, o_bar: jax.Array, largest: jax.Array, inverse: jax.Array, scale: float
) -> jax.Array:
    """Returns of each query the logarithm to base 2 of the sum of its exponentials, and `δ`.

    Args:
      o: The result `[B,S,H,D]`.
      o_bar: Its cotangent.
      largest: The maxima `[B,H,S]` that `attend` returned.
      inverse: One over the norms that it returned.
      scale: The factor of the logits.

    Returns:
      float32 `[B,H,2,S]`.
    """
    delta = jnp.einsum("bshd,bshd->bhs", o, o_bar, preferred_element_type=jnp.float32)
    # In one kernel with the stack, XLA would have each thread add up a row.
    delta = jax.lax.optimization_barrier(delta)
    exponent = jnp.maximum(largest * (scale * LOG2E), LOWEST)
    return jnp.stack([exponent - jnp.log2(inverse), delta], 2)


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def query_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    o_bar: jax.Array,
    factors: jax.Array,
    segment_ids: jax.Array | None = None,
    limits: jax.Array | None = None,
    *,
    scale: float,
    interpret: Any = None,
) -> jax.Array:
    """Returns `q̄ [B,S,H,W]` in the dtype of `q`.

    Args:
      q, k, v, segment_ids, limits, scale, interpret: As in `attention.attend`.
      o_bar: The cotangent of its result `[B,S,H,W]`, dtype of `q`.
      factors: The `row_factors` `[B,H,2,S]`.
    """
    (b, s, heads, w), kv_heads = q.shape, k.shape[2]
    columns, stages = _QUERY_TILES[w]
    body = functools.partial(
        _query_kernel,
        length=s,
        group_size=heads // kv_heads,
        width=w,
        columns=columns,
        scale=scale,
        interpret=interpret,
    )
    own = tile.buffer(tile.ROWS, w, dtype=q.dtype)
    tiles = tile.buffer(stages, columns, w, dtype=q.dtype)
    scratch = (
        own, own, tiles, tiles, tile.barriers(1, 2),
        *(tile.barriers(stages),) * 2, *(tile.barriers(stages, tile.GROUPS),) * 2,
        turns_for(w),
        tile.operands(columns, interpret, q.dtype),
        tile.totals(w, interpret),
    )  # fmt: skip
    shape = jax.ShapeDtypeStruct((b * s, heads * w), q.dtype)
    # Heads first, so that programs that run together read the same keys.
    grid = heads, s // tile.ROWS, b
    call = tile.run(body, shape, grid, scratch, interpret, "lucid_attention_query_gradient")
    arrays = (x.reshape(b * s, -1) for x in (q, o_bar, k, v))
    return call(*arrays, factors.reshape(-1, s), segment_ids, limits).reshape(q.shape)


def _query_kernel(
    # Arrays.
    q_ref,  # [B·S,H·W]
    o_bar_ref,  # [B·S,H·W]
    k_ref,  # [B·S,K·W]
    v_ref,  # [B·S,K·W]
    factors_ref,  # [B·H·2,S]
    segments_ref,  # [B,S] or None
    limits_ref,  # [B,S/R,3] or None
    q_bar_ref,  # [B·S,H·W]
    group,
    # Shared memory.
    q_own,  # [R,W]
    o_bar_own,  # [R,W]
    k_tiles,  # [stages,C,W]
    v_tiles,  # [stages,C,W]
    # Barriers.
    own_full,
    k_full,
    v_full,
    k_free,
    v_free,
    turns,
    operands,  # [2,R/2,C] or None
    totals,  # [2,R/2,W] or None
    # Static.
    *,
    length: int,
    group_size: int,
    width: int,
    columns: int,
    scale: float,
    interpret: Any,
):
    one, stages = jnp.int32(1), k_tiles.shape[0]
    head, b = jax.lax.axis_index("axis0"), jax.lax.axis_index("axis2")
    block = query_block(limits_ref, b, length, columns)
    first_row, visits = block.first_row, block.visits
    place = functools.partial(rows_of_head, b * length, width)

    def slot_of(t):
        return jax.lax.rem(t, stages * one)

    @tile.as_group(group, computes=True, interpret=interpret)
    def _():
        mine = tile.rows_of(group)
        scratch = None if operands is None else operands.at[group]
        row = first_row + group * tile.HALF
        at = 2 * (b * jax.lax.axis_size("axis0") + head)
        exponent, delta = (
            tile.load_vector(factors_ref.at[at + i, pl.ds(row, tile.HALF)], 0) for i in range(2)
        )
        plgpu.barrier_wait(own_full)
        queries, o_bar = q_own.at[mine], o_bar_own.at[mine]
        if width < 128:  # With 128 registers are short.
            queries, o_bar = (tile.rows_operand(x, interpret) for x in (queries, o_bar))

        def start_products(t, logits, products):
            plgpu.barrier_wait(k_full.at[slot_of(t)])
            plgpu.wgmma(logits, queries, k_tiles.at[slot_of(t)].transpose((1, 0)))
            plgpu.barrier_wait(v_full.at[slot_of(t)])
            plgpu.wgmma(products, o_bar, v_tiles.at[slot_of(t)].transpose((1, 0)))

        def weigh(is_masked, t, found, total):
            """Returns `L̄` of a tile as the left operand of a product."""
            logits, products = found
            shape = logits.shape

            def over(x):
                return jax.lax.broadcast_in_dim(x, shape, (0,))

            weights = jnp.exp2(logits * (scale * LOG2E) - over(exponent))
            logits_bar = weights * (products - over(delta))

            def mask(x):
                seen = sees(segments_ref, b, row, block.locate(t) * columns, shape)
                return jnp.where(seen, x, 0.0)

            logits_bar = mask_where(is_masked, mask, logits_bar)
            if is_masked is not False:
                block.drop(total, t, group)
            return logits_bar.astype(q_own.dtype)

        def add(t, weights, total):
            operand = tile.operand(weights, scratch)
            tile.add_product(total, operand, k_tiles.at[slot_of(t)], interpret)

        def run(f):
            accumulator = plgpu.ACC((tile.HALF, columns), jnp.float32)
            return pl.run_scoped(f, accumulator, accumulator)

        def sum_tiles(total):
            def first(*accumulators):
                with tile.turn(turns, group):
                    start_products(0 * one, *accumulators)
                found = [x[...] for x in accumulators]
                plgpu.barrier_arrive(v_free.at[0])
                return weigh(block.plain == 0, 0 * one, found, total)

            def visit(is_masked, t, weights):
                def with_next(*accumulators):
                    with tile.turn(turns, group):
                        start_products(t + 1, *accumulators)
                        add(t, weights, total)
                    found = [x[...] for x in accumulators]
                    plgpu.barrier_arrive(v_free.at[slot_of(t + 1)])
                    plgpu.barrier_arrive(k_free.at[slot_of(t)])
                    return weigh(is_masked, t + 1, found, total)

                return run(with_next)

            weights = visit_all(visit, block.plain, visits, run(first))
            with tile.turn(turns, group):
                add(visits - one, weights, total)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(k_free.at[slot_of(visits - one)])
            return total[...]

        tile.begin_turns(turns, group)
        total = tile.with_total(sum_tiles, totals, group, width)
        tile.end_turns(turns, group)
        store_rows(total * scale, q_own.at[mine], q_bar_ref.at[place(row, tile.HALF, head)])

    @tile.as_group(group, computes=False, interpret=interpret)
    def _():
        for ref, own in ((q_ref, q_own), (o_bar_ref, o_bar_own)):
            plgpu.copy_gmem_to_smem(ref.at[place(first_row, tile.ROWS, head)], own, own_full)
        kv_head = jax.lax.div(head, group_size * one)

        def source(t):
            return place(block.locate(t) * columns, columns, kv_head)

        rings = (k_ref, k_tiles, k_full, k_free), (v_ref, v_tiles, v_full, v_free)
        tile.fill([tile.Ring(*ring, source) for ring in rings], visits)


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def key_value_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    o_bar: jax.Array,
    factors: jax.Array,
    segment_ids: jax.Array | None = None,
    limits: jax.Array | None = None,
    *,
    scale: float,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns `k̄` and `v̄ [B,S,K,W]` in the dtype of `k`.

    Args:
      q, k, v, o_bar, factors, segment_ids, scale, interpret: As in `query_gradient`.
      limits: With `segment_ids`, int32 `[B,S/R,3]`: one past the last query that shares a document
        with each block of keys, one past the last of those that see all of its rows, and how many
        of its rows belong to the document that leaves it.
    """
    (b, s, heads, w), kv_heads = q.shape, k.shape[2]
    columns, stages = _KEY_TILES[w]
    body = functools.partial(
        _key_kernel,
        length=s,
        group_size=heads // kv_heads,
        width=w,
        columns=columns,
        scale=scale,
        interpret=interpret,
    )
    own = tile.buffer(tile.ROWS, w, dtype=q.dtype)
    tiles = tile.buffer(stages, columns, w, dtype=q.dtype)
    operands, totals = tile.operands(columns, interpret, q.dtype), tile.totals(w, interpret)
    scratch = (
        own, own, tiles, tiles, plgpu.SMEM((stages, 2, columns), jnp.float32),
        tile.barriers(1, 2), *(tile.barriers(stages),) * 3,
        *(tile.barriers(stages, tile.GROUPS),) * 3,
        turns_for(w), operands, operands, totals, totals,
    )  # fmt: skip
    shape = jax.ShapeDtypeStruct((b * s, kv_heads * w), q.dtype)
    grid = kv_heads, s // tile.ROWS, b
    call = tile.run(body, (shape, shape), grid, scratch, interpret, "lucid_attention_key_gradient")
    arrays = (x.reshape(b * s, -1) for x in (k, v, q, o_bar))
    found = call(*arrays, factors.reshape(-1, s), segment_ids, limits)
    k_bar, v_bar = (x.reshape(k.shape) for x in found)
    return k_bar, v_bar


def _key_kernel(
    # Arrays.
    k_ref,  # [B·S,K·W]
    v_ref,  # [B·S,K·W]
    q_ref,  # [B·S,H·W]
    o_bar_ref,  # [B·S,H·W]
    factors_ref,  # [B·H·2,S]
    segments_ref,  # [B,S] or None
    limits_ref,  # [B,S/R,3] or None
    k_bar_ref,  # [B·S,K·W]
    v_bar_ref,  # [B·S,K·W]
    group,
    # Shared memory.
    k_own,  # [R,W]
    v_own,  # [R,W]
    q_tiles,  # [stages,C,W]
    o_bar_tiles,  # [stages,C,W]
    factor_tiles,  # [stages,2,C]
    # Barriers.
    own_full,
    q_full,
    o_bar_full,
    factors_full,
    q_free,
    o_bar_free,
    factors_free,
    turns,
    weights_operands,  # [2,R/2,C] or None
    logits_operands,  # [2,R/2,C] or None
    k_totals,  # [2,R/2,W] or None
    v_totals,  # [2,R/2,W] or None
    # Static.
    *,
    length: int,
    group_size: int,
    width: int,
    columns: int,
    scale: float,
    interpret: Any,
):
    one, stages = jnp.int32(1), q_tiles.shape[0]
    # The first blocks have the most queries, and start first.
    kv_head, block, b = (jax.lax.axis_index(f"axis{i}") for i in range(3))
    first_row = block * tile.ROWS
    place = functools.partial(rows_of_head, b * length, width)
    end, unmasked, size = length * one, length * one, tile.ROWS * one
    if limits_ref is not None:
        end, unmasked, size = (limits_ref[b, block, i] for i in range(3))
    own_tile, own_tiles = jax.lax.div(first_row, columns * one), tile.ROWS // columns
    later = jax.lax.div(end + columns - 1, columns * one) - own_tile - own_tiles
    visits = (later + own_tiles) * group_size
    plain = jax.lax.div(unmasked, columns * one) - own_tile - own_tiles
    plain = jnp.clip(plain, 0, later) * group_size

    def slot_of(n):
        return jax.lax.rem(n, stages * one)

    def locate(n):
        """Returns the tile of a visit, and the query head."""
        t = jax.lax.div(n, group_size * one)
        t = own_tile + jax.lax.select(t < later, t + own_tiles, t - later)
        return t, kv_head * group_size + jax.lax.rem(n, group_size * one)

    @tile.as_group(group, computes=True, interpret=interpret)
    def _():
        mine = tile.rows_of(group)
        row = first_row + group * tile.HALF
        scratches = [
            None if x is None else x.at[group] for x in (weights_operands, logits_operands)
        ]
        plgpu.barrier_wait(own_full)
        keys, values = k_own.at[mine], v_own.at[mine]
        if width == 64:  # With more columns registers are short.
            keys, values = (tile.rows_operand(x, interpret) for x in (keys, values))

        def start_products(n, logits, products):
            slot = slot_of(n)
            plgpu.barrier_wait(q_full.at[slot])
            plgpu.wgmma(logits, keys, q_tiles.at[slot].transpose((1, 0)))
            plgpu.barrier_wait(o_bar_full.at[slot])
            plgpu.wgmma(products, values, o_bar_tiles.at[slot].transpose((1, 0)))

        def weigh(is_masked, n, found, totals):
            """Returns `Pᵀ` and `L̄ᵀ` of a tile as left operands of products."""
            (logits, products), (t, _) = found, locate(n)
            shape = logits.shape

            def over_rows(i):
                x = tile.load_vector(factor_tiles.at[slot_of(n), i], 1)
                return jax.lax.broadcast_in_dim(x, shape, (1,))

            plgpu.barrier_wait(factors_full.at[slot_of(n)])
            weights = jnp.exp2(logits * (scale * LOG2E) - over_rows(0))
            logits_bar = weights * (products - over_rows(1))
            plgpu.barrier_arrive(factors_free.at[slot_of(n)])

            def mask(*arrays):
                seen = sees(segments_ref, b, row, t * columns, shape, transposed=True)
                return tuple(jnp.where(seen, x, 0.0) for x in arrays)

            operands = mask_where(is_masked, mask, weights, logits_bar)
            if is_masked is not False:
                drops = (n == later * group_size) & (size < tile.ROWS)
                for total in totals:
                    drop_rows(total, drops, group, tile.ROWS - size, tile.ROWS)
            return tuple(x.astype(k_own.dtype) for x in operands)

        def add(n, operands, totals):
            tiles = o_bar_tiles.at[slot_of(n)], q_tiles.at[slot_of(n)]
            for total, x, scratch, rows in zip(totals, operands, scratches, tiles):
                tile.add_product(total, tile.operand(x, scratch), rows, interpret)

        def run(f):
            accumulator = plgpu.ACC((tile.HALF, columns), jnp.float32)
            return pl.run_scoped(f, accumulator, accumulator)

        def sum_visits(*totals):
            def first(*accumulators):
                with tile.turn(turns, group):
                    start_products(0 * one, *accumulators)
                return weigh(plain == 0, 0 * one, [x[...] for x in accumulators], totals)

            def visit(is_masked, n, operands):
                def with_next(*accumulators):
                    with tile.turn(turns, group):
                        add(n, operands, totals)
                        if width == 128:  # Registers are too few for both.
                            plgpu.wgmma_wait(0)
                        start_products(n + 1, *accumulators)
                    found = [x[...] for x in accumulators]
                    plgpu.barrier_arrive(q_free.at[slot_of(n)])
                    plgpu.barrier_arrive(o_bar_free.at[slot_of(n)])
                    return weigh(is_masked, n + 1, found, totals)

                return run(with_next)

            operands = visit_all(visit, plain, visits, run(first))
            with tile.turn(turns, group):
                add(visits - one, operands, totals)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(q_free.at[slot_of(visits - one)])
            plgpu.barrier_arrive(o_bar_free.at[slot_of(visits - one)])
            return tuple(total[...] for total in totals)

        def with_v_total(v_total):
            sum_with = functools.partial(sum_visits, v_total)
            return tile.with_total(sum_with, k_totals, group, width)

        tile.begin_turns(turns, group)
        v_bar, k_bar = tile.with_total(with_v_total, v_totals, group, width)
        tile.end_turns(turns, group)
        at = place(row, tile.HALF, kv_head)
        store_rows(k_bar * scale, k_own.at[mine], k_bar_ref.at[at])
        store_rows(v_bar, v_own.at[mine], v_bar_ref.at[at])

    @tile.as_group(group, computes=False, interpret=interpret)
    def _():
        for ref, own in ((k_ref, k_own), (v_ref, v_own)):
            plgpu.copy_gmem_to_smem(ref.at[place(first_row, tile.ROWS, kv_head)], own, own_full)

        def source(n):
            t, head = locate(n)
            return place(t * columns, columns, head)

        def factors_of(n):
            t, head = locate(n)
            heads = jax.lax.axis_size("axis0") * group_size
            return pl.ds(2 * (b * heads + head), 2), pl.ds(t * columns, columns)

        rings = (
            tile.Ring(q_ref, q_tiles, q_full, q_free, source),
            tile.Ring(o_bar_ref, o_bar_tiles, o_bar_full, o_bar_free, source),
            tile.Ring(factors_ref, factor_tiles, factors_full, factors_free, factors_of),
        )
        tile.fill(rings, visits)
