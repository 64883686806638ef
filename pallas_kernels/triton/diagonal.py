"""Normalised keys and the inverses of the diagonal blocks of `A`, all blocks in parallel.

A block is inverted by recursive halves, `[[P,0],[C,Q]]⁻¹ = [[P⁻¹,0],[−Q⁻¹CP⁻¹,Q⁻¹]]`, from tiles
that are inverted by doubling. Each product depends on the one before, so the time is latency. One
program of one warp inverts 64 rows in tiles of 16, whose latency is small, and many programs hide
it. A second kernel with more warps joins halves of 64 rows by two products of that size.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.bf16_split import bf16_split
from pallas_kernels.call import pallas_call
from pallas_kernels.scaling import key_scale, largest_exponent
from pallas_kernels.triangular_inverse import invert_block
from pallas_kernels.triton import tile
from pallas_kernels.triton.parts import Tile, map_parts, width

# Rows of a program of the first kernel, and of its tiles.
_ROWS, _TILE = 64, 16


@functools.partial(jax.jit, static_argnames=("rows", "multiple", "dtype", "interpret"))
def diagonal_inverses(
    k: jax.Array,
    segment_ids: jax.Array | None,
    root_beta: jax.Array | None = None,
    *,
    rows: int,
    multiple: int,
    dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns `k̃` and `A_bb⁻¹` of every block.

    Args:
      k: Keys `[B,S,K,D]`, not normalised.
      segment_ids: int32 `[B,N·R]`, or None.
      root_beta: `√β [B,K,N·R]`, float32. Given it, the blocks are those of `diag(1/β) + stril(A)`.
      rows: R, 64 or 128.
      multiple: The length is padded to a multiple of this number, which R divides.
      dtype: The dtype of `k̃`, and of the operands of the products.
      interpret: Whether to run in Pallas' interpreter.

    Returns:
      `k̃ [B,K,N·R,W]`, zero in the padding and for keys that are not finite, and the inverses as a
      sum of T terms `[B,K,N,T,R,R]`: one in float32 for a float32 `dtype`, otherwise two in
      bfloat16.
    """
    b, s, heads, d = k.shape
    length, w = pl.cdiv(s, multiple) * multiple, width(d)
    k_hat_type = jax.ShapeDtypeStruct((b, heads, length, w), dtype)
    terms, term_type = (1, jnp.float32) if dtype == jnp.float32 else (2, jnp.bfloat16)
    inverse_shape = b, heads, length // rows, terms, rows, rows
    inverse_type = jax.ShapeDtypeStruct(inverse_shape, term_type)
    # One warp can hold 64 keys of up to 256 bytes.
    warps = 1 if w * k_hat_type.dtype.itemsize <= 256 else 4
    k_hat, inverses = pallas_call(
        functools.partial(_invert, s=s, d=d, interpret=interpret),
        grid=(length // _ROWS, b, heads),
        out_shape=(k_hat_type, inverse_type),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="lucid_diagonal_inverses",
    )(k, segment_ids, root_beta)
    if rows == _ROWS:
        return k_hat, inverses
    inverses = pallas_call(
        functools.partial(_join, d=d, interpret=interpret),
        grid=(length // rows, b, heads),
        out_shape=inverse_type,
        input_output_aliases={1 if segment_ids is None else 2: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="lucid_diagonal_inverses_joined",
    )(k_hat, segment_ids, inverses)
    return k_hat, inverses


def _invert(
    k_ref,  # [B,S,K,D]
    segments_ref,  # [B,N·R] or None
    roots_ref,  # [B,K,N·R] or None
    k_hat_ref,  # [B,K,N·R,W]
    inverse_ref,  # [B,K,N,T,R,R]
    *,
    s: int,
    d: int,
    interpret: bool,
):
    program, b, h = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    dtype = k_hat_ref.dtype
    dot = functools.partial(tile.dot_split, dtype=dtype)
    total = functools.partial(functools.reduce, jnp.add)
    tiles = _ROWS // _TILE
    keys, segments = [], []
    for i in range(tiles):
        start = program * _ROWS + i * _TILE
        k = tile.load_rows(k_ref, b, start, _TILE, h, s)
        u, _, square = tile.in_range(k)
        scale = key_scale(d) * math.sqrt(d)
        k_hat = u * (scale * jax.lax.rsqrt(square))
        k_hat = map_parts(lambda x: jnp.where(square < jnp.inf, x, 0), k_hat).astype(dtype)  # noqa: B023
        tile.store_keys(k_hat_ref, b, h, start, k_hat)
        keys.append(k_hat)
        segments.append(tile.load_segments(segments_ref, b, start, _TILE))

    def gram(i: int, j: int) -> jax.Array:
        shift = largest_exponent(d)
        return tile.gram(keys[i], keys[j], segments[i], segments[j], shift, interpret)

    def invert(i: int) -> jax.Array:
        column = row = None
        if roots_ref is not None:
            start = program * _ROWS + i * _TILE
            roots = plgpu.load(roots_ref.at[b, h, pl.ds(start, _TILE)])
            column, row = roots[:, None], roots[None, :]
        return invert_block(gram(i, i), column, row, dot)

    # With β the blocks that join two inverses are still those of A.
    x = {(i, i): invert(i) for i in range(tiles)}
    half = 1
    while half < tiles:
        for first in range(0, tiles, 2 * half):
            upper, lower = range(first, first + half), range(first + half, first + 2 * half)
            c = {(i, k): gram(i, k) for i in lower for k in upper}
            for j in upper:
                cp = {i: total(dot(c[i, k], x[k, j]) for k in upper if k >= j) for i in lower}
                for i in lower:
                    x[i, j] = -total(dot(x[i, k], cp[k]) for k in lower if k <= i)
        half *= 2

    per_block = inverse_ref.shape[-1] // _ROWS
    corner = program % per_block * _ROWS
    for i in range(tiles):
        for j in range(tiles):
            at = (pl.ds(corner + t * _TILE, _TILE) for t in (i, j))
            entries = x[i, j] if j <= i else jnp.zeros((_TILE, _TILE), jnp.float32)
            _store_terms(inverse_ref, (b, h, program // per_block), tuple(at), entries)


def _join(
    k_hat_ref,  # [B,K,N·R,W]
    segments_ref,  # [B,N·R] or None
    _,  # [B,K,N,T,R,R], the inverses as an input that aliases the output
    inverse_ref,  # [B,K,N,T,R,R], R = 128; halves already inverted
    *,
    d: int,
    interpret: bool,
):
    block, b, h = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    dot = functools.partial(tile.dot_split, dtype=k_hat_ref.dtype)

    def part(row: int, column: int):
        return pl.ds(row, _ROWS), pl.ds(column, _ROWS)

    def store(row: int, column: int, entries: jax.Array) -> None:
        _store_terms(inverse_ref, (b, h, block), part(row, column), entries)

    def load(start: int) -> tuple[Tile, jax.Array | None, jax.Array]:
        row = block * 2 * _ROWS + start
        keys = tile.load_keys(k_hat_ref, b, h, row, _ROWS)
        inverse = functools.reduce(
            jnp.add,
            (
                plgpu.load(at).astype(jnp.float32)
                for at in _terms_at(inverse_ref, (b, h, block), part(start, start))
            ),
        )
        return keys, tile.load_segments(segments_ref, b, row, _ROWS), inverse

    (k_upper, segments_upper, p), (k_lower, segments_lower, q) = load(0), load(_ROWS)
    shift = largest_exponent(d)
    c = tile.gram(k_lower, k_upper, segments_lower, segments_upper, shift, interpret)
    store(_ROWS, 0, -dot(q, dot(c, p)))
    store(0, _ROWS, jnp.zeros_like(p))


def _store_terms(ref, block, at, entries: jax.Array) -> None:
    """Stores float32 entries of an inverse as the terms of `[B,K,N,T,R,R]`."""
    terms = [entries] if ref.shape[3] == 1 else bf16_split(entries, ref.shape[3])
    for term_at, term in zip(_terms_at(ref, block, at), terms):
        plgpu.store(term_at, term)


def _terms_at(ref, block, at) -> list:
    """Returns the terms of a part of an inverse as references."""
    # The interpreter takes traced indices only.
    return [ref.at[*block, block[0] * 0 + t, *at] for t in range(ref.shape[3])]
