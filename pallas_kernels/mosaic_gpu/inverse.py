"""The inverses of the diagonal blocks, one block a program.

Each group of warps inverts the 64 rows of its own. With `X` the inverses of blocks of m rows on the
diagonal, those of 2m rows are `X − X T`, where `T = A X` in the lower left quarter of each block of
2m rows, and zero elsewhere. The second group then joins the halves, in the same way.

Products are of float16 terms, the larger one of each factor with both of the other: no entry
exceeds 16, because `‖X‖ ≤ 2` and 64 entries of A are at most 8 long.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import tile


@functools.partial(jax.jit, static_argnames=("shift", "interpret"))
def inverses(
    k_hat: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    shift: float,
    interpret: Any = None,
) -> jax.Array:
    """Returns `A_ii⁻¹` as the sum of two terms in the dtype of the keys, the larger first.

    They come as tiles of the solve, `[M,S/R,2,2,C,W]`: each term in two halves, of its rows if
    heads are 128 wide, else of its columns, which are the first 64 of a tile.

    Args:
      k_hat: `k̃ [M,S,W]`, float16 or bfloat16; R divides S.
      segment_ids: int32 `[B,S]`, M/B systems each, or None.
      shift: `c`, so that `A_ij = 2^(k̃_i·k̃_j − c)`.
      interpret: The parameters of Pallas' interpreter, or None for a GPU.
    """
    (m, s, w), dtype, rows = k_hat.shape, k_hat.dtype, tile.ROWS
    body = functools.partial(_kernel, systems=m, shift=shift, interpret=interpret)
    terms = tile.buffer(2, rows, tile.HALF, dtype=jnp.float16)
    scratch = (
        tile.buffer(rows, w, dtype=dtype), terms, terms, terms,
        tile.barriers(1), tile.barriers(1, tile.GROUPS),
    )  # fmt: skip
    shape = jax.ShapeDtypeStruct((m * s // rows * 4, tile.columns(w), w), dtype)
    call = tile.run(body, shape, (m * s // rows,), scratch, interpret, "lucid_inverses")
    return call(k_hat.reshape(-1, w), segment_ids).reshape(m, s // rows, 2, 2, *shape.shape[1:])


def _kernel(
    # Arrays.
    k_ref,  # [M·S,W]
    segments_ref,  # [B,S] or None
    out_ref,  # [M·S/R·4,C,W]
    group,
    # Shared memory; of matrices the larger term first, and rows of both groups.
    k_own,  # [R,W]
    a_terms,  # [2,R,R/2]
    t_terms,  # [2,R,R/2]
    x_terms,  # [2,R,R/2]
    # Barriers.
    own_full,
    both,
    # Static.
    *,
    systems: int,
    shift: float,
    interpret: Any,
):
    block, rows, half, one = jax.lax.axis_index("axis0"), tile.ROWS, tile.HALF, jnp.int32(1)

    @tile.as_group(group, computes=True, interpret=interpret)
    def _():
        mine = tile.rows_of(group)

        def split(x, dtype):
            high = x.astype(dtype)
            return high, (x - high.astype(jnp.float32)).astype(dtype)

        def store(terms, x):
            for i, term in enumerate(split(x, jnp.float16)):
                terms[i, mine] = term
            plgpu.commit_smem()

        def write(x, columns):
            for i, term in enumerate(split(x, out_ref.dtype)):
                place = out_ref.at[4 * block + 2 * i + columns, mine, pl.ds(0, half)]
                if out_ref.shape[1] == half:
                    at = pl.ds(columns * half, half)
                    place = out_ref.at[4 * block + 2 * i + group, :, at]
                tile.store(place, term)

        def gram(columns):
            """Returns `A` of the rows of this group and the columns of a group."""
            a = jnp.exp2(tile.dot_rows(k_own.at[mine], k_own.at[tile.rows_of(columns)]) - shift)
            if segments_ref is None:
                return a
            batch, length = segments_ref.shape
            b = jax.lax.div(block, systems // batch * (length // rows) * one)
            row = jax.lax.rem(block * rows, length * one)
            same = tile.same_segment(
                segments_ref, b, row + group * half, row + columns * half, a.shape
            )
            return jnp.where(same, a, 0.0)

        def multiply(left, right, of):
            """Multiplies terms of this group and terms of a group."""

            def run(total):
                for i, j in ((1, 0), (0, 1), (0, 0)):
                    plgpu.wgmma(total, left.at[i, mine], right.at[j, tile.rows_of(of)])
                return total[...]

            return pl.run_scoped(run, plgpu.ACC((half, half), jnp.float32))

        plgpu.barrier_wait(own_full)
        a, i, j = gram(group), *(tile.iota((half, half), axis) for axis in range(2))
        store(a_terms, a)
        # Of blocks of one row the inverse is 1, of two rows it has −a.
        x = jnp.where(i == j, 1.0, jnp.where((i == j + 1) & (jax.lax.rem(i, 2) == 1), -a, 0.0))
        store(x_terms, x)
        size = 2
        while size < half:
            t = multiply(a_terms, x_terms, group)
            store(t_terms, jnp.where(((i ^ j) & -size == size) & (i > j), t, 0.0))
            x = x - multiply(x_terms, t_terms, group)
            store(x_terms, x)
            size *= 2
        write(x, group)
        plgpu.barrier_arrive(both)
        plgpu.barrier_wait(both)

        @pl.when(group == 0)
        def _():
            write(jnp.zeros_like(x), 1)

        @pl.when(group == 1)
        def _():
            store(a_terms, -gram(0))
            store(t_terms, multiply(a_terms, x_terms, 0))
            write(multiply(x_terms, t_terms, 1), 0)

    @tile.as_group(group, computes=False, interpret=interpret)
    def _():
        plgpu.copy_gmem_to_smem(k_ref.at[pl.ds(block * rows, rows)], k_own, own_full)
