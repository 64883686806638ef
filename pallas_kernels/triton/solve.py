"""The solve as a dataflow kernel: `y_i = A_ii⁻¹ (v_i − Σ_{j<i} A_ij y_j)`, or its transpose.

One program solves one block of rows of one head. It adds up the products with the blocks
that are finished, waits for more, and so on; the inner loop over finished blocks is a
plain pipelined loop. The transpose is the same substitution read backwards, because `A`
is symmetric off its diagonal: blocks are counted from the end.

**No deadlock.** Programs draw their block from a ticket counter, in order of position
(all heads of a group at a position, then at the next; then the next group). A program waits
only for positions before its own in its head, whose tickets were drawn earlier, by programs
that are therefore running; the one with the earliest ticket not finished waits for nobody.
This holds for any schedule and any number of resident programs. Few heads in a group keep
the keys and `y` that running programs read in the cache; many give them more to do while
they wait.

**No race.** `progress[head]` counts the finished positions of a head. Only the program at
position p raises it from p to p + 1, after it has seen it at p: the count is monotone. All
threads of that program store their rows of `y`, meet at a barrier, and then one performs
the atomic maximum with acquire-release order at the scope of the device; a reader's
atomic read has the same order and is followed by a barrier before its threads load. Stores
before the maximum therefore happen before the loads after the read. Every row of `y`
is written once and read only after that, so nothing stale can be read from a cache.
The order of additions does not depend on the schedule: the result is bitwise the same.

**A short chain.** Where few rows are in flight, the latency of the whole solve is that of what
a program does between the last `y` it waits for and its own. For the last `window` blocks j
it therefore prepares `M_ij = A_ii⁻¹ A_ij` before it waits for anything, which takes keys only,
and `t = A_ii⁻¹ (v_i − Σ A_ij y_j)` of the blocks before them; then one product a block remains:
`y_i = t − Σ M_ij y_j`. The `M_ij` occupy registers while the main loop runs. A long solve of
many heads takes a window of 0, and so few registers that two programs share a multiprocessor.

**Half of the key gradient on the way.** The transposed solve visits `A_ij` and `v̄_j` of all
blocks j behind its own, which is what the terms `−A_ij (v̄_j·y_i) k̂_j` of `k̂̄_i` are made of.
With `y` given, two more products a tile add them up, where `key_gradient` would take three and
an exponential.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.scaling import largest_exponent
from pallas_kernels.triton import tile
from pallas_kernels.triton.tiles import Tiles


@functools.partial(jax.jit, static_argnames=("dtype", "tiles", "reverse", "interpret"))
def solve(
    k_hat: jax.Array,
    inverses: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    first: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
    tiles: Tiles,
    reverse: bool = False,
    y: jax.Array | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """`A⁻¹ v`, or `A⁻ᵀ v` with `reverse`, and then what `y` has to say to the key gradient.

    Args:
      k_hat: `k̃ [B,K,N·R,W]`.
      inverses: `A_bb⁻¹ [B,K,N,R,R]`, float32.
      v: Right-hand sides `[B,S,K,D]`.
      segment_ids: int32 `[B,N·R]`, or None.
      first: int32 `[B,N]`: the first position that each position may depend on. Positions
        are blocks, counted from the end with `reverse`. Never decreases along N.
      dtype: Of the result.
      tiles: Sizes.
      reverse: Solves the transposed system.
      y: `[B,S,K,D]`, only with `reverse`: `A⁻¹` of the right-hand sides whose cotangent is `v`.
      interpret: Runs in Pallas' interpreter.

    Returns:
      The solution `[B,S,K,D]`; with `y` also the `upper [B,S,K,D]` of `key_gradient`, float32,
      otherwise None.
    """
    b, s, heads, d = v.shape
    blocks = k_hat.shape[2] // tiles.rows
    body = functools.partial(_kernel, d=d, tiles=tiles, reverse=reverse, interpret=interpret)
    upper = [] if y is None else [jax.ShapeDtypeStruct(v.shape, jnp.float32)]
    x, _, *upper = pl.pallas_call(
        body,
        grid=(blocks * b * heads,),
        out_shape=(
            jax.ShapeDtypeStruct((b, s, heads, d), dtype),
            jax.ShapeDtypeStruct((1 + b * heads,), jnp.int32),
            *upper,
        ),
        # The counters: tickets drawn, then the progress of each head.
        input_output_aliases={4 if segment_ids is None else 5: 1},
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="lucid_solve_transposed" if reverse else "lucid_solve",
    )(k_hat, inverses, v, segment_ids, first, jnp.zeros(1 + b * heads, jnp.int32), y)
    return x, upper[0] if upper else None


def _kernel(
    k_hat_ref,  # [B,K,N·R,W]
    inverse_ref,  # [B,K,N,R,R] float32
    v_ref,  # [B,S,K,D]
    segments_ref,  # [B,N·R] or None
    first_ref,  # [B,N]
    _,  # the counters' input
    y_ref,  # [B,S,K,D] or None
    x_ref,  # [B,S,K,D]
    counters_ref,  # [1 + B·K]
    upper_ref=None,  # [B,S,K,D]
    *,
    d: int,
    tiles: Tiles,
    reverse: bool,
    interpret: bool,
):
    batch, heads, padded, w = k_hat_ref.shape
    r, c, dtype = tiles.rows, tiles.columns, k_hat_ref.dtype
    length = v_ref.shape[1]
    s = None if padded == length else length
    per_block = r // c
    shift = tile.exponent_shift(dtype, d)
    scale = math.exp2(shift - largest_exponent(d))

    zero = pl.program_id(0) * 0  # The interpreter's atomics take traced operands only.
    ticket = plgpu.atomic_add(counters_ref, zero, zero + 1)
    # All heads, or as many together as divide them.
    group, blocks = math.gcd(tiles.head_group, batch * heads), padded // r
    position = ticket % (blocks * group) // group
    head = ticket // (blocks * group) * group + ticket % group
    b, h = head // heads, head % heads

    def row_of(position, size: int):
        """The first row of `size` rows that stand at a position in units of `size`."""
        return padded - (position + 1) * size if reverse else position * size

    row = row_of(position, r)
    k_i = plgpu.load(k_hat_ref.at[b, h, pl.ds(row, r), :])
    segments_i = tile.load_segments(segments_ref, b, row, r)
    if y_ref is not None:
        y_i = tile.load_rows(y_ref, b, row, r, h, w, s).astype(dtype)

    def gram(start) -> tuple[jax.Array, jax.Array]:
        """`A` times a constant `[R,C]`, and the keys of its columns."""
        k_j = plgpu.load(k_hat_ref.at[b, h, pl.ds(start, c), :])
        segments_j = tile.load_segments(segments_ref, b, start, c)
        return tile.gram(k_i, k_j, segments_i, segments_j, shift, interpret), k_j

    def load_x(start, s) -> jax.Array:
        return tile.load_rows(x_ref, b, start, c, h, w, s).astype(dtype)

    def weigh(upper, a, k_j, x_j):
        weight = tile.dot(y_i, x_j, transposed=True)
        # As `key_gradient` has it: of A itself where more would overflow.
        weight = a * (weight * scale if dtype == jnp.float16 else weight)
        return upper + tile.dot(weight.astype(dtype), k_j)

    def visit(t, totals):
        total, *upper = totals
        start = row_of(t, c)
        a, k_j = gram(start)
        x_j = load_x(start, s)
        return total + tile.dot(a.astype(dtype), x_j), *(weigh(u, a, k_j, x_j) for u in upper)

    def wait(finished, count):
        """Until `count` positions of this head are finished; `finished` are known to be."""
        # A maximum with what the counter is known to reach changes nothing: it is a read.
        return jax.lax.while_loop(
            lambda finished: finished < count,
            lambda finished: plgpu.atomic_max(counters_ref, 1 + head, finished),
            finished,
        )

    def load_inverse():
        inverse = plgpu.load(inverse_ref.at[b, h, row // r])
        return inverse.T if reverse else inverse

    # The last blocks, latest first. Rows of a block that this one does not depend on, or
    # that does not exist, count as zero.
    first = plgpu.load(first_ref.at[b, position])
    inverse = load_inverse().astype(dtype)
    window = []
    for before in range(1, tiles.lookahead + 1):
        j = position - before
        limit = length * (first <= j).astype(jnp.int32)
        for t in range(per_block):
            start = row_of(jnp.maximum(j, 0) * per_block + t, c)
            m = tile.dot(inverse, gram(start)[0].astype(dtype)) * scale
            window.append((j, start, limit, m.astype(dtype)))

    last = position - tiles.lookahead

    def advance(carry):
        done, finished, totals = carry
        finished = wait(finished, done + 1)
        ready = jnp.minimum(finished, last)
        totals = jax.lax.fori_loop(done * per_block, ready * per_block, visit, totals)
        return ready, finished, totals

    zeros = jnp.zeros((r, w), jnp.float32)
    _, finished, (total, *upper) = jax.lax.while_loop(
        lambda carry: carry[0] < last,
        advance,
        (first, jnp.int32(0), (zeros,) if upper_ref is None else (zeros, zeros)),
    )
    v_i = tile.load_rows(v_ref, b, row, r, h, w, s).astype(jnp.float32)
    # Loaded again: kept in float32 through the loop, it would spill.
    if window or dtype == jnp.float32:
        x_i = tile.dot_split(load_inverse(), v_i - scale * total, dtype)
    else:
        x_i = tile.dot_split_in_turn(load_inverse, v_i - scale * total, interpret)

    for j, start, limit, m in reversed(window):
        finished = wait(finished, j + 1)
        x_i = x_i - tile.dot(m, load_x(start, limit))
    # Also where this block depends on none: the count of finished positions has no gaps.
    wait(finished, position)

    tile.store_rows(x_ref, b, row, r, h, x_i, s)
    if not interpret:
        plgpu.debug_barrier()
    plgpu.atomic_max(counters_ref, 1 + head, position + 1)

    # Nobody waits for this.
    if upper_ref is not None:
        [weighed] = upper
        for _, start, limit, _ in window:
            weighed = weigh(weighed, *gram(start), load_x(start, limit))
        tile.store_rows(upper_ref, b, row, r, h, weighed, s)
