"""The inverses of the diagonal blocks, one block a program.

With `X` the inverses of blocks of m rows on the diagonal, those of 2m rows are `X − X T`, where
`T = A X` in the lower left quarter of each block of 2m rows, and zero elsewhere. Products are of
float16 terms, the larger one of each factor with both of the other: no entry exceeds 16, because
`‖X‖ ≤ 2` and the rows of A are at most 8 long.
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
    """Returns `A_ii⁻¹ [M,S/R,2,R,R]` as the sum of two terms in the dtype of the keys.

    Args:
      k_hat: `k̃ [M,S,W]`, float16 or bfloat16; R divides S.
      segment_ids: int32 `[B,S]`, M/B systems each, or None.
      shift: `c`, so that `A_ij = 2^(k̃_i·k̃_j − c)`.
      interpret: The parameters of Pallas' interpreter, or None for a GPU.
    """
    (m, s, w), dtype, rows = k_hat.shape, k_hat.dtype, tile.ROWS
    packed = segment_ids is not None
    body = functools.partial(
        _packed if packed else _kernel, systems=m, shift=shift, interpret=interpret
    )
    terms = tile.buffer(2, rows, rows, dtype=jnp.float16)
    scratch = (
        tile.buffer(rows, w, dtype=dtype), terms, terms, terms,
        tile.barriers(1), tile.barriers(1, tile.GROUPS),
    )  # fmt: skip
    shape = jax.ShapeDtypeStruct((m * s // rows * 2, rows, rows), dtype)
    call = tile.run(body, shape, (m * s // rows,), scratch, interpret, "lucid_inverses")
    arrays = [k_hat.reshape(-1, w)] + ([segment_ids] if packed else [])
    return call(*arrays).reshape(m, s // rows, 2, rows, rows)


def _packed(k_ref, segments_ref, *rest, **static):
    _kernel(k_ref, *rest, segments_ref=segments_ref, **static)


def _kernel(
    # Arrays.
    k_ref,  # [M·S,W]
    out_ref,  # [M·S/R·2,R,R]
    group,
    # Shared memory, the larger term first.
    k_own,  # [R,W]
    a_terms,  # [2,R,R]
    t_terms,  # [2,R,R]
    x_terms,  # [2,R,R]
    # Barriers.
    own_full,
    both,
    _,
    # Static.
    *,
    systems: int,
    shift: float,
    interpret: Any,
    segments_ref=None,  # [B,S], of packed sequences
):
    block, rows = jax.lax.axis_index("axis0"), tile.ROWS

    @tile.as_group(group, computes=True, interpret=interpret)
    def _():
        mine = tile.rows_of(group)

        def iota(axis):
            shape = tile.HALF, rows
            return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

        i, j = iota(0) + group * tile.HALF, iota(1)

        def store(terms, x):
            high = x.astype(jnp.float16)
            terms[0, mine] = high
            terms[1, mine] = (x - high.astype(jnp.float32)).astype(jnp.float16)

        def meet():
            plgpu.commit_smem()
            plgpu.barrier_arrive(both)
            plgpu.barrier_wait(both)

        def multiply(left, right):
            def run(total):
                for one, other in ((1, 0), (0, 1), (0, 0)):
                    plgpu.wgmma(total, left.at[one, mine], right.at[other])
                return total[...]

            return pl.run_scoped(run, plgpu.ACC((tile.HALF, rows), jnp.float32))

        plgpu.barrier_wait(own_full)
        a = jnp.exp2(tile.dot_rows(k_own.at[mine], k_own) - shift)
        if segments_ref is not None:
            batch, length = segments_ref.shape
            one = jnp.int32(1)
            b = jax.lax.div(block, systems // batch * (length // rows) * one)
            row = jax.lax.rem(block * rows, length * one)
            same = tile.same_segment(segments_ref, b, row + group * tile.HALF, row, a.shape)
            a = jnp.where(same, a, 0.0)
        store(a_terms, a)
        # Of blocks of one row the inverse is 1, of two rows it has −a.
        x = jnp.where(i == j, 1.0, jnp.where((i == j + 1) & (jax.lax.rem(i, 2) == 1), -a, 0.0))
        store(x_terms, x)
        meet()
        size = 2
        while size < rows:
            t = multiply(a_terms, x_terms)
            bits = i ^ j
            t = jnp.where((bits >= size) & (bits < 2 * size) & (i > j), t, 0.0)
            store(t_terms, t)
            meet()
            x = x - multiply(x_terms, t_terms)
            size *= 2
            if size < rows:
                store(x_terms, x)
                meet()
        high = x.astype(out_ref.dtype)
        out_ref[2 * block, mine] = high
        out_ref[2 * block + 1, mine] = (x - high.astype(jnp.float32)).astype(out_ref.dtype)

    @tile.as_group(group, computes=False, interpret=interpret)
    def _():
        plgpu.copy_gmem_to_smem(k_ref.at[pl.ds(block * rows, rows)], k_own, own_full)
