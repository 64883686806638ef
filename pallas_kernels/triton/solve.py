"""The solve `A y = v`, or its transpose, as a dataflow of blocks.

One program solves one block of rows of one head, `y_i = A_ii⁻¹ (v_i − Σ_{j<i} A_ij y_j)`. It adds
up the products with the blocks that are finished in a plain pipelined loop, waits for more blocks,
and repeats. The transposed system is the same substitution with the blocks counted from the end,
because `A` is symmetric off its diagonal.

**Documents.** The blocks of a document form a chain, and the chains of a packed sequence do not
wait for each other. A block that holds the end of one document and the start of the next belongs
to both chains, so it is two items of work: the rows of the document that enters it, and the other
rows, which depend on no earlier block and start a chain. A program does one item. The items are
ordered by depth, the number of blocks since the start of the document, so that all chains advance
together; in the order of positions, programs that wait for the first chain would fill the device.
Rows of other documents are never loaded as rows of `y` and count as zero on the right-hand side, so
a NaN cannot pass through a block from one document to another.

**No deadlock.** Programs draw tickets from a counter. Consecutive tickets take the heads of a
group at one place of the order, then at the next place, then the next group. A program waits only
for items of less depth of its own head. Their tickets were drawn earlier, by programs that are
therefore running, and the program with the earliest unfinished ticket waits for none. This holds
for any schedule and any number of resident programs. With few heads in a group, the keys and `y`
that running programs read stay in the cache; with many, programs have more to do while they wait.

**No race.** `progress[head, first]` is the state of the chain that starts in block `first`; a block
starts at most one chain that leaves it. Its upper 24 bits count the finished positions of the
chain, its low 8 bits hold the exponent of the newest one (see Float16). Only the program at
position p raises the count from p to p + 1, after it has seen it at p, and the exponent changes in
the same atomic operation; the program that starts the chain raises the count from zero. Each count
therefore comes with one exponent, and the state is monotone, because the count is in the upper
bits: a maximum with an earlier state only reads it. All threads of that program store their rows of
what products read (`y`, or its float16 copy and the exponent of the block) and meet at a barrier;
then one thread performs an atomic maximum with acquire-release order at the scope of the device. A
reader's atomic read has the same order and is followed by a barrier before its threads load. Stores
before the maximum therefore happen before loads after the read, and every row and every exponent is
written once and read only after that. Neither the order of additions nor the blocks at which a sum
changes its unit depend on the schedule, so the result is bitwise reproducible.

**Lookahead.** Where few rows are in flight, the time of the solve is a chain of latencies: from the
last `y` that a program waits for to its own. Before it waits for anything, a program therefore
prepares `M_ij = A_ii⁻¹ A_ij`, which needs keys alone, for the last `lookahead` blocks j. It then
computes `t = A_ii⁻¹ (v_i − Σ A_ij y_j)` over the earlier blocks, and one product a block remains:
`y_i = t − Σ M_ij y_j`. The `M_ij` occupy registers during the main loop. A long solve of many heads
uses a lookahead of 0, and so few registers that two programs share a multiprocessor.

**Float16.** Where keys are float16, products read a float16 copy of `y` with a power of two for
each block (`scaled`), whose exponents never fall along a chain. A program keeps its sums in units
of the power of the blocks at hand. Where the state has the same exponent, so have all finished
blocks in between, and none is loaded. The copy and its exponent are stored before the program
raises the count; `y` in the dtype of the inputs, which no other program reads, is stored
afterwards.

**Half of the key gradient.** The transposed solve visits `A_ij` and `v̄_j` of all blocks j after
its own, the factors of the terms `−A_ij (v̄_j·y_i) k̂_j` of `k̂̄_i`. Given `y`, it sums these terms
with two more products a tile, where `key_gradient` would need three and an exponential.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.call import pallas_call
from pallas_kernels.scaling import entry_scale
from pallas_kernels.triton import scaled, tile
from pallas_kernels.triton.parts import Tile, zero_tile
from pallas_kernels.triton.scaled import Scaled
from pallas_kernels.triton.tiles import Tiles


class Documents(NamedTuple):
    """The documents of packed sequences, with rows and blocks in the order of the solve: int32.

    Attributes:
      order: The items of work `[B,2N]`, each after those that it depends on. Item `n` of the first
        N is the rows of block `n` that belong to the document which enters it, item `N + n` its
        other rows. Items without rows come last.
      start: The first row of the document that enters each block `[B,N]`.
      size: How many rows of each block belong to it `[B,N]`.
    """

    order: jax.Array
    start: jax.Array
    size: jax.Array


@functools.partial(jax.jit, static_argnames=("dtype", "tiles", "reverse", "interpret"))
def solve(
    k_hat: jax.Array,
    inverses: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    documents: Documents | None,
    *,
    dtype: jax.typing.DTypeLike,
    tiles: Tiles,
    reverse: bool = False,
    k: jax.Array | None = None,
    y: jax.Array | Scaled | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, Scaled | None, jax.Array | None]:
    """Returns `A⁻¹ v`, or `A⁻ᵀ v` and, given `y`, half of the key gradient.

    Args:
      k_hat: `k̃ [B,K,N·R,W]`, in the dtype of the products. Where the products of two blocks have
        keys of their own, such as those of PaTH, `[L·B,K,N·R,W]`: level `l` is for blocks in whose
        numbers bit `l` is the highest that differs.
      inverses: `A_bb⁻¹ [B,K,N,T,R,R]`, the sum of T terms: one in float32 with float32 keys,
        otherwise two in bfloat16.
      v: Right-hand sides `[B,S,K,D]`.
      segment_ids: int32 `[B,N·R]`, or None.
      documents: Where the documents begin, or None where each sequence is one. Positions number
        the blocks, from the end with `reverse`.
      dtype: The dtype of the solution.
      tiles: Tile sizes.
      reverse: Whether to solve the transposed system.
      k: Keys `[B,S,K,D]`, not normalised. Given them, tokens whose keys are not finite become NaN.
      y: `[B,S,K,D]`, only with `reverse`: the solution of the system whose cotangent is `v`;
        scaled if keys are float16.
      interpret: Whether to run in Pallas' interpreter.

    Returns:
      The solution `[B,S,K,D]`; the same scaled if keys are float16, else None; and float32
      `[B,S,K,D]`, the argument `upper` of `key_gradient`, or None without `y`.
    """
    b, s, heads, d = v.shape
    blocks = k_hat.shape[2] // tiles.rows
    order, start, size = documents or (None, None, None)
    body = functools.partial(_kernel, d=d, tiles=tiles, reverse=reverse, interpret=interpret)
    copy = upper = None
    if k_hat.dtype == jnp.float16:
        copy = (
            jax.ShapeDtypeStruct(v.shape, jnp.float16),
            jax.ShapeDtypeStruct((b, heads, blocks), jnp.int32),
        )
    if y is not None:
        upper = jax.ShapeDtypeStruct(v.shape, jnp.float32)
    values, exponents = y if isinstance(y, Scaled) else (y, None)
    arrays = k_hat, inverses, v, segment_ids, order, start, size
    x, _, copy, upper = pallas_call(
        body,
        grid=(b * heads * (blocks if order is None else order.shape[1]),),
        out_shape=(
            jax.ShapeDtypeStruct((b, s, heads, d), dtype),
            jax.ShapeDtypeStruct((1 + b * heads * blocks,), jnp.int32),
            copy,
            upper,
        ),
        # The counters: the number of tickets drawn, then the progress of each chain.
        input_output_aliases={sum(x is not None for x in arrays): 1},
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="lucid_solve_transposed" if reverse else "lucid_solve",
    )(*arrays, jnp.zeros(1 + b * heads * blocks, jnp.int32), k, values, exponents)
    return x, copy and Scaled(*copy), upper


def _kernel(
    # Inputs.
    k_hat_ref,  # [B,K,N·R,W] or [L·B,K,N·R,W]
    inverse_ref,  # [B,K,N,T,R,R]
    v_ref,  # [B,S,K,D]
    segments_ref,  # [B,N·R] or None
    order_ref,  # [B,2N] or None
    start_ref,  # [B,N] or None
    size_ref,  # [B,N] or None
    _,  # [1 + B·K·N], the counters as an input that aliases the output
    k_ref,  # [B,S,K,D] or None
    y_ref,  # [B,S,K,D] or None
    y_exponents_ref,  # [B,K,N] or None
    # Outputs.
    x_ref,  # [B,S,K,D]
    counters_ref,  # [1 + B·K·N]
    copy_ref,  # [B,S,K,D] and [B,K,N], or None
    upper_ref,  # [B,S,K,D] or None
    # Static.
    *,
    d: int,
    tiles: Tiles,
    reverse: bool,
    interpret: bool,
):
    (batch, length, heads, _), padded = v_ref.shape, k_hat_ref.shape[2]
    r, c, dtype = tiles.rows, tiles.columns, k_hat_ref.dtype
    levels, blocks, per_block = k_hat_ref.shape[0] // batch, padded // r, r // c
    items = blocks if order_ref is None else 2 * blocks
    shift = tile.exponent_shift(dtype, d)
    scale = entry_scale(d, shift)
    # What the products read of the solution.
    solved_ref, exponents_ref = (x_ref, None) if copy_ref is None else copy_ref

    zero: jax.Array = pl.program_id(0) * 0  # The interpreter's atomics take traced operands only.
    ticket = plgpu.atomic_add(counters_ref, zero, zero + 1)
    # A group size that divides the number of heads, or all heads.
    group = math.gcd(tiles.head_group, batch * heads)
    place = ticket % (items * group) // group
    head = ticket // (items * group) * group + ticket % group
    b, h = head // heads, head % heads

    def row_of(position, size: int):
        """Returns the first row of the position, counted in units of `size` rows."""
        return padded - (position + 1) * size if reverse else position * size

    def load_rows(ref, start, size: int, begin, end) -> Tile:
        return tile.load_rows(ref, b, start, size, h, end, begin=begin)

    def wait(progress, state, count):
        """Waits until `count` positions are finished; the counter is at least `state`."""
        # Hence this maximum only reads it.
        return jax.lax.while_loop(
            lambda state: _finished(state) < count,
            lambda state: plgpu.atomic_max(counters_ref, progress, state),
            state,
        )

    def solve_item(position, first, own, chain, leaving):
        """Solves the rows `own` of the block at a position.

        They depend on the positions from `first` on, and in these on the rows `chain`. The rows
        `leaving` are those of the document that leaves the block. All three are a first row and one
        past the last, or None where the block or the sequence is the limit.
        """
        progress = 1 + head * blocks + first
        row = row_of(position, r)
        k_b = tile.load_keys(k_hat_ref, b, h, row, r) if levels == 1 else None
        segments_i = tile.load_segments(segments_ref, b, row, r)
        if y_ref is not None:
            # Where a chain starts, no term needs them, and their copies may be infinite.
            limits = own if order_ref is None else (own[0], jnp.where(position > first, own[1], 0))
            y_i = load_rows(y_ref, row, r, *limits).astype(dtype)

        def gram(start) -> tuple[jax.Array, Tile]:
            """Returns `A / scale` `[R,C]`, and the keys of its columns."""
            plane, k_i = b, k_b
            if k_i is None:
                plane += tile.level_of(row // r, start // r) * batch
                k_i = tile.load_keys(k_hat_ref, plane, h, row, r)
            k_j = tile.load_keys(k_hat_ref, plane, h, start, c)
            segments_j = tile.load_segments(segments_ref, b, start, c)
            return tile.gram(k_i, k_j, segments_i, segments_j, shift, interpret), k_j

        def add_gradient(upper, a, k_j, x_j):
            weight = a * tile.dot_rows(y_i, x_j)
            return upper + tile.dot(weight.astype(dtype), k_j)

        def visit(t, totals):
            total, *upper = totals
            start = row_of(t, c)
            a, k_j = gram(start)
            x_j = load_rows(solved_ref, start, c, *chain).astype(dtype)
            return total + tile.dot(a.astype(dtype), x_j), *(
                add_gradient(u, a, k_j, x_j) for u in upper
            )

        def load_inverse(term):
            inverse = plgpu.load(inverse_ref.at[b, h, row // r, zero + term])
            return inverse.T if reverse else inverse

        # The last blocks, latest first. A block that this one does not depend on, or that does
        # not exist, has a row limit of 0, so that its rows count as zero.
        begin, end = chain
        pending = []
        if tiles.lookahead:
            terms = (load_inverse(t).astype(jnp.float32) for t in range(inverse_ref.shape[3]))
            inverse = functools.reduce(jnp.add, terms).astype(dtype)
        for before in range(1, tiles.lookahead + 1):
            j = position - before
            needed = (first <= j).astype(jnp.int32)
            limits = begin, (length if end is None else end) * needed
            for t in range(per_block):
                start = row_of(jnp.maximum(j, 0) * per_block + t, c)
                m = tile.dot(inverse, gram(start)[0].astype(dtype)) * scale
                pending.append((j, needed, start, limits, m.astype(dtype)))

        last = position - tiles.lookahead

        def exponent_of(j):
            return scaled.load_exponent(exponents_ref, b, h, row_of(j, r) // r)

        def advance(carry):
            done, state, unit, totals = carry
            state = wait(progress, state, done + 1)
            ready = jnp.minimum(_finished(state), last)
            if exponents_ref is not None:
                # Exponents never fall, so all have that of the totals if the newest has.
                newest = _newest_exponent(state)
                ready, e = jax.lax.cond(
                    newest == unit,
                    lambda: (ready, unit),
                    lambda: scaled.find_run(exponent_of, done, ready, newest),
                )
                totals = tuple(x * scaled.power(unit - e) for x in totals)
                unit = e
            totals = jax.lax.fori_loop(done * per_block, ready * per_block, visit, totals)
            return ready, state, unit, totals

        zeros = zero_tile(r, d)
        # Totals of zero are in any unit; no block has the exponent −1000.
        unit = zero if exponents_ref is None else zero - 1000
        _, state, unit, (total, *upper) = jax.lax.while_loop(
            lambda carry: carry[0] < last,
            advance,
            (first, zero, unit, (zeros,) if upper_ref is None else (zeros, zeros)),
        )
        update = scale * total
        if exponents_ref is not None:
            update *= scaled.power(unit)
        rhs = load_rows(v_ref, row, r, *own).astype(jnp.float32) - update
        if k_ref is not None:
            rhs += 0 * load_rows(k_ref, row, r, *own).astype(jnp.float32)
        if order_ref is not None:
            rhs = tile.keep_rows(rhs, row, *own)
        # The inverse is loaded again, because it would spill during the loop.
        if dtype == jnp.float32:
            x_i = tile.dot_split(load_inverse(0), rhs, dtype)
        else:
            x_i = tile.dot_terms(load_inverse, rhs)

        exponent, units = unit, []
        for j, needed, start, limits, m in reversed(pending):
            state = wait(progress, state, (j + 1) * needed)
            update = tile.dot(m, load_rows(solved_ref, start, c, *limits).astype(dtype))
            if exponents_ref is not None:
                known = (_newest_exponent(state) == exponent) | (needed == 0)
                exponent = jax.lax.cond(
                    known, lambda e=exponent: e, lambda j=j: exponent_of(jnp.maximum(j, 0))
                )
                units.append(exponent)
                update *= scaled.power(exponent)
            x_i = x_i - update

        begin, end = own
        if exponents_ref is not None:
            left = x_i if order_ref is None else tile.keep_rows(x_i, row, *leaving)
            exponent = jnp.maximum(exponent, scaled.block_exponent(left, d))
            copy = x_i * scaled.power(-exponent)
            tile.store_rows(solved_ref, b, row, r, h, copy, end, begin=begin)
            # Only the part with the last row of the block has rows that later blocks read.
            block = row // r
            store = functools.partial(plgpu.store, exponents_ref.at[b, h, block], exponent)
            if order_ref is None:
                store()
            else:
                last_row = jnp.minimum(row + r, length)
                pl.when((begin == row) if reverse else (end == last_row))(store)
        else:
            tile.store_rows(x_ref, b, row, r, h, x_i, end, begin=begin)
        if not interpret:
            plgpu.debug_barrier()
        plgpu.atomic_max(counters_ref, progress, _state(position + 1, exponent))

        # No other program waits for this part.
        if exponents_ref is not None:
            tile.store_rows(x_ref, b, row, r, h, x_i, end, begin=begin)
        if upper_ref is not None:
            [gradient] = upper
            for i, (_, _, start, limits, _) in enumerate(reversed(pending)):
                x_j = load_rows(solved_ref, start, c, *limits).astype(dtype)
                if exponents_ref is not None:
                    gradient *= scaled.power(unit - units[i])
                    unit = units[i]
                gradient = add_gradient(gradient, *gram(start), x_j)
            if exponents_ref is not None:
                e = scaled.load_exponent(y_exponents_ref, b, h, row // r)
                gradient *= scaled.power(e + unit)
            tile.store_rows(upper_ref, b, row, r, h, gradient, end, begin=begin)

    if order_ref is None:
        limits = None, None if padded == length else length
        solve_item(place, zero, limits, limits, limits)
        return

    item = plgpu.load(order_ref.at[b, place])
    position, starts_chain = item % blocks, item >= blocks
    chain_start, size = (plgpu.load(ref.at[b, position]) for ref in (start_ref, size_ref))
    row = row_of(position, r)
    bound = row + (r - size if reverse else size)
    chain = (
        (None, jnp.minimum(padded - chain_start, length))
        if reverse
        else (chain_start, None if padded == length else length)
    )
    upper_half = starts_chain != reverse
    begin, end = jnp.where(upper_half, bound, row), jnp.where(upper_half, row + r, bound)
    first = jnp.where(starts_chain, position, chain_start // r)

    own = begin, jnp.minimum(end, length)
    # The next block tells where the document begins that leaves this one.
    following = plgpu.load(start_ref.at[b, jnp.minimum(position + 1, blocks - 1)])
    leaving = (
        (begin, jnp.minimum(own[1], padded - following))
        if reverse
        else (jnp.maximum(begin, following), own[1])
    )
    # Rows of padding alone are an item too, because others wait for it.
    pl.when(begin < end)(lambda: solve_item(position, first, own, chain, leaving))


def _state(finished: jax.Array, exponent: jax.Array) -> jax.Array:
    """Returns the counter of a chain: its finished positions, and the exponent of the newest."""
    return (finished << 8) + (exponent + 128)


def _finished(state: jax.Array) -> jax.Array:
    return state >> 8


def _newest_exponent(state: jax.Array) -> jax.Array:
    return (state & 255) - 128
