"""The solve of `A y = rhs` by block substitution, and of the transposed system.

One program runs on each multiprocessor and takes blocks of rows in turns: all first blocks, then
all second ones. A block subtracts `A_ij y_j` of the blocks before, and multiplies what is left by
the inverse of its diagonal block, `y_i = A_ii⁻¹ (rhs_i − Σ A_ij y_j)`. The transposed system is the
same on the sequence read backwards.

No deadlock: all programs are resident, since one fits on a multiprocessor, as long as no other
kernel that waits runs beside this one. Of the blocks that are not solved, the first one waits for
solved blocks only, and its program is at it.

No race: both groups of a block signal its semaphore after their copy to `y` is complete, and the
copying group of another program waits for both before it reads these rows. Blocks of a sequence are
solved in order, so that one count for each sequence tells which are. Within a program, barriers
guard every buffer in shared memory.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import tile


@functools.partial(jax.jit, static_argnames=("shift", "programs", "reverse", "interpret"))
def solve(
    k_hat: jax.Array,
    rhs: jax.Array,
    inverses: jax.Array,
    *,
    shift: float,
    programs: int,
    reverse: bool = False,
    interpret: Any = None,
) -> jax.Array:
    """Returns `y [M,S,W]` in the dtype of the keys.

    Not under `vmap`, where all calls would share their semaphores: a mapped axis must be part of M.

    Args:
      k_hat: `k̃ [M,S,W]`, float16 or bfloat16; R divides S.
      rhs: The right-hand sides `[M,S,W]`, in the same dtype.
      inverses: `A_ii⁻¹ [M,S/R,2,R,R]` as the sum of two terms in the same dtype, the larger first.
      shift: `c`, so that `A_ij = 2^(k̃_i·k̃_j − c)`.
      programs: At most the number of multiprocessors of the device.
      reverse: Whether to solve `Aᵀ y = rhs`.
      interpret: The parameters of Pallas' interpreter, or None for a GPU.
    """
    (m, s, w), dtype = k_hat.shape, k_hat.dtype
    stages = 6 if w == 64 else 3
    body = functools.partial(
        _kernel, systems=m, length=s, programs=programs, stages=stages, shift=shift,
        reverse=reverse, interpret=interpret,
    )  # fmt: skip
    scratch = (
        tile.buffer(tile.ROWS, w, dtype=dtype),
        tile.buffer(tile.ROWS, w, dtype=dtype),
        tile.buffer(2, tile.ROWS, tile.ROWS, dtype=dtype),
        tile.buffer(stages, tile.COLUMNS, w, dtype=dtype),
        tile.buffer(stages, tile.COLUMNS, w, dtype=dtype),
        tile.barriers(1, 4),
        tile.barriers(1, tile.GROUPS),
        tile.barriers(1, tile.GROUPS),
        *(tile.barriers(stages),) * 2,
        *(tile.barriers(stages, tile.GROUPS),) * 2,
    )
    shape = jax.ShapeDtypeStruct((m * s, w), dtype)
    call = tile.run(body, shape, (programs,), scratch, interpret, "lucid_solve")
    y = call(k_hat.reshape(-1, w), rhs.reshape(-1, w), inverses.reshape(-1, tile.ROWS, tile.ROWS))
    return y.reshape(m, s, w)


def _kernel(
    # Arrays.
    k_ref,  # [M·S,W]
    rhs_ref,  # [M·S,W]
    inverse_ref,  # [M·S/R·2,R,R]
    y_ref,  # [M·S,W]
    group,
    # Shared memory.
    k_own,  # [R,W], the keys of the block, later the smaller term of what is left
    x_own,  # [R,W], the right-hand side, later the larger term and the solution
    inverse_own,  # [2,R,R]
    k_tiles,  # [stages,C,W]
    y_tiles,  # [stages,C,W]
    # Barriers.
    own_full,
    own_free,
    both,
    k_full,
    y_full,
    k_free,
    y_free,
    operands,  # [2,R/2,C] or None
    # Static.
    *,
    systems: int,
    length: int,
    programs: int,
    stages: int,
    shift: float,
    reverse: bool,
    interpret: Any,
):
    program, blocks, one = jax.lax.axis_index("axis0"), length // tile.ROWS, jnp.int32(1)
    # The interpreter has no semaphores, and runs one program after the other. On a GPU they are
    # zero before every call.
    solved = None if interpret else pl.get_global(plgpu.SemaphoreType.REGULAR((systems,)))
    count = jax.lax.div(systems * blocks - program + programs - 1, programs * one)

    def locate(n):
        """Returns the n-th block of this program: its place in the order, system and first row."""
        item = program + n * programs
        place, system = jax.lax.div(item, systems * one), jax.lax.rem(item, systems * one)
        at = blocks - 1 - place if reverse else place
        return place, system, at

    def meet():
        plgpu.barrier_arrive(both)
        plgpu.barrier_wait(both)

    @tile.as_group(group, computes=True, interpret=interpret)
    def _():
        mine = tile.rows_of(group)
        scratch = None if operands is None else operands.at[group]

        def solve_block(n, before):
            place, system, at = locate(n)
            plgpu.barrier_wait(own_full)

            def subtract(total):
                tiles = place * tile.TILES

                def buffer_of(t):
                    return jax.lax.rem(before + t, stages * one)

                def start(t, exponents):
                    slot = buffer_of(t)
                    plgpu.barrier_wait(k_full.at[slot])
                    plgpu.wgmma(exponents, k_own.at[mine], k_tiles.at[slot].transpose((1, 0)))

                def add(t, exponents):
                    slot = buffer_of(t)
                    a = jnp.exp2(exponents - shift).astype(k_own.dtype)
                    plgpu.barrier_wait(y_full.at[slot])
                    plgpu.wgmma(total, tile.operand(a, scratch), y_tiles.at[slot])

                def scores(f):
                    return pl.run_scoped(f, plgpu.ACC((tile.HALF, tile.COLUMNS), jnp.float32))

                @pl.when(tiles > 0)
                def _():
                    def first(exponents):
                        start(0, exponents)
                        found = exponents[...]
                        plgpu.barrier_arrive(k_free.at[buffer_of(0)])
                        return found

                    def visit(t, now):
                        def next_scores(exponents):
                            start(t + 1, exponents)
                            add(t, now)
                            found = exponents[...]
                            plgpu.barrier_arrive(k_free.at[buffer_of(t + 1)])
                            plgpu.barrier_arrive(y_free.at[buffer_of(t)])
                            return found

                        return scores(next_scores)

                    add(tiles - 1, jax.lax.fori_loop(0, tiles - 1, visit, scores(first)))
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(y_free.at[buffer_of(tiles - 1)])

                return total[...]

            update = pl.run_scoped(subtract, plgpu.ACC((tile.HALF, k_own.shape[1]), jnp.float32))
            # The type is that of jax 0.10, which these kernels do not take.
            load: Any = plgpu.load
            left = load(x_own.at[mine], layout=plgpu.Layout.WGMMA).astype(jnp.float32) - update
            high = left.astype(x_own.dtype)
            x_own[mine] = high
            k_own[mine] = (left - high.astype(jnp.float32)).astype(k_own.dtype)
            plgpu.commit_smem()
            meet()

            def multiply(total):
                for term, rows in ((1, x_own), (0, k_own), (0, x_own)):
                    inverse = inverse_own.at[term, mine]
                    if reverse:
                        inverse = inverse_own.at[term, :, mine].transpose((1, 0))
                    plgpu.wgmma(total, inverse, rows)
                return total[...]

            y = pl.run_scoped(multiply, plgpu.ACC((tile.HALF, k_own.shape[1]), jnp.float32))
            meet()
            x_own[mine] = y.astype(x_own.dtype)
            plgpu.commit_smem()
            rows = pl.ds(system * length + at * tile.ROWS + group * tile.HALF, tile.HALF)
            plgpu.copy_smem_to_gmem(x_own.at[mine], y_ref.at[rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=False)
            if solved is not None:
                plgpu.semaphore_signal(solved.at[system], memory_scope="gpu")
            plgpu.barrier_arrive(own_free)
            return before + place * tile.TILES

        jax.lax.fori_loop(0, count, solve_block, 0 * one)

    @tile.as_group(group, computes=False, interpret=interpret)
    def _():
        def load_block(n, before):
            place, system, at = locate(n)
            pl.when(n > 0)(lambda: plgpu.barrier_wait(own_free))
            rows = pl.ds(system * length + at * tile.ROWS, tile.ROWS)
            plgpu.copy_gmem_to_smem(k_ref.at[rows], k_own, own_full)
            plgpu.copy_gmem_to_smem(rhs_ref.at[rows], x_own, own_full)
            for term in range(2):
                inverse = inverse_ref.at[2 * (system * blocks + at) + term]
                plgpu.copy_gmem_to_smem(inverse, inverse_own.at[term], own_full)

            @pl.loop(0, place * tile.TILES)
            def _(t):
                slot = jax.lax.rem(before + t, stages * one)
                is_used = before + t >= stages
                column = length - (t + 1) * tile.COLUMNS if reverse else t * tile.COLUMNS
                columns = pl.ds(system * length + column, tile.COLUMNS)
                pl.when(is_used)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                plgpu.copy_gmem_to_smem(k_ref.at[columns], k_tiles.at[slot], k_full.at[slot])
                pl.when(is_used)(lambda: plgpu.barrier_wait(y_free.at[slot]))
                if solved is not None:
                    block, part = jax.lax.div(t, tile.TILES * one), jax.lax.rem(t, tile.TILES * one)
                    pl.when(part == 0)(
                        lambda: tile.wait_for(solved.at[system], tile.GROUPS * (block + 1))
                    )
                plgpu.copy_gmem_to_smem(y_ref.at[columns], y_tiles.at[slot], y_full.at[slot])

            return before + place * tile.TILES

        tiles = jax.lax.fori_loop(0, count, load_block, 0 * one)
        # A barrier must not end with a phase that nobody has waited for.
        pl.when(count > 0)(lambda: plgpu.barrier_wait(own_free))

        @pl.loop(0, jnp.minimum(tiles, stages))
        def _(slot):
            plgpu.barrier_wait(k_free.at[slot])
            plgpu.barrier_wait(y_free.at[slot])
