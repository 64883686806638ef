"""The gradient of the keys, one block of rows a program; no program waits for another.

With the weights `w_ij = −A_ij v̄_i·y_j` below the diagonal, row i of the gradient of `k̂` is
`Σ_j (w_ij + w_ji) k̂_j / √D`. A tile of columns before the rows needs `v̄_i` and `y_j`, one behind
them `y_i` and `v̄_j`. The tiles of the diagonal are visited as both, under a mask.

The weights are float16, in units of a power of two for each row that makes none of them exceed 2¹⁵.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import tile


@functools.partial(jax.jit, static_argnames=("shift", "scale", "interpret"))
def key_gradient(
    k_hat: jax.Array,
    y: jax.Array,
    v_bar: jax.Array,
    units: jax.Array,
    segment_ids: jax.Array | None = None,
    limits: jax.Array | None = None,
    *,
    shift: float,
    scale: float,
    interpret: Any = None,
) -> jax.Array:
    """Returns `scale · Σ_j (w_ij + w_ji) k̃_j` with `w_ij = A_ij v̄_i·y_j`, float32 `[M,S,W]`.

    Args:
      k_hat: `k̃ [M,S,W]`, float16; R divides S.
      y: `[M,S,W]`, float16 or bfloat16.
      v_bar: `v̄ [M,S,W]` in the same dtype.
      units: float32 integers u `[M,S]`, such that no `|v̄_i·y_j|` and no `|y_i·v̄_j|` of a row i
        exceeds `2^(u_i + 15)`.
      segment_ids: int32 `[B,S]`, M/B systems each, or None.
      limits: With `segment_ids`, int32 `[B,S/R,3]`: the first column that shares a document with
        each block of rows, one past the last, and whether the block has rows of one segment alone
        and shares these columns with no other.
      shift: `c`, so that `A_ij = 2^(k̃_i·k̃_j − c)`.
      scale: A factor.
      interpret: The parameters of Pallas' interpreter, or None for a GPU.
    """
    (m, s, w), dtype = k_hat.shape, k_hat.dtype
    # Shared memory holds no more.
    columns, stages = {64: (128, 5), 80: (64, 6), 128: (64, 4)}[w]
    body = functools.partial(
        _kernel,
        systems=m,
        length=s,
        columns=columns,
        stages=stages,
        shift=shift,
        scale=scale,
        interpret=interpret,
    )
    scratch = (
        tile.buffer(tile.ROWS, w, dtype=dtype),
        tile.buffer(2, tile.ROWS, w, dtype=y.dtype),
        tile.buffer(stages, columns, w, dtype=dtype),
        tile.buffer(stages, columns, w, dtype=y.dtype),
        tile.barriers(1, 3),
        *(tile.barriers(stages),) * 2,
        *(tile.barriers(stages, tile.GROUPS),) * 2,
        tile.barriers(tile.GROUPS),
        tile.operands(columns, interpret),
    )
    shape = jax.ShapeDtypeStruct((m * s, w), jnp.float32)
    call = tile.run(body, shape, (s // tile.ROWS, m), scratch, interpret, "lucid_key_gradient")
    values = jnp.concatenate([y.reshape(-1, w), v_bar.reshape(-1, w)])
    arrays = k_hat.reshape(-1, w), values, units.reshape(-1), segment_ids, limits
    return call(*arrays).reshape(m, s, w)


def _kernel(
    # Arrays.
    k_ref,  # [M·S,W]
    values_ref,  # [2·M·S,W], y and v̄
    units_ref,  # [M·S]
    segments_ref,  # [B,S] or None
    limits_ref,  # [B,S/R,3] or None
    out_ref,  # [M·S,W]
    group,
    # Shared memory.
    k_own,  # [R,W]
    values_own,  # [2,R,W], v̄ and y
    k_tiles,  # [stages,C,W]
    value_tiles,  # [stages,C,W]
    # Barriers.
    own_full,
    k_full,
    values_full,
    k_free,
    values_free,
    turns,
    operands,  # [2,R/2,C] or None
    # Static.
    *,
    systems: int,
    length: int,
    columns: int,
    stages: int,
    shift: float,
    scale: float,
    interpret: Any,
):
    block, system, one = jax.lax.axis_index("axis0"), jax.lax.axis_index("axis1"), jnp.int32(1)
    first_row, tiles = system * length + block * tile.ROWS, tile.ROWS // columns
    b, first_column, end_column, is_uniform = 0 * one, 0 * one, length * one, one
    if limits_ref is not None:
        b = jax.lax.div(system, systems // limits_ref.shape[0] * one)
        first_column, end_column, is_uniform = (limits_ref[b, block, i] for i in range(3))
    # Visits below the diagonal come first; those above begin with the tiles of the diagonal again.
    first_tile = jax.lax.div(first_column, columns * one)
    below = (block + 1) * tiles - first_tile
    last_tile = jax.lax.div(end_column + columns - 1, columns * one)
    visits = below + last_tile - block * tiles

    def locate(t):
        """Returns whether a visit is above the diagonal, int32, and its first column."""
        is_above = (t >= below).astype(jnp.int32)
        return is_above, (first_tile + t - is_above * tiles) * columns

    @tile.as_group(group, computes=True, interpret=interpret)
    def _():
        mine = tile.rows_of(group)
        scratch = None if operands is None else operands.at[group]
        plgpu.barrier_wait(own_full)
        keys = k_own.at[mine]
        if columns == 64:  # With 128 registers are short, and shared memory is no limit.
            keys = tile.rows_operand(keys, interpret)
        rows = pl.ds(first_row + group * tile.HALF, tile.HALF)
        units = tile.load_vector(units_ref.at[rows], 0)

        def of_rows(x, shape):
            return jax.lax.broadcast_in_dim(x, shape, (0,))

        def start(t, exponents, products):
            """Starts the products of two rows of keys, and of two rows of values."""
            slot, (is_above, _) = jax.lax.rem(t, stages * one), locate(t)
            plgpu.barrier_wait(k_full.at[slot])
            plgpu.wgmma(exponents, keys, k_tiles.at[slot].transpose((1, 0)))
            plgpu.barrier_wait(values_full.at[slot])
            values = values_own.at[is_above, mine]
            plgpu.wgmma(products, values, value_tiles.at[slot].transpose((1, 0)))

        def weights(t, exponents, products):
            """Returns the weights of a tile as the left operand of a product."""
            is_above, column = locate(t)
            weights = jnp.exp2(exponents - of_rows(units + shift, exponents.shape)) * products

            def mask(weights):
                row = block * tile.ROWS + group * tile.HALF
                ahead = tile.iota(weights.shape, 0) - tile.iota(weights.shape, 1) + (row - column)
                keep = ahead * (1 - 2 * is_above) > 0
                if segments_ref is not None:
                    keep &= tile.same_segment(segments_ref, b, row, column, keep.shape)
                return jnp.where(keep, weights, 0.0)

            is_cut = (t >= below - tiles) & (t < below + tiles)
            if limits_ref is not None:
                is_cut |= (
                    (is_uniform == 0) | (column < first_column) | (column + columns > end_column)
                )
            return jax.lax.cond(is_cut, mask, lambda x: x, weights).astype(k_own.dtype)

        def scores(f):
            accumulator = plgpu.ACC((tile.HALF, columns), jnp.float32)
            return pl.run_scoped(f, accumulator, accumulator)

        def sum_visits(total):
            def first(*accumulators):
                with tile.turn(turns, group):
                    start(0 * one, *accumulators)
                found = [x[...] for x in accumulators]
                plgpu.barrier_arrive(values_free.at[0])
                return weights(0 * one, *found)

            def add(t, weights):
                """Starts to add a tile to the total."""
                slot = jax.lax.rem(t, stages * one)
                plgpu.wgmma(total, tile.operand(weights, scratch), k_tiles.at[slot])

            def visit(t, now):
                def with_next(*accumulators):
                    with tile.turn(turns, group):
                        start(t + 1, *accumulators)
                        add(t, now)
                    found = [x[...] for x in accumulators]
                    plgpu.barrier_arrive(values_free.at[jax.lax.rem(t + 1, stages * one)])
                    plgpu.barrier_arrive(k_free.at[jax.lax.rem(t, stages * one)])
                    return weights(t + 1, *found)

                return scores(with_next)

            last = jax.lax.fori_loop(0 * one, visits - one, visit, scores(first))
            with tile.turn(turns, group):
                add(visits - one, last)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(k_free.at[jax.lax.rem(visits - one, stages * one)])
            return total[...]

        tile.begin_turns(turns, group)
        total = pl.run_scoped(sum_visits, plgpu.ACC((tile.HALF, k_own.shape[1]), jnp.float32))
        tile.end_turns(turns, group)
        tile.store(out_ref.at[rows], total * of_rows(jnp.exp2(units) * scale, total.shape))

    @tile.as_group(group, computes=False, interpret=interpret)
    def _():
        plgpu.copy_gmem_to_smem(k_ref.at[pl.ds(first_row, tile.ROWS)], k_own, own_full)
        for is_y in range(2):
            rows = pl.ds((1 - is_y) * systems * length + first_row, tile.ROWS)
            plgpu.copy_gmem_to_smem(values_ref.at[rows], values_own.at[is_y], own_full)

        def keys_of(t):
            return pl.ds(system * length + locate(t)[1], columns)

        def values_of(t):
            is_above, column = locate(t)
            return pl.ds((is_above * systems + system) * length + column, columns)

        rings = (
            tile.Ring(k_ref, k_tiles, k_full, k_free, keys_of),
            tile.Ring(values_ref, value_tiles, values_full, values_free, values_of),
        )
        tile.fill(rings, visits)
