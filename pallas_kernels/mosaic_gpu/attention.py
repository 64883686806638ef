"""Causal softmax attention over packed sequences: it skips what segments hide.

One program attends with a block of queries of one head to the tiles of keys before it, with a
running maximum and sum (Dao, FlashAttention-2, arXiv 2307.08691). While one group of warps computes
weights, the products of the other run (Shah et al., FlashAttention-3, arXiv 2407.08608). The
document that enters the block from the blocks before it bounds the tiles. Where it fills the block,
those inside of it need no mask.

A document that starts within the block shares none of the tiles before it, so what its rows have
summed up over them is dropped: it is zero, or NaN if a value was. So a NaN reaches no document that
has no row in its block.
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
_TILES = {64: (128, 4), 80: (128, 3), 128: (128, 2)}


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    limits: jax.Array | None = None,
    *,
    scale: float,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `o = softmax(scale·q kᵀ + causal) v`, and what its gradient needs.

    Args:
      q: Queries `[B,S,H,W]`, float16 or bfloat16; R divides S, and W is a width of tiles.
      k: Keys `[B,S,K,W]`, same dtype; K divides H.
      v: Values `[B,S,K,W]`, same dtype.
      segment_ids: int32 `[B,S]`, or None.
      limits: With `segment_ids`, int32 `[B,S/R,3]`: the first column that shares a document with
        each block of rows, the first of those that all of its rows see, and how many of its rows
        belong to the document that enters it.
      scale: The factor of the logits.
      interpret: The parameters of Pallas' interpreter, or None for a GPU.

    Returns:
      `o [B,S,H,W]`; the largest product `q·k` of each query, and one over the sum of its
      exponentials relative to that, float32 `[B,H,S]`.
    """
    (b, s, heads, w), kv_heads = q.shape, k.shape[2]
    columns, stages = _TILES[w]
    body = functools.partial(
        _kernel,
        length=s,
        group_size=heads // kv_heads,
        width=w,
        columns=columns,
        scale=scale * LOG2E,
        interpret=interpret,
    )
    tiles = tile.buffer(stages, columns, w, dtype=q.dtype)
    scratch = (
        tile.buffer(tile.ROWS, w, dtype=q.dtype),
        tiles,
        tiles,
        tile.barriers(1),
        *(tile.barriers(stages),) * 2,
        *(tile.barriers(stages, tile.GROUPS),) * 2,
        turns_for(w),
        tile.operands(columns, interpret, q.dtype),
        tile.totals(w, interpret),
    )
    of_rows = jax.ShapeDtypeStruct((b * heads, s), jnp.float32)
    shapes = jax.ShapeDtypeStruct((b * s, heads * w), q.dtype), of_rows, of_rows
    # Heads first, so that programs that run together read the same keys.
    grid = heads, s // tile.ROWS, b
    call = tile.run(body, shapes, grid, scratch, interpret, "lucid_attention")
    arrays = (x.reshape(b * s, -1) for x in (q, k, v))
    o, *rows = call(*arrays, segment_ids, limits)
    return o.reshape(q.shape), *(x.reshape(b, heads, s) for x in rows)


def _kernel(
    # Arrays.
    q_ref,  # [B·S,H·W]
    k_ref,  # [B·S,K·W]
    v_ref,  # [B·S,K·W]
    segments_ref,  # [B,S] or None
    limits_ref,  # [B,S/R,3] or None
    o_ref,  # [B·S,H·W]
    largest_ref,  # [B·H,S]
    inverse_ref,  # [B·H,S]
    group,
    # Shared memory.
    q_own,  # [R,W]
    k_tiles,  # [stages,C,W]
    v_tiles,  # [stages,C,W]
    # Barriers.
    q_full,
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
        plgpu.barrier_wait(q_full)
        queries = q_own.at[mine]
        if width == 64:  # With more columns registers are short.
            queries = tile.rows_operand(queries, interpret)
        row = first_row + group * tile.HALF

        def over_columns(x, shape):
            return jax.lax.broadcast_in_dim(x, shape, (0,))

        def start_logits(t, logits):
            plgpu.barrier_wait(k_full.at[slot_of(t)])
            plgpu.wgmma(logits, queries, k_tiles.at[slot_of(t)].transpose((1, 0)))

        def scaled(largest):
            return jnp.maximum(largest * scale, LOWEST)

        def weigh(is_masked, t, logits, total, largest, norm):
            """Returns the weights of a tile as the left operand of a product, and the new sums."""

            def mask(x):
                seen = sees(segments_ref, b, row, block.locate(t) * columns, x.shape)
                return jnp.where(seen, x, -jnp.inf)

            logits = mask_where(is_masked, mask, logits)
            new = jnp.maximum(largest, jnp.max(logits, axis=1))
            weights = jnp.exp2(logits * scale - over_columns(scaled(new), logits.shape))
            decay = jnp.exp2(scaled(largest) - scaled(new))
            total[...] = total[...] * over_columns(decay, total.shape)
            if is_masked is not False:
                block.drop(total, t, group)
            norm = norm * decay + jnp.sum(weights, axis=1)
            return weights.astype(q_own.dtype), new, norm

        def add(t, weights, total):
            """Starts to add a tile to the total."""
            plgpu.barrier_wait(v_full.at[slot_of(t)])
            operand = tile.operand(weights, scratch)
            tile.add_product(total, operand, v_tiles.at[slot_of(t)], interpret)

        def run(f):
            return pl.run_scoped(f, plgpu.ACC((tile.HALF, columns), jnp.float32))

        def sum_tiles(total):
            def first(logits):
                with tile.turn(turns, group):
                    start_logits(0 * one, logits)
                found = logits[...]
                plgpu.barrier_arrive(k_free.at[0])
                largest, norm = (
                    plgpu.layout_cast(
                        jnp.full(tile.HALF, x, jnp.float32), plgpu.Layout.WGMMA.reduce(1)
                    )
                    for x in (LOWEST, 0.0)
                )
                return weigh(block.plain == 0, 0 * one, found, total, largest, norm)

            def visit(is_masked, t, carry):
                weights, *sums = carry

                def with_next(logits):
                    with tile.turn(turns, group):
                        start_logits(t + 1, logits)
                        add(t, weights, total)
                    found = logits[...]
                    plgpu.barrier_arrive(k_free.at[slot_of(t + 1)])
                    plgpu.barrier_arrive(v_free.at[slot_of(t)])
                    return weigh(is_masked, t + 1, found, total, *sums)

                return run(with_next)

            weights, *sums = visit_all(visit, block.plain, visits, run(first))
            with tile.turn(turns, group):
                add(visits - one, weights, total)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(v_free.at[slot_of(visits - one)])
            return total[...], *sums

        tile.begin_turns(turns, group)
        total, largest, norm = tile.with_total(sum_tiles, totals, group, width)
        tile.end_turns(turns, group)
        inverse = 1 / norm
        o = total * over_columns(inverse, total.shape)
        store_rows(o, q_own.at[mine], o_ref.at[place(row, tile.HALF, head)])
        rows = b * jax.lax.axis_size("axis0") + head, pl.ds(row, tile.HALF)
        tile.store(largest_ref.at[rows], largest)
        tile.store(inverse_ref.at[rows], inverse)

    @tile.as_group(group, computes=False, interpret=interpret)
    def _():
        plgpu.copy_gmem_to_smem(q_ref.at[place(first_row, tile.ROWS, head)], q_own, q_full)
        kv_head = jax.lax.div(head, group_size * one)

        def source(t):
            return place(block.locate(t) * columns, columns, kv_head)

        rings = (k_ref, k_tiles, k_full, k_free), (v_ref, v_tiles, v_full, v_free)
        tile.fill([tile.Ring(*ring, source) for ring in rings], visits)
