"""The solve of `A y = rhs` by block substitution, and of the transposed system.

One program runs on each multiprocessor and draws blocks of rows, one after the other. A block
subtracts `A_ij y_j` of the blocks before, and multiplies what is left by the inverse of its
diagonal block, `y_i = A_ii⁻¹ (rhs_i − Σ A_ij y_j)`. The transposed system is the same on the
sequence read backwards.

Packed documents are chains of blocks that do not wait for each other. A block that holds the end of
one document and the start of the next is two items of work: the rows of the document that enters
it, and the others, whose last document starts a chain. Each writes a plane of `y` of its own, so
that a chain reads plane 1 of its first block and plane 0 of the others. Items of all sequences are
ordered by depth, the place in their chain, so that chains advance together.

No deadlock: items are drawn in the order of a counter, and an item waits only for items that come
before it. So the first item that is not solved has been drawn by a program that runs, and waits for
nothing, however few programs run beside other kernels.

Float16. Products read a float16 copy of `y`, times a power of two for each item: `2^−e y`, where e
is large enough for the items of the chain so far. Exponents therefore never fall along a chain, and
depend on nothing after the item. A sum over columns is kept in units of the newest exponent. The
rows of what is left bound those of `y`: `|y_i| ≤ 2√R·max|left|`, because `‖A_ii⁻¹‖ ≤ 2`. Only rows
that later items read count, those of the document that leaves the block; in the copy the others are
zero. Float16 holds multiples of 2⁻²⁴, so that an entry is rounded by 2⁻¹² times itself, or by 2⁻³¹
times the largest entry of what was left so far.

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
      table: `[B,2N,8]`, in an order in which an item follows those that it waits for, and items
        without rows come last: the block; the first block of its chain; the first column that it
        needs; its first row in the block, and one past the last, in the order of the sequence; the
        same for the document that leaves the block; and whether entries between segments must be
        hidden.
      most: `[1]`, the number of items with rows, in the sequence that has most of them.
    """

    table: jax.Array
    most: jax.Array


@functools.partial(jax.jit, static_argnames=("scale", "shift", "programs", "reverse", "interpret"))
def solve(
    k_hat: jax.Array,
    rhs: jax.Array,
    inverses: jax.Array,
    segment_ids: jax.Array | None = None,
    items: Items | None = None,
    *,
    scale: float,
    shift: float,
    programs: int,
    reverse: bool = False,
    interpret: Any = None,
) -> jax.Array:
    """Returns `y [P,M,S,W]` in the dtype of `rhs`; P is 1, or 2 planes of packed sequences.

    Not under `vmap`, where all calls would share their semaphores: a mapped axis must be part of M.

    Args:
      k_hat: `k̃ [M,S,W]`, float16; R divides S.
      rhs: The right-hand sides `[M,S,W]`, float16 or bfloat16.
      inverses: `A_ii⁻¹ [M,S/R,2,2,C,W]`, float16, as `inverses` returns it.
      segment_ids: int32 `[B,S]`, M/B systems each, or None.
      items: The work, with `segment_ids`.
      scale: The factor from the entries of products, `2^(k̃_i·k̃_j − shift)`, to those of `A`.
      shift: Such that these fit float16, and most are normal numbers.
      programs: At most the number of multiprocessors of the device.
      reverse: Whether to solve `Aᵀ y = rhs`.
      interpret: The parameters of Pallas' interpreter, or None for a GPU.
    """
    (m, s, w), dtype = k_hat.shape, k_hat.dtype
    # Shared memory holds no more.
    columns, stages = tile.columns(w), {64: 6, 80: 4, 128: 5}[w]
    planes = 1 if items is None else 2
    body = functools.partial(
        _kernel, systems=m, length=s, programs=programs, columns=columns, stages=stages,
        scale=scale, shift=shift, reverse=reverse, interpret=interpret,
    )  # fmt: skip
    scratch = (
        tile.buffer(tile.ROWS, w, dtype=dtype),
        tile.buffer(tile.ROWS, w, dtype=dtype),
        tile.buffer(stages, columns, w, dtype=dtype),
        tile.buffer(stages, columns, w, dtype=dtype),
        plgpu.SMEM((_EXPONENTS + stages,), jnp.int32),
        plgpu.SMEM((2, tile.ROWS), jnp.int32),
        tile.barriers(1),
        tile.barriers(1),
        tile.barriers(1, tile.GROUPS),
        tile.barriers(1, tile.GROUPS),
        tile.barriers(tile.GROUPS),
        *(tile.barriers(stages),) * 2,
        *(tile.barriers(stages, tile.GROUPS),) * 2,
        tile.operands(columns, interpret),
        tile.totals(w, interpret),
    )
    shapes = (
        jax.ShapeDtypeStruct((planes * m * s, w), rhs.dtype),
        jax.ShapeDtypeStruct((planes * m * s, w), dtype),
        jax.ShapeDtypeStruct((planes * m * s // tile.ROWS,), jnp.int32),
    )
    call = tile.run(body, shapes, (programs,), scratch, interpret, "lucid_solve")
    y, _, _ = call(
        k_hat.reshape(-1, w), rhs.reshape(-1, w), inverses.reshape(-1, columns, w),
        segment_ids, *(items or (None, None)),
    )  # fmt: skip
    return y.reshape(planes, m, s, w)


def _kernel(
    # Arrays.
    k_ref,  # [M·S,W]
    rhs_ref,  # [M·S,W]
    inverse_ref,  # [M·S/R·4,C,W]
    segments_ref,  # [B,S] or None
    table_ref,  # [B,2N,8] or None
    most_ref,  # [1] or None
    y_ref,  # [P·M·S,W]
    copy_ref,  # [P·M·S,W]
    exponents_ref,  # [P·M·S/R]
    group,
    # Shared memory.
    k_own,  # [R,W], the keys of the block, later the smaller term of what is left
    x_own,  # [R,W], the larger term, later the copy of the solution
    k_tiles,  # [stages,C,W], keys of columns, at last halves of the larger term of the inverse
    y_tiles,  # [stages,C,W], their rows of the solution, and halves of the smaller term
    numbers,  # the number drawn last, the fields of the item, and the exponents of the tiles
    sizes,  # [2,R], of what is left, and of the rows of it that leave
    # Barriers.
    item_full,
    k_own_full,
    own_free,
    both,
    turns,
    k_full,
    y_full,
    k_free,
    y_free,
    operands,  # [2,R/2,C] or None
    totals,  # [2,R/2,W] or None
    # Static.
    *,
    systems: int,
    length: int,
    programs: int,
    columns: int,
    stages: int,
    scale: float,
    shift: float,
    reverse: bool,
    interpret: Any,
):
    blocks, one, by_rows = length // tile.ROWS, jnp.int32(1), columns == tile.HALF
    # The first semaphore counts the items that are drawn, the others the groups that solved items
    # of a chain. On a GPU they are zero before every call; the interpreter has none, and runs one
    # program.
    semaphores = plgpu.SemaphoreType.REGULAR((1 + systems * blocks,))
    solved = None if interpret else pl.get_global(semaphores)
    # Only packed sequences need all fields.
    fields = 2 if table_ref is None else len(_Item._fields)
    count = systems * (blocks * one if most_ref is None else most_ref[0])

    def locate(number):
        """Returns the item of a number."""
        place, system = jax.lax.div(number, systems * one), jax.lax.rem(number, systems * one)
        if table_ref is None:
            return _Item(system, place)
        b = jax.lax.div(system, systems // table_ref.shape[0] * one)
        position, *others = (table_ref[b, place, i] for i in range(8))
        return _Item(system, position, b, *others)

    def first_row(system, position, size):
        """Returns the row of a system at which a position of so many rows begins."""
        at = length - (position + 1) * size if reverse else position * size
        return system * length + at

    def tiles_of(item):
        """Returns the number of tiles of columns of an item, and the first one.

        Behind them come the two halves of the inverse.
        """
        first = jax.lax.div(item.first_column, columns * one)
        return item.position * (tile.ROWS // columns) - first, first

    def meet():
        plgpu.barrier_arrive(both)
        plgpu.barrier_wait(both)

    def plane(item, position):
        """Returns the plane of a block that this chain reads."""
        return 0 if item.begin is None else (position == item.chain).astype(jnp.int32)

    def exponent_of(item, position):
        return (plane(item, position) * systems + item.system) * blocks + position

    def chain(item):
        assert solved is not None
        return solved.at[1 + item.system * blocks + item.chain]

    # The type is that of jax 0.10, which these kernels do not take.
    load: Any = plgpu.load

    @tile.as_group(group, computes=True, interpret=interpret)
    def _():
        mine = tile.rows_of(group)
        scratch = None if operands is None else operands.at[group]

        def receive():
            """Returns the fields of the next item; the system is −1 after the last one."""
            plgpu.barrier_wait(item_full)
            return tuple(numbers[1 + i] for i in range(fields))

        def solve_item(item, before):
            tiles, first_tile = tiles_of(item)
            plgpu.barrier_wait(k_own_full)
            row = first_row(item.system, item.position, tile.ROWS)
            keys = tile.rows_operand(k_own.at[mine], interpret)

            def buffer_of(t):
                return jax.lax.rem(before + t, stages * one)

            def start(t, exponents):
                slot = buffer_of(t)
                plgpu.barrier_wait(k_full.at[slot])
                plgpu.wgmma(exponents, keys, k_tiles.at[slot].transpose((1, 0)))

            def hide(t, a):
                """Zeroes entries between segments."""
                base = item.system * length
                column = first_row(item.system, first_tile + t, columns) - base
                row_of_group = row - base + group * tile.HALF
                same = tile.same_segment(segments_ref, item.b, row_of_group, column, a.shape)
                return jnp.where(same, a, 0.0)

            def entries(t, exponents):
                """Returns the entries of a tile as the left operand of a product."""
                a = jnp.exp2(exponents - shift)
                if segments_ref is not None:
                    a = jax.lax.cond(item.is_mixed == 1, lambda x: hide(t, x), lambda x: x, a)
                return a.astype(k_own.dtype)

            def add(t, a, total, unit):
                """Starts to add a tile to the total, in units of `2^unit`; returns the new one."""
                slot = buffer_of(t)
                plgpu.barrier_wait(y_full.at[slot])
                e = numbers[_EXPONENTS + slot]

                @pl.when(e != unit)
                def _():
                    total[...] = total[...] * tile.power(unit - e)

                tile.add_product(total, tile.operand(a, scratch), y_tiles.at[slot], interpret)
                return e

            def scores(f):
                return pl.run_scoped(f, plgpu.ACC((tile.HALF, columns), jnp.float32))

            def sum_tiles(total, unit):
                """Sums all tiles; returns the unit."""

                def first(exponents):
                    with tile.turn(turns, group):
                        start(0, exponents)
                    found = exponents[...]
                    plgpu.barrier_arrive(k_free.at[buffer_of(0)])
                    return entries(0, found)

                def visit(t, carry):
                    def with_next(exponents):
                        with tile.turn(turns, group):
                            start(t + 1, exponents)
                            unit = add(t, carry[0], total, carry[1])
                        found = exponents[...]
                        plgpu.barrier_arrive(k_free.at[buffer_of(t + 1)])
                        plgpu.barrier_arrive(y_free.at[buffer_of(t)])
                        return entries(t + 1, found), unit

                    return scores(with_next)

                a, unit = jax.lax.fori_loop(0, tiles - 1, visit, (scores(first), unit))
                with tile.turn(turns, group):
                    unit = add(tiles - 1, a, total, unit)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(y_free.at[buffer_of(tiles - 1)])
                return unit

            def sum_all(total):
                none = jnp.int32(tile.SMALLEST_POWER)
                unit = jax.lax.cond(tiles > 0, lambda: sum_tiles(total, none), lambda: none)
                return total[...], unit

            total, unit = tile.with_total(sum_all, totals, group, k_own.shape[1])
            rows = pl.ds(row + group * tile.HALF, tile.HALF)
            rhs = load(rhs_ref.at[rows], layout=plgpu.Layout.WGMMA, optimized=False)
            left = rhs.astype(jnp.float32) - total * (scale * tile.power(unit))

            def keep(x, begin, end):
                """Zeroes other rows of the block."""
                if begin is None:
                    return x
                i = tile.iota(x.shape, 0) + group * tile.HALF
                return jnp.where((i >= begin) & (i < end), x, 0.0)

            left = keep(left, item.begin, item.end)
            leaving = keep(left, item.begin_leaving, item.end_leaving)
            parts = (left,) if item.begin is None else (left, leaving)
            for i, x in enumerate(parts):
                tile.store_sizes(x, sizes.at[i, mine])
            plgpu.commit_smem()
            meet()
            e_left, *others = (tile.load_exponent(sizes.at[i]) for i in range(len(parts)))
            e_leaving = others[0] if others else e_left
            # What is left goes up to 2¹⁵, and its two terms down to 2⁻²⁴.
            left = left * tile.power(15 - e_left)
            high = left.astype(x_own.dtype)
            x_own[mine] = high
            k_own[mine] = (left - high.astype(jnp.float32)).astype(k_own.dtype)
            plgpu.commit_smem()
            meet()
            halves = [buffer_of(tiles + i) for i in range(2)]
            for slot in halves:
                plgpu.barrier_wait(k_full.at[slot])
                plgpu.barrier_wait(y_full.at[slot])

            left_half = pl.ds(0, tile.HALF)

            def multiply(total):
                for terms, rows in ((y_tiles, x_own), (k_tiles, k_own), (k_tiles, x_own)):
                    if by_rows != reverse:
                        # One half has the rows of this group, or the columns if transposed.
                        inverse = terms.at[buffer_of(tiles + group)]
                        if reverse:
                            inverse = inverse.at[:, left_half].transpose((1, 0))
                        plgpu.wgmma(total, inverse, rows)
                        continue
                    for i, slot in enumerate(halves):
                        inverse = terms.at[slot, mine, left_half]
                        if reverse:
                            inverse = terms.at[slot, :, mine].transpose((1, 0))
                        plgpu.wgmma(total, inverse, rows.at[tile.rows_of(i)])
                return total[...]

            y = pl.run_scoped(multiply, plgpu.ACC((tile.HALF, k_own.shape[1]), jnp.float32))
            for slot in halves:
                plgpu.barrier_arrive(k_free.at[slot])
                plgpu.barrier_arrive(y_free.at[slot])
            if solved is not None:
                plgpu.barrier_arrive(own_free)
            meet()
            y = y * tile.power(e_left - 15)
            # 2√R is less than 2⁵; multiples of 4 change less often.
            e = jnp.maximum(unit, ((e_leaving + 5 - 15 + 3) >> 2) << 2)
            copy = keep(y * tile.power(-e), item.begin_leaving, item.end_leaving)
            x_own[mine] = copy.astype(x_own.dtype)
            plgpu.commit_smem()
            at = plane(item, item.position) * (systems * length) + row + group * tile.HALF
            plgpu.copy_smem_to_gmem(x_own.at[mine], copy_ref.at[pl.ds(at, tile.HALF)])
            exponents_ref[exponent_of(item, item.position)] = e
            plgpu.wait_smem_to_gmem(0, wait_read_only=False)
            if solved is not None:
                plgpu.semaphore_signal(chain(item), memory_scope="gpu")
            # No other program waits for this.
            tile.store(y_ref.at[pl.ds(at, tile.HALF)], y.astype(y_ref.dtype))
            if solved is None:
                # Without semaphores the next item begins when this one is complete.
                plgpu.barrier_arrive(own_free)

        def visit_item(carry):
            item, before = _Item(*carry[0]), carry[1]
            solve_item(item, before)
            return receive(), before + tiles_of(item)[0] + 2

        tile.begin_turns(turns, group)
        jax.lax.while_loop(lambda carry: carry[0][0] >= 0, visit_item, (receive(), 0 * one))
        tile.end_turns(turns, group)

    @tile.as_group(group, computes=False, interpret=interpret)
    def _():
        def draw(number):
            """Returns the number that comes next, or after `number` where one program runs."""
            if solved is None:
                return number + 1
            tile.draw(solved, numbers)
            return numbers[0]

        def send(item, is_first):
            """Gives an item to the groups that compute, once they have solved the one before."""
            pl.when(is_first == 0)(lambda: plgpu.barrier_wait(own_free))
            for i in range(fields):
                numbers[1 + i] = item[i]
            plgpu.barrier_arrive(item_full)

        def load_item(item, before):
            row = first_row(item.system, item.position, tile.ROWS)
            rows = pl.ds(row, tile.ROWS)
            plgpu.copy_gmem_to_smem(k_ref.at[rows], k_own, k_own_full)
            tiles, first_tile = tiles_of(item)

            def place_of(t):
                """Returns the buffer of a tile, whether it was used before, and the first row."""
                column = first_row(item.system, first_tile + t, columns)
                return jax.lax.rem(before + t, stages * one), before + t >= stages, column

            def wait_for_place(t, free):
                slot, is_used, column = place_of(t)
                pl.when(is_used)(lambda: plgpu.barrier_wait(free.at[slot]))
                return slot, column

            def load_keys(t):
                slot, column = wait_for_place(t, k_free)
                at = pl.ds(column, columns)
                plgpu.copy_gmem_to_smem(k_ref.at[at], k_tiles.at[slot], k_full.at[slot])

            pl.when(tiles > 0)(lambda: load_keys(0))

            # Blocks that other programs are likely to be at; those before are awaited at once.
            recent = item.position - (-(-programs // systems) + 1)

            def load_tile(t, e):
                # Keys of the next tile do not wait for the rows of this one.
                pl.when(t + 1 < tiles)(lambda: load_keys(t + 1))
                slot, column = wait_for_place(t, y_free)
                at, in_block = first_tile + t, tile.ROWS // columns * one
                block = jax.lax.div(at, in_block)
                is_new = (t == 0) | (jax.lax.rem(at, in_block) == 0)
                if solved is not None:
                    last = jnp.maximum(block, recent - 1)
                    pl.when((t == 0) | (is_new & (block >= recent)))(
                        lambda: tile.wait_for(chain(item), tile.GROUPS * (last - item.chain + 1))
                    )
                e = jax.lax.cond(is_new, lambda: exponents_ref[exponent_of(item, block)], lambda: e)
                numbers[_EXPONENTS + slot] = e
                at = pl.ds(plane(item, block) * (systems * length) + column, columns)
                plgpu.copy_gmem_to_smem(copy_ref.at[at], y_tiles.at[slot], y_full.at[slot])
                return e

            jax.lax.fori_loop(0 * one, tiles, load_tile, 0 * one)
            for i in range(2):
                for term, (to, full, free) in enumerate(
                    ((k_tiles, k_full, k_free), (y_tiles, y_full, y_free))
                ):
                    slot, _ = wait_for_place(tiles + i, free)
                    at = 4 * jax.lax.div(row, tile.ROWS * one) + 2 * term + i
                    plgpu.copy_gmem_to_smem(inverse_ref.at[at], to.at[slot], full.at[slot])

        def visit_number(carry):
            number, before, is_first = carry
            item = locate(number)
            has_rows = jnp.bool_(True) if item.begin is None else item.begin < item.end

            @pl.when(has_rows)
            def _():
                send(item, is_first)
                load_item(item, before)

            before = jax.lax.select(has_rows, before + tiles_of(item)[0] + 2, before)
            return draw(number), before, jax.lax.select(has_rows, 0 * one, is_first)

        tiles, is_first = jax.lax.while_loop(
            lambda carry: carry[0] < count, visit_number, (draw(-one), 0 * one, one)
        )[1:]
        send(locate(0 * one)._replace(system=-one), is_first)

        # A barrier must not end with a phase that nobody has waited for.
        @pl.loop(0, jnp.minimum(tiles, stages))
        def _(slot):
            plgpu.barrier_wait(k_free.at[slot])
            plgpu.barrier_wait(y_free.at[slot])


class _Item(NamedTuple):
    """An item of work of a system, of sequence b; the rest as in `Items`, whose defaults are those
    of sequences that are not packed.
    """

    system: Any
    position: Any
    b: Any = 0
    chain: Any = 0
    first_column: Any = 0
    begin: Any = None
    end: Any = None
    begin_leaving: Any = None
    end_leaving: Any = None
    is_mixed: Any = 0


# The place of the exponents of tiles in `numbers`.
_EXPONENTS = 1 + len(_Item._fields)
