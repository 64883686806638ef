"""Normalised keys and the inverses of the diagonal blocks of `A`: all blocks in parallel.

One program loads the keys of a block once, writes them normalised, and inverts its unit
triangular block by doubling. 128 rows are two halves of 64.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.doubling import invert_unit_lower
from pallas_kernels.scaling import key_scale, largest_exponent
from pallas_kernels.triton import tile

_HALF = 64


def diagonal_inverses(
    k: jax.Array,
    segment_ids: jax.Array | None,
    *,
    rows: int,
    multiple: int,
    dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`k̃` and `A_bb⁻¹` of every block.

    Args:
      k: Keys `[B,S,K,D]`, not normalised.
      segment_ids: int32 `[B,N·R]`, or None.
      rows: R, 64 or 128.
      multiple: Of R, and N·R is one of it.
      dtype: Of `k̃`, and of the operands of products.
      interpret: Runs in Pallas' interpreter.

    Returns:
      `k̃ [B,K,N·R,W]`, zero where padded, and float32 inverses `[B,K,N,R,R]`.
    """
    b, s, heads, d = k.shape
    blocks, w = pl.cdiv(s, multiple) * (multiple // rows), tile.width(d)
    return pl.pallas_call(
        functools.partial(_kernel, s=s, d=d, rows=rows, interpret=interpret),
        grid=(blocks, b, heads),
        out_shape=(
            jax.ShapeDtypeStruct((b, heads, blocks * rows, w), dtype),
            jax.ShapeDtypeStruct((b, heads, blocks, rows, rows), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="lucid_diagonal_inverses",
    )(k, segment_ids)


def _kernel(k_ref, segments_ref, k_hat_ref, inverse_ref, *, s, d, rows, interpret):
    block, b, h = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    w, dtype = k_hat_ref.shape[-1], k_hat_ref.dtype
    keys, segments = [], []
    for half in range(rows // _HALF):
        start = block * rows + half * _HALF
        k = tile.load_rows(k_ref, b, start, _HALF, h, w, s)
        u, _, square = tile.rescale(k)
        scale = key_scale(d) * math.sqrt(d)
        k_hat = (u * (scale * jax.lax.rsqrt(square))).astype(dtype)
        plgpu.store(k_hat_ref.at[b, h, pl.ds(start, _HALF), :], k_hat)
        keys.append(k_hat)
        segments.append(tile.load_segments(segments_ref, b, start, _HALF))

    def gram(i: int, j: int) -> jax.Array:
        shift = largest_exponent(d)
        return tile.gram(keys[i], keys[j], segments[i], segments[j], shift, interpret)

    def put(i: int, j: int, x: jax.Array) -> None:
        at = inverse_ref.at[b, h, block, pl.ds(i * _HALF, _HALF), pl.ds(j * _HALF, _HALF)]
        plgpu.store(at, x)

    dot = functools.partial(tile.dot_split, dtype=dtype)
    p = invert_unit_lower(gram(0, 0), dot)
    put(0, 0, p)
    if rows > _HALF:
        q = invert_unit_lower(gram(1, 1), dot)
        put(1, 1, q)
        put(1, 0, -dot(q, dot(gram(1, 0), p)))
        put(0, 1, jnp.zeros_like(p))
