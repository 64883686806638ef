"""The solve `A y = v`, or its transpose, as a dataflow of blocks.

One program solves one block of rows of one head, `y_i = A_ii⁻¹ (v_i − Σ_{j<i} A_ij y_j)`. It adds
up the products with the blocks that are finished in a plain pipelined loop, waits for more blocks,
and repeats. The transposed system is the same substitution with the blocks counted from the end,
because `A` is symmetric off its diagonal.

**No deadlock.** Programs draw tickets from a counter. Consecutive tickets take the heads of a
group at one position, then at the next position, then the next group. A program waits only for
earlier positions of its own head. Their tickets were drawn earlier, by programs that are therefore
running, and the program with the earliest unfinished ticket waits for none. This holds for any
schedule and any number of resident programs. With few heads in a group, the keys and `y` that
running programs read stay in the cache; with many, programs have more to do while they wait.

**No race.** `progress[head]` counts the finished positions of a head. Only the program at position
p raises it from p to p + 1, after it has seen it at p, so the count is monotone. All threads of
that program store their rows of `y` and meet at a barrier; then one thread performs an atomic
maximum with acquire-release order at the scope of the device. A reader's atomic read has the same
order and is followed by a barrier before its threads load. Stores before the maximum therefore
happen before loads after the read. Every row of `y` is written once and read only after that, so no
cache can hold a stale copy. The order of additions does not depend on the schedule, so the result
is bitwise reproducible.

**Lookahead.** Where few rows are in flight, the time of the solve is a chain of latencies: from the
last `y` that a program waits for to its own. Before it waits for anything, a program therefore
prepares `M_ij = A_ii⁻¹ A_ij`, which needs keys alone, for the last `lookahead` blocks j. It then
computes `t = A_ii⁻¹ (v_i − Σ A_ij y_j)` over the earlier blocks, and one product a block remains:
`y_i = t − Σ M_ij y_j`. The `M_ij` occupy registers during the main loop. A long solve of many heads
uses a lookahead of 0, and so few registers that two programs share a multiprocessor.

**Half of the key gradient.** The transposed solve visits `A_ij` and `v̄_j` of all blocks j after its
own, the factors of the terms `−A_ij (v̄_j·y_i) k̂_j` of `k̂̄_i`. Given `y`, it sums these terms with
two more products a tile, where `key_gradient` would need three and an exponential.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.call import pallas_call
from pallas_kernels.scaling import entry_scale
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
    """Returns `A⁻¹ v`, or `A⁻ᵀ v` and, given `y`, half of the key gradient.

    Args:
      k_hat: `k̃ [B,K,N·R,W]`.
      inverses: `A_bb⁻¹ [B,K,N,R,R]`, float32.
      v: Right-hand sides `[B,S,K,D]`.
      segment_ids: int32 `[B,N·R]`, or None.
      first: int32 `[B,N]`, the first position that each position may depend on, ascending.
        Positions number the blocks, from the end with `reverse`.
      dtype: The dtype of the solution.
      tiles: Tile sizes.
      reverse: Whether to solve the transposed system.
      y: `[B,S,K,D]`, only with `reverse`: the solution of the system whose cotangent is `v`.
      interpret: Whether to run in Pallas' interpreter.

    Returns:
      The solution `[B,S,K,D]`, and float32 `[B,S,K,D]`, the argument `upper` of `key_gradient`, or
      None without `y`.
    """
    b, s, heads, d = v.shape
    blocks = k_hat.shape[2] // tiles.rows
    body = functools.partial(_kernel, d=d, tiles=tiles, reverse=reverse, interpret=interpret)
    upper = [] if y is None else [jax.ShapeDtypeStruct(v.shape, jnp.float32)]
    x, _, *upper = pallas_call(
        body,
        grid=(blocks * b * heads,),
        out_shape=(
            jax.ShapeDtypeStruct((b, s, heads, d), dtype),
            jax.ShapeDtypeStruct((1 + b * heads,), jnp.int32),
            *upper,
        ),
        # The counters: the number of tickets drawn, then the progress of each head.
        input_output_aliases={4 if segment_ids is None else 5: 1},
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="lucid_solve_transposed" if reverse else "lucid_solve",
    )(k_hat, inverses, v, segment_ids, first, jnp.zeros(1 + b * heads, jnp.int32), y)
    return x, upper[0] if upper else None


def _kernel(
    # Inputs.
    k_hat_ref,  # [B,K,N·R,W]
    inverse_ref,  # [B,K,N,R,R] float32
    v_ref,  # [B,S,K,D]
    segments_ref,  # [B,N·R] or None
    first_ref,  # [B,N]
    _,  # [1 + B·K], the counters as an input that aliases the output
    y_ref,  # [B,S,K,D] or None
    # Outputs.
    x_ref,  # [B,S,K,D]
    counters_ref,  # [1 + B·K]
    upper_ref=None,  # [B,S,K,D]
    # Static.
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
    scale = entry_scale(d, shift)

    zero = pl.program_id(0) * 0  # The interpreter's atomics take traced operands only.
    ticket = plgpu.atomic_add(counters_ref, zero, zero + 1)
    # A group size that divides the number of heads, or all heads.
    group, blocks = math.gcd(tiles.head_group, batch * heads), padded // r
    position = ticket % (blocks * group) // group
    head = ticket // (blocks * group) * group + ticket % group
    b, h = head // heads, head % heads

    def row_of(position, size: int):
        """Returns the first row of the position, counted in units of `size` rows."""
        return padded - (position + 1) * size if reverse else position * size

    row = row_of(position, r)
    k_i = tile.load_keys(k_hat_ref, b, h, row, r)
    segments_i = tile.load_segments(segments_ref, b, row, r)
    if y_ref is not None:
        y_i = tile.load_rows(y_ref, b, row, r, h, w, s).astype(dtype)

    def gram(start) -> tuple[jax.Array, jax.Array]:
        """Returns `A / scale` `[R,C]`, and the keys of its columns."""
        k_j = tile.load_keys(k_hat_ref, b, h, start, c)
        segments_j = tile.load_segments(segments_ref, b, start, c)
        return tile.gram(k_i, k_j, segments_i, segments_j, shift, interpret), k_j

    def load_x(start, s) -> jax.Array:
        return tile.load_rows(x_ref, b, start, c, h, w, s).astype(dtype)

    def add_gradient(upper, a, k_j, x_j):
        weight = tile.dot(y_i, x_j, transposed=True)
        # As in `key_gradient`: with larger factors than A itself, float16 would overflow.
        weight = a * (weight * scale if dtype == jnp.float16 else weight)
        return upper + tile.dot(weight.astype(dtype), k_j)

    def visit(t, totals):
        total, *upper = totals
        start = row_of(t, c)
        a, k_j = gram(start)
        x_j = load_x(start, s)
        return total + tile.dot(a.astype(dtype), x_j), *(
            add_gradient(u, a, k_j, x_j) for u in upper
        )

    def wait(finished, count):
        """Waits until `count` positions of this head are finished; at least `finished` are."""
        # The counter is at least `finished`, so this maximum only reads it.
        return jax.lax.while_loop(
            lambda finished: finished < count,
            lambda finished: plgpu.atomic_max(counters_ref, 1 + head, finished),
            finished,
        )

    def load_inverse():
        inverse = plgpu.load(inverse_ref.at[b, h, row // r])
        return inverse.T if reverse else inverse

    # The last blocks, latest first. A block that this one does not depend on, or that does not
    # exist, has a row limit of 0, so that its rows count as zero.
    first = plgpu.load(first_ref.at[b, position])
    inverse = load_inverse().astype(dtype)
    pending = []
    for before in range(1, tiles.lookahead + 1):
        j = position - before
        limit = length * (first <= j).astype(jnp.int32)
        for t in range(per_block):
            start = row_of(jnp.maximum(j, 0) * per_block + t, c)
            m = tile.dot(inverse, gram(start)[0].astype(dtype)) * scale
            pending.append((j, start, limit, m.astype(dtype)))

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
    # The inverse is loaded again, because in float32 it would spill during the loop.
    if pending or dtype == jnp.float32:
        x_i = tile.dot_split(load_inverse(), v_i - scale * total, dtype)
    else:
        x_i = tile.dot_split_in_turn(load_inverse, v_i - scale * total, interpret)

    for j, start, limit, m in reversed(pending):
        finished = wait(finished, j + 1)
        x_i = x_i - tile.dot(m, load_x(start, limit))
    # Even a block that depends on none waits, so that the finished positions have no gaps.
    wait(finished, position)

    tile.store_rows(x_ref, b, row, r, h, x_i, s)
    if not interpret:
        plgpu.debug_barrier()
    plgpu.atomic_max(counters_ref, 1 + head, position + 1)

    # No other program waits for this part.
    if upper_ref is not None:
        [gradient] = upper
        for _, start, limit, _ in pending:
            gradient = add_gradient(gradient, *gram(start), load_x(start, limit))
        tile.store_rows(upper_ref, b, row, r, h, gradient, s)
