"""The solve of `A y = rhs` by block substitution, and of the transposed system.

One program runs on each multiprocessor and takes blocks of rows in turns. A block subtracts
`A_ij y_j` of the blocks before, and multiplies what is left by the inverse of its diagonal block,
`y_i = A_ii⁻¹ (rhs_i − Σ A_ij y_j)`. The transposed system is the same on the sequence read
backwards.

Packed documents are chains of blocks that do not wait for each other. A block that holds the end of
one document and the start of the next is two items of work: the rows of the document that enters
it, and the others, whose last document starts a chain. Each writes a plane of `y` of its own, so
that a chain reads plane 1 of its first block and plane 0 of the others. Items of all sequences are
ordered by depth, the place in their chain, so that chains advance together.

No deadlock: all programs are resident, since one fits on a multiprocessor, as long as no other
kernel that waits runs beside this one. Of the items that are not solved, the first one in the order
waits for solved items only, and its program is at it.

No race: both groups signal the semaphore of their chain after their copy to `y` is complete, and
the copying group of another program waits for both before it reads these rows. The items of a chain
are solved in order, so that one count for each chain tells which are. Within a program, barriers
guard every buffer in shared memory.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import tile


class Items(NamedTuple):
    """The work on packed sequences, int32. Blocks and tiles are counted in the order of the solve.

    Attributes:
      table: `[B,2N,6]`, in an order in which an item follows those that it waits for, and items
        without rows come last: the block; the first block of its chain; the first tile of columns
        that it takes; its first row in the block, and one past the last, in the order of the
        sequence; and whether entries between segments must be hidden in these tiles.
      most: `[1]`, the number of items with rows, in the sequence that has most of them.
    """

    table: jax.Array
    most: jax.Array


@functools.partial(jax.jit, static_argnames=("shift", "programs", "reverse", "interpret"))
def solve(
    k_hat: jax.Array,
    rhs: jax.Array,
    inverses: jax.Array,
    segment_ids: jax.Array | None = None,
    items: Items | None = None,
    *,
    shift: float,
    programs: int,
    reverse: bool = False,
    interpret: Any = None,
) -> jax.Array:
    """Returns `y [P,M,S,W]` in the dtype of the keys; P is 1, or 2 planes of packed sequences.

    Not under `vmap`, where all calls would share their semaphores: a mapped axis must be part of M.

    Args:
      k_hat: `k̃ [M,S,W]`, float16 or bfloat16; R divides S.
      rhs: The right-hand sides `[M,S,W]`, in the same dtype.
      inverses: `A_ii⁻¹ [M,S/R,2,R,R]` as the sum of two terms in the same dtype, the larger first.
      segment_ids: int32 `[B,S]`, M/B systems each, or None.
      items: The work, with `segment_ids`.
      shift: `c`, so that `A_ij = 2^(k̃_i·k̃_j − c)`.
      programs: At most the number of multiprocessors of the device.
      reverse: Whether to solve `Aᵀ y = rhs`.
      interpret: The parameters of Pallas' interpreter, or None for a GPU.
    """
    (m, s, w), dtype = k_hat.shape, k_hat.dtype
    stages, packed = 6 if w == 64 else 3, items is not None
    body = functools.partial(
        _packed if packed else _kernel, systems=m, length=s, programs=programs, stages=stages,
        shift=shift, reverse=reverse, interpret=interpret,
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
    planes = 2 if packed else 1
    shape = jax.ShapeDtypeStruct((planes * m * s, w), dtype)
    call = tile.run(body, shape, (programs,), scratch, interpret, "lucid_solve")
    arrays = [k_hat.reshape(-1, w), rhs.reshape(-1, w), inverses.reshape(-1, tile.ROWS, tile.ROWS)]
    if items is not None:
        arrays += [segment_ids, *items]
    return call(*arrays).reshape(planes, m, s, w)


def _packed(k_ref, rhs_ref, inverse_ref, segments_ref, table_ref, most_ref, *rest, **static):
    _kernel(
        k_ref, rhs_ref, inverse_ref, *rest, segments_ref=segments_ref, table_ref=table_ref,
        most_ref=most_ref, **static,
    )  # fmt: skip


def _kernel(
    # Arrays.
    k_ref,  # [M·S,W]
    rhs_ref,  # [M·S,W]
    inverse_ref,  # [M·S/R·2,R,R]
    y_ref,  # [P·M·S,W]
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
    # Arrays of packed sequences.
    segments_ref=None,  # [B,S]
    table_ref=None,  # [B,2N,6]
    most_ref=None,  # [1]
):
    program, blocks, one = jax.lax.axis_index("axis0"), length // tile.ROWS, jnp.int32(1)
    # The interpreter has no semaphores, and runs one program after the other. On a GPU they are
    # zero before every call.
    semaphores = plgpu.SemaphoreType.REGULAR((systems * blocks,))
    solved = None if interpret else pl.get_global(semaphores)
    places = blocks * one if most_ref is None else most_ref[0]
    count = jax.lax.div(systems * places - program + programs - 1, programs * one)

    def locate(n):
        """Returns the n-th item of this program."""
        item = program + n * programs
        place, system = jax.lax.div(item, systems * one), jax.lax.rem(item, systems * one)
        if table_ref is None:
            return _Item(system, 0 * one, place, 0 * one, 0 * one, None, None, 0 * one)
        b = jax.lax.div(system, systems // table_ref.shape[0] * one)
        return _Item(system, b, *(table_ref[b, place, i] for i in range(6)))

    def first_row(system, position, size):
        """Returns the row of a system at which a position of so many rows begins."""
        at = length - (position + 1) * size if reverse else position * size
        return system * length + at

    def meet():
        plgpu.barrier_arrive(both)
        plgpu.barrier_wait(both)

    def for_items(run):
        """Runs `run(item, tiles before it, whether it is the first)`; returns the last two."""

        def visit(n, carry):
            before, is_first = carry
            item = locate(n)
            tiles = item.position * tile.TILES - item.first_tile
            if item.begin is None:
                run(item, before, is_first)
                return before + tiles, 0 * one
            has_rows = item.begin < item.end
            pl.when(has_rows)(lambda: run(item, before, is_first))
            return jax.lax.select(has_rows, before + tiles, before), jax.lax.select(
                has_rows, 0 * one, is_first
            )

        return jax.lax.fori_loop(0, count, visit, (0 * one, one))

    def plane(item, position):
        """Returns the row at which the plane of a block begins that this chain reads."""
        if item.begin is None:
            return 0
        return (position == item.chain).astype(jnp.int32) * (systems * length)

    def chain(item):
        return solved.at[item.system * blocks + item.chain]

    @tile.as_group(group, computes=True, interpret=interpret)
    def _():
        mine = tile.rows_of(group)
        scratch = None if operands is None else operands.at[group]

        def solve_item(item, before, _):
            tiles = item.position * tile.TILES - item.first_tile
            plgpu.barrier_wait(own_full)
            row = first_row(item.system, item.position, tile.ROWS)

            def buffer_of(t):
                return jax.lax.rem(before + t, stages * one)

            def start(t, exponents):
                slot = buffer_of(t)
                plgpu.barrier_wait(k_full.at[slot])
                plgpu.wgmma(exponents, k_own.at[mine], k_tiles.at[slot].transpose((1, 0)))

            def hide(t, a):
                """Zeroes entries between segments."""
                base = item.system * length
                column = first_row(item.system, item.first_tile + t, tile.COLUMNS) - base
                row_of_group = row - base + group * tile.HALF
                same = tile.same_segment(segments_ref, item.b, row_of_group, column, a.shape)
                return jnp.where(same, a, 0.0)

            def add(t, exponents, total):
                slot = buffer_of(t)
                a = jnp.exp2(exponents - shift)
                if segments_ref is not None:
                    # Rows before the chain, of other documents, are in its first tile alone.
                    is_cut = (item.is_mixed == 1) | (t == 0)
                    a = jax.lax.cond(is_cut, lambda x: hide(t, x), lambda x: x, a)
                plgpu.barrier_wait(y_full.at[slot])
                plgpu.wgmma(total, tile.operand(a.astype(k_own.dtype), scratch), y_tiles.at[slot])

            def scores(f):
                return pl.run_scoped(f, plgpu.ACC((tile.HALF, tile.COLUMNS), jnp.float32))

            def subtract(total):
                @pl.when(tiles > 0)
                def _():
                    def first(exponents):
                        start(0, exponents)
                        found = exponents[...]
                        plgpu.barrier_arrive(k_free.at[buffer_of(0)])
                        return found

                    def visit(t, now):
                        def with_next(exponents):
                            start(t + 1, exponents)
                            add(t, now, total)
                            found = exponents[...]
                            plgpu.barrier_arrive(k_free.at[buffer_of(t + 1)])
                            plgpu.barrier_arrive(y_free.at[buffer_of(t)])
                            return found

                        return scores(with_next)

                    add(tiles - 1, jax.lax.fori_loop(0, tiles - 1, visit, scores(first)), total)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(y_free.at[buffer_of(tiles - 1)])

                return total[...]

            update = pl.run_scoped(subtract, plgpu.ACC((tile.HALF, k_own.shape[1]), jnp.float32))
            # The type is that of jax 0.10, which these kernels do not take.
            load: Any = plgpu.load
            left = load(x_own.at[mine], layout=plgpu.Layout.WGMMA).astype(jnp.float32) - update
            if item.begin is not None:
                i = plgpu.broadcasted_iota(jnp.int32, left.shape, 0, layout=plgpu.Layout.WGMMA)
                i = i + group * tile.HALF
                left = jnp.where((i >= item.begin) & (i < item.end), left, 0.0)
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
            rows = pl.ds(plane(item, item.position) + row + group * tile.HALF, tile.HALF)
            plgpu.copy_smem_to_gmem(x_own.at[mine], y_ref.at[rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=False)
            if solved is not None:
                plgpu.semaphore_signal(chain(item), memory_scope="gpu")
            plgpu.barrier_arrive(own_free)

        for_items(solve_item)

    @tile.as_group(group, computes=False, interpret=interpret)
    def _():
        def load_item(item, before, is_first):
            pl.when(is_first == 0)(lambda: plgpu.barrier_wait(own_free))
            row = first_row(item.system, item.position, tile.ROWS)
            rows = pl.ds(row, tile.ROWS)
            plgpu.copy_gmem_to_smem(k_ref.at[rows], k_own, own_full)
            plgpu.copy_gmem_to_smem(rhs_ref.at[rows], x_own, own_full)
            for term in range(2):
                inverse = inverse_ref.at[2 * jax.lax.div(row, tile.ROWS * one) + term]
                plgpu.copy_gmem_to_smem(inverse, inverse_own.at[term], own_full)

            @pl.loop(0, item.position * tile.TILES - item.first_tile)
            def _(t):
                slot = jax.lax.rem(before + t, stages * one)
                is_used = before + t >= stages
                at = item.first_tile + t
                column = first_row(item.system, at, tile.COLUMNS)
                columns = pl.ds(column, tile.COLUMNS)
                pl.when(is_used)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                plgpu.copy_gmem_to_smem(k_ref.at[columns], k_tiles.at[slot], k_full.at[slot])
                pl.when(is_used)(lambda: plgpu.barrier_wait(y_free.at[slot]))
                block, part = jax.lax.div(at, tile.TILES * one), jax.lax.rem(at, tile.TILES * one)
                if solved is not None:
                    pl.when((part == 0) | (t == 0))(
                        lambda: tile.wait_for(chain(item), tile.GROUPS * (block - item.chain + 1))
                    )
                columns = pl.ds(plane(item, block) + column, tile.COLUMNS)
                plgpu.copy_gmem_to_smem(y_ref.at[columns], y_tiles.at[slot], y_full.at[slot])

        tiles, is_first = for_items(load_item)
        # A barrier must not end with a phase that nobody has waited for.
        pl.when(is_first == 0)(lambda: plgpu.barrier_wait(own_free))

        @pl.loop(0, jnp.minimum(tiles, stages))
        def _(slot):
            plgpu.barrier_wait(k_free.at[slot])
            plgpu.barrier_wait(y_free.at[slot])


class _Item(NamedTuple):
    """An item of work of a system, of sequence b; the rest as in `Items`."""

    system: Any
    b: Any
    position: Any
    chain: Any
    first_tile: Any
    begin: Any
    end: Any
    is_mixed: Any
