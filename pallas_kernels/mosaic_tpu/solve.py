"""The solve `y_i = A_ii⁻¹ (v_i − Σ_{j<i} A_ij y_j)`, one block of R rows a step.

The steps of one system run in order on one core. A step streams the keys and the solution of all
earlier rows from HBM, C rows at a time, and copies the next tile while it multiplies by the current
one. It then substitutes through its own rows, 128 at a time, and stores them to HBM, where later
steps read them.

**No race.** The store of a step's solution is still running when the next step begins. The next
step waits for it before it loads the first tile of those rows, which come last, or, if it loads
none of them, before it overwrites the buffer that is being stored. Both happen in one thread of
control, so the order does not depend on timing.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.call import pallas_call
from pallas_kernels.mosaic_tpu import tile
from pallas_kernels.mosaic_tpu.tile import BLOCK
from pallas_kernels.mosaic_tpu.tiles import Tiles, compiler_params
from pallas_kernels.scaling import entry_scale


def solve(
    k_hat: jax.Array,
    inverses: jax.Array,
    v: jax.Array,
    row_segments: jax.Array | None,
    column_segments: jax.Array | None,
    first: jax.Array,
    *,
    d: int,
    tiles: Tiles,
    interpret: tile.Interpret = False,
) -> jax.Array:
    """Returns `A⁻¹ v` of every system.

    Args:
      k_hat: `k̃ [M,S,W]`.
      inverses: `A_bb⁻¹ [M,S,128]`, float32.
      v: Right-hand sides `[M,S,W]`.
      row_segments: int32 `[B,S/R,1,R]`, or None.
      column_segments: int32 `[B,S/C,1,C]`, or None.
      first: int32 `[B,S/R]`, the first block of R rows that each block may depend on.
      d: D.
      tiles: Tile sizes.
      interpret: As in `pallas_call`.

    Returns:
      `y [M,S,W]` in the dtype of `k_hat`.
    """
    m, s, w = k_hat.shape
    r, c, dtype = tiles.rows, tiles.columns, k_hat.dtype
    heads, segmented = m // first.shape[0], row_segments is not None
    pairs, steps = m * s * s // 2, s // r
    return pallas_call(
        functools.partial(_kernel, heads=heads, scale=entry_scale(d)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(m, steps),
            in_specs=[
                tile.rows_spec(r, w),
                tile.rows_spec(r, BLOCK),
                tile.rows_spec(r, w),
                tile.segments_spec(r, heads) if segmented else None,
                pl.BlockSpec(memory_space=pltpu.HBM),
                pl.BlockSpec(memory_space=pltpu.HBM) if segmented else None,
            ],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[
                pltpu.VMEM((2, c, w), dtype),
                pltpu.VMEM((2, c, w), dtype),
                pltpu.VMEM((2, 1, c), jnp.int32) if segmented else None,
                pltpu.VMEM((r, w), jnp.float32),
                pltpu.VMEM((r, w), dtype),
                pltpu.SemaphoreType.DMA((3, 2)),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((m, s, w), dtype),
        compiler_params=compiler_params(
            "lucid_solve", tiles, k_hat.dtype, d, parallel=1, sequential=1, interpret=interpret
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * 2 * pairs * w,
            transcendentals=pairs,
            bytes_accessed=m * s * (steps * w + 3 * w) * dtype.itemsize + 4 * m * s * BLOCK,
        ),
        interpret=interpret,
        name="lucid_solve",
    )(first, k_hat, inverses, v, row_segments, k_hat, column_segments)


def _kernel(
    # Prefetched to SMEM.
    first_ref,  # [B,N]
    # Inputs.
    k_ref,  # [R,W]
    inverse_ref,  # [R,128] float32
    v_ref,  # [R,W]
    segments_ref,  # [1,R] or None
    k_hbm,  # [M,S,W]
    segments_hbm,  # [B,S/C,1,C] or None
    # Output.
    y_hbm,  # [M,S,W]
    # Scratch.
    k_tile,  # [2,C,W]
    y_tile,  # [2,C,W]
    segments_tile,  # [2,1,C] or None
    total_ref,  # [R,W] float32
    y_ref,  # [R,W]
    loaded,  # [3,2] semaphores
    stored,  # semaphore
    # Static.
    *,
    heads: int,
    scale: float,
):
    system, i, last = pl.program_id(0), pl.program_id(1), pl.num_programs(1) - 1
    batch, (r, _), c, dtype = system // heads, k_ref.shape, k_tile.shape[1], k_ref.dtype
    first = first_ref[batch, i]
    low, high = first * (r // c), i * (r // c)

    def store(i):
        return pltpu.make_async_copy(y_ref, y_hbm.at[system, pl.ds(i * r, r)], stored)

    def loads(t):
        rows = pl.ds(t * c, c)
        sources = [(k_hbm.at[system, rows], k_tile), (y_hbm.at[system, rows], y_tile)]
        if segments_hbm is not None:
            sources.append((segments_hbm.at[batch, t], segments_tile))
        return tile.copies(sources, (t - low) % 2, loaded)

    def load(t):
        @pl.when(t == high - r // c)
        def previous_rows():
            store(i - 1).wait()

        for copy in loads(t):
            copy.start()

    @pl.when(low < high)
    def first_tile():
        load(low)

    total_ref[...] = jnp.zeros_like(total_ref)
    segments = tile.Segments(segments_ref)

    @pl.loop(low, high)
    def visit(t):
        @pl.when(t + 1 < high)
        def next_tile():
            load(t + 1)

        for copy in loads(t):
            copy.wait()
        slot = (t - low) % 2
        column_ids = None if segments_tile is None else segments_tile[slot]
        a = tile.powers(k_ref[...], k_tile[slot], segments.column, column_ids)
        total_ref[...] += tile.dot(a.astype(dtype), y_tile[slot])

    @pl.when((i > 0) & (low >= high))
    def no_tile_loaded():
        store(i - 1).wait()

    for start in range(0, r, BLOCK):
        rows, before = slice(start, start + BLOCK), slice(0, start)
        total = total_ref[rows]
        if start:
            a = tile.powers(k_ref[rows], k_ref[before], *segments.pair(rows, before))
            total += tile.dot(a.astype(dtype), y_ref[before])
        rhs = v_ref[rows].astype(jnp.float32) - scale * total
        y_ref[rows] = tile.dot_split(inverse_ref[rows], rhs, dtype).astype(dtype)

    store(i).start()

    @pl.when(i == last)
    def flush():
        store(i).wait()
