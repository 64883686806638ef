"""The transposed solve and the key gradient, in one sweep from the last rows to the first.

`A` is symmetric off its diagonal, so `v̄_i = A_ii⁻ᵀ (ȳ_i − Σ_{j>i} A_ij v̄_j)` reads the same tiles
as the solve, backwards. Each tile also serves the key gradient: `W_ij = A_ij (y_i·v̄_j)` for
`j > i` is known, because `v̄_j` is final, and

    k̂̄_i −= Σ_{j>i} W_ij k̂_j / √D        k̂̄_j −= W_ijᵀ k̂_i / √D.

**Cost.** This takes five products and one exponential a tile. A transposed solve followed by a key
gradient parallel in rows takes eight and three: two and one for the solve, then three and one a
tile, twice, because each pair is met from both sides. In exchange, the float32 sums of all later
rows pass through the core once a step: at R = 512 and W = 128 they move 1 KiB for 0.66 MFLOP.

**No race.** As in `solve`, a step waits for the stores of the previous step before it loads the
first tile of the rows they write, or overwrites the buffers they read. The sums of a tile are
updated in one of three buffers in turn. The store from a buffer is awaited before the buffer is
loaded again, three tiles later. All stores of sums are awaited at the end of the step, so that the
next step reads what this one wrote.
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
from pallas_kernels.scaling import entry_scale, key_gradient_scale

_SUMS = 3  # Buffers of sums: one is loaded, one updated, one stored.


def solve_transposed(
    k_hat: jax.Array,
    inverses: jax.Array,
    y: jax.Array,
    y_bar: jax.Array,
    row_segments: jax.Array | None,
    column_segments: jax.Array | None,
    end: jax.Array,
    *,
    d: int,
    tiles: Tiles,
    interpret: tile.Interpret = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns `v̄ = A⁻ᵀ ȳ` of every system, and the gradient of its normalised keys.

    Args:
      k_hat: `k̃ [M,S,W]`.
      inverses: `A_bb⁻ᵀ [M,S,128]`, float32.
      y: The solution `[M,S,W]`.
      y_bar: The cotangent of `y` `[M,S,W]`.
      row_segments: int32 `[B,S/R,1,R]`, or None.
      column_segments: int32 `[B,S/C,1,C]`, or None.
      end: int32 `[B,S/R]`, one past the last block of R rows that may depend on each block.
      d: D.
      tiles: Tile sizes.
      interpret: As in `pallas_call`.

    Returns:
      `v̄ [M,S,W]` in the dtype of `k_hat`, and `k̂̄ [M,S,W]` in float32.
    """
    m, s, w = k_hat.shape
    r, c, dtype = tiles.rows, tiles.columns, k_hat.dtype
    heads, segmented = m // end.shape[0], row_segments is not None
    pairs, steps = m * s * s // 2, s // r
    row = lambda width: tile.rows_spec(r, width, reverse=steps)  # noqa: E731
    v_bar, total = pallas_call(
        functools.partial(_kernel, heads=heads, scale=entry_scale(d)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(m, steps),
            in_specs=[
                row(w),
                row(BLOCK),
                row(w),
                row(w),
                tile.segments_spec(r, heads, reverse=steps) if segmented else None,
                pl.BlockSpec(memory_space=pltpu.HBM),
                pl.BlockSpec(memory_space=pltpu.HBM) if segmented else None,
            ],
            out_specs=[pl.BlockSpec(memory_space=pltpu.HBM)] * 2,
            scratch_shapes=[
                pltpu.VMEM((2, c, w), dtype),
                pltpu.VMEM((2, c, w), dtype),
                pltpu.VMEM((2, 1, c), jnp.int32) if segmented else None,
                pltpu.VMEM((_SUMS, c, w), jnp.float32),
                pltpu.VMEM((r, w), jnp.float32),
                pltpu.VMEM((r, w), jnp.float32),
                pltpu.VMEM((r, w), dtype),
                pltpu.VMEM((r, w), jnp.float32),
                pltpu.SemaphoreType.DMA((3, 2)),
                pltpu.SemaphoreType.DMA((_SUMS,)),
                pltpu.SemaphoreType.DMA((_SUMS,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=(
            jax.ShapeDtypeStruct((m, s, w), dtype),
            jax.ShapeDtypeStruct((m, s, w), jnp.float32),
        ),
        compiler_params=compiler_params(
            "lucid_solve_transposed",
            tiles,
            k_hat.dtype,
            d,
            parallel=1,
            sequential=1,
            interpret=interpret,
        ),
        cost_estimate=pl.CostEstimate(
            flops=5 * 2 * pairs * w,
            transcendentals=pairs,
            bytes_accessed=m * s * w * (steps * (dtype.itemsize + 4) + 4 * dtype.itemsize + 4)
            + 4 * m * s * BLOCK,
        ),
        interpret=interpret,
        name="lucid_solve_transposed",
    )(end, k_hat, inverses, y, y_bar, row_segments, k_hat, column_segments)
    return v_bar, total * key_gradient_scale(d)


def _kernel(
    # Prefetched to SMEM.
    end_ref,  # [B,N]
    # Inputs.
    k_ref,  # [R,W]
    inverse_ref,  # [R,128] float32, transposed
    y_ref,  # [R,W]
    y_bar_ref,  # [R,W]
    segments_ref,  # [1,R] or None
    k_hbm,  # [M,S,W]
    segments_hbm,  # [B,S/C,1,C] or None
    # Outputs.
    v_bar_hbm,  # [M,S,W]
    k_bar_hbm,  # [M,S,W] float32
    # Scratch.
    k_tile,  # [2,C,W]
    v_bar_tile,  # [2,C,W]
    segments_tile,  # [2,1,C] or None
    k_bar_tile,  # [3,C,W] float32
    v_total_ref,  # [R,W] float32
    k_total_ref,  # [R,W] float32
    v_bar_ref,  # [R,W]
    k_bar_ref,  # [R,W] float32
    loaded,  # [3,2] semaphores
    sums_loaded,  # [3] semaphores
    sums_stored,  # [3] semaphores
    stored,  # [2] semaphores
    # Static.
    *,
    heads: int,
    scale: float,
):
    system, i = pl.program_id(0), pl.num_programs(1) - 1 - pl.program_id(1)
    last = pl.num_programs(1) - 1
    batch, (r, _), c, dtype = system // heads, k_ref.shape, k_tile.shape[1], k_ref.dtype
    # Tiles are counted backwards: tile x starts at row (top − 1 − x)·C.
    top = end_ref[batch, i] * (r // c)
    count = top - (i + 1) * (r // c)

    def stores(i):
        rows = pl.ds(i * r, r)
        return [
            pltpu.make_async_copy(v_bar_ref, v_bar_hbm.at[system, rows], stored.at[0]),
            pltpu.make_async_copy(k_bar_ref, k_bar_hbm.at[system, rows], stored.at[1]),
        ]

    def wait_for_stores(i):
        for copy in stores(i):
            copy.wait()

    def sums_at(x):
        return k_bar_hbm.at[system, pl.ds((top - 1 - x) * c, c)]

    def store_sums(x):
        slot = x % _SUMS
        return pltpu.make_async_copy(k_bar_tile.at[slot], sums_at(x), sums_stored.at[slot])

    def loads(x):
        t, slot = top - 1 - x, x % _SUMS
        rows = pl.ds(t * c, c)
        sources = [(k_hbm.at[system, rows], k_tile), (v_bar_hbm.at[system, rows], v_bar_tile)]
        if segments_hbm is not None:
            sources.append((segments_hbm.at[batch, t], segments_tile))
        sums = pltpu.make_async_copy(sums_at(x), k_bar_tile.at[slot], sums_loaded.at[slot])
        return [*tile.copies(sources, x % 2, loaded), sums]

    def load(x):
        @pl.when(x == count - r // c)
        def previous_rows():
            wait_for_stores(i + 1)

        @pl.when(x >= _SUMS)
        def buffer_free():
            store_sums(x - _SUMS).wait()

        for copy in loads(x):
            copy.start()

    @pl.when(count > 0)
    def first_tile():
        load(0)

    v_total_ref[...] = jnp.zeros_like(v_total_ref)
    k_total_ref[...] = jnp.zeros_like(k_total_ref)
    segments = tile.Segments(segments_ref)

    @pl.loop(0, count)
    def visit(x):
        @pl.when(x + 1 < count)
        def next_tile():
            load(x + 1)

        for copy in loads(x):
            copy.wait()
        slot = x % 2
        column_ids = None if segments_tile is None else segments_tile[slot]
        k_i, k_j, v_bar_j = k_ref[...], k_tile[slot], v_bar_tile[slot]
        a = tile.powers(k_i, k_j, segments.column, column_ids)
        v_total_ref[...] += tile.dot(a.astype(dtype), v_bar_j)
        weight = (a * tile.dot(y_ref[...], v_bar_j, (1, 1))).astype(dtype)
        k_total_ref[...] += tile.dot(weight, k_j)
        k_bar_tile[x % _SUMS] += tile.dot(weight, k_i, (0, 0))
        store_sums(x).start()

    @pl.when((i < last) & (count <= 0))
    def no_tile_loaded():
        wait_for_stores(i + 1)

    for start in reversed(range(0, r, BLOCK)):
        rows, after, onward = slice(start, start + BLOCK), slice(start + BLOCK, r), slice(start, r)
        k_i = k_ref[rows]
        a = tile.powers(k_i, k_ref[onward], *segments.pair(rows, onward))
        total = v_total_ref[rows]
        if after.start < r:
            total += tile.dot(a[:, BLOCK:].astype(dtype), v_bar_ref[after])
        rhs = y_bar_ref[rows].astype(jnp.float32) - scale * total
        v_bar_ref[rows] = tile.dot_split(inverse_ref[rows], rhs, dtype).astype(dtype)

        weight = a * tile.dot(y_ref[rows], v_bar_ref[onward], (1, 1))
        row = jax.lax.broadcasted_iota(jnp.int32, weight.shape, 0)
        column = jax.lax.broadcasted_iota(jnp.int32, weight.shape, 1)
        weight = jnp.where(column > row, weight, 0).astype(dtype)
        k_total_ref[rows] += tile.dot(weight, k_ref[onward])
        k_total_ref[onward] += tile.dot(weight, k_i, (0, 0))
    k_bar_ref[...] = k_total_ref[...]

    for copy in stores(i):
        copy.start()

    for back in range(1, _SUMS + 1):

        @pl.when(count >= back)
        def sums_stored_back(back=back):
            store_sums(count - back).wait()

    @pl.when(i == 0)
    def flush():
        wait_for_stores(i)
