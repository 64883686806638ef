"""The gradients of `attention`, which compute the weights again from the saved maxima and norms.

One kernel is parallel in queries, the other in keys, so that neither needs atomics and both are
bitwise reproducible. With the weights `P`, `P̄ = ō vᵀ` and `δ_i = o_i·ō_i`:

    L̄ = P ∘ (P̄ − δ),  q̄ = scale·L̄ k,  k̄ = scale·L̄ᵀ q,  v̄ = Pᵀ ō

Products with `L̄` and `P` are masked, not their factors: zero times NaN would pass a NaN on to
another document.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.call import pallas_call
from pallas_kernels.scaling import LOG2E
from pallas_kernels.triton import tile
from pallas_kernels.triton.attention import Visible
from pallas_kernels.triton.parts import zero_tile
from pallas_kernels.triton.tiles import Tiles


@functools.partial(jax.jit, static_argnames=("scale", "tiles", "interpret"))
def query_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    visible: Visible | None,
    o: jax.Array,
    o_bar: jax.Array,
    largest: jax.Array,
    inverse: jax.Array,
    *,
    scale: float,
    tiles: Tiles,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns `q̄ [B,S,H,D]` and `δ`, float32 `[B,H,N·R]`.

    Args:
      q, k, v, segment_ids, visible, scale, tiles, interpret: As in `attention.attend`.
      o: The result `[B,S,H,D]`.
      o_bar: Its cotangent.
      largest: The maxima that `attend` returned.
      inverse: One over the norms that it returned.
    """
    b, s, heads, _ = q.shape
    return pallas_call(
        functools.partial(_query_kernel, scale=scale, tiles=tiles, interpret=interpret),
        grid=(heads, pl.cdiv(s, tiles.rows), b),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), largest),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="lucid_attention_query_gradient",
    )(q, k, v, segment_ids, *(visible or [None] * 3), o, o_bar, largest, inverse)


@functools.partial(jax.jit, static_argnames=("scale", "tiles", "interpret"))
def key_value_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    visible: Visible | None,
    o_bar: jax.Array,
    largest: jax.Array,
    inverse: jax.Array,
    delta: jax.Array,
    *,
    scale: float,
    tiles: Tiles,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns `k̄` and `v̄ [B,S,K,D]`.

    Args:
      q, k, v, segment_ids, o_bar, largest, inverse, scale, tiles, interpret: As in
        `query_gradient`, but the rows of tiles are keys.
      visible: The tokens that see blocks of R keys, or None.
      delta: The `δ` that `query_gradient` returned.
    """
    b, s, heads, _ = k.shape
    return pallas_call(
        functools.partial(_key_kernel, scale=scale, tiles=tiles, interpret=interpret),
        grid=(heads, pl.cdiv(s, tiles.rows), b),
        out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="lucid_attention_key_gradient",
    )(q, k, v, segment_ids, *(visible or [None] * 3), o_bar, largest, inverse, delta)


def _query_kernel(
    # Inputs.
    q_ref,  # [B,S,H,D]
    k_ref,  # [B,S,K,D]
    v_ref,  # [B,S,K,D]
    segments_ref,  # [B,N·R] or None
    start_ref,  # [B,N] or None
    unmasked_ref,  # [B,N] or None
    size_ref,  # [B,N] or None
    o_ref,  # [B,S,H,D]
    o_bar_ref,  # [B,S,H,D]
    largest_ref,  # [B,H,N·R]
    inverse_ref,  # [B,H,N·R]
    # Outputs.
    q_bar_ref,  # [B,S,H,D]
    delta_ref,  # [B,H,N·R]
    # Static.
    *,
    scale: float,
    tiles: Tiles,
    interpret: bool,
):
    h, b = pl.program_id(0), pl.program_id(2)
    # The last blocks have the most keys, so they start first.
    block = pl.num_programs(1) - 1 - pl.program_id(1)
    length, heads, d = q_ref.shape[1:]
    kv = h // (heads // k_ref.shape[2])
    r, c, dtype = tiles.rows, tiles.columns, q_ref.dtype
    row = block * r
    s = None if length % r == 0 else length
    q_i, o_i, o_bar_i = (tile.load_rows(ref, b, row, r, h, s) for ref in (q_ref, o_ref, o_bar_ref))
    segments_i = tile.load_segments(segments_ref, b, row, r)
    largest, inverse = (
        plgpu.load(ref.at[b, h, pl.ds(row, r)]) for ref in (largest_ref, inverse_ref)
    )
    delta = tile.sum_of_rows(o_i.astype(jnp.float32) * o_bar_i.astype(jnp.float32))[:, 0]
    plgpu.store(delta_ref.at[b, h, pl.ds(row, r)], delta)

    def visit(t, total, *, masked: bool):
        start = t * c
        k_j, v_j = (tile.load_rows(ref, b, start, c, kv, s) for ref in (k_ref, v_ref))
        logits = tile.dot_rows(q_i, k_j)
        exponents = tile.exponents(logits, largest[:, None], scale * LOG2E, dtype)
        weights = tile.exp2(exponents, dtype, interpret, bounded=False) * inverse[:, None]
        weights_bar = tile.dot_rows(o_bar_i, v_j)
        logits_bar = weights * (weights_bar - delta[:, None])
        if masked:
            segments_j = tile.load_segments(segments_ref, b, start, c)
            sees = tile.sees(row, start, segments_i, segments_j, r, c)
            logits_bar = jnp.where(sees, logits_bar, 0)
        return total + tile.dot(logits_bar.astype(dtype), k_j)

    masked = functools.partial(visit, masked=True)
    unmasked = functools.partial(visit, masked=False)
    total, own = zero_tile(r, d), row // c
    if segments_ref is None:
        total = jax.lax.fori_loop(0, own, unmasked, total)
    else:
        start, first, size = (
            plgpu.load(ref.at[b, block]) for ref in (start_ref, unmasked_ref, size_ref)
        )
        first = (first + c - 1) // c
        total = jax.lax.fori_loop(start // c, first, masked, total)
        total = jax.lax.fori_loop(first, own, unmasked, total)
        total = tile.keep_rows(total, 0, 0, size)
    total = jax.lax.fori_loop(own, own + r // c, masked, total)
    tile.store_rows(q_bar_ref, b, row, r, h, total * scale, s)


def _key_kernel(
    # Inputs.
    q_ref,  # [B,S,H,D]
    k_ref,  # [B,S,K,D]
    v_ref,  # [B,S,K,D]
    segments_ref,  # [B,N·R] or None
    end_ref,  # [B,N] or None
    unmasked_ref,  # [B,N] or None
    size_ref,  # [B,N] or None
    o_bar_ref,  # [B,S,H,D]
    largest_ref,  # [B,H,N·R]
    inverse_ref,  # [B,H,N·R]
    delta_ref,  # [B,H,N·R]
    # Outputs.
    k_bar_ref,  # [B,S,K,D]
    v_bar_ref,  # [B,S,K,D]
    # Static.
    *,
    scale: float,
    tiles: Tiles,
    interpret: bool,
):
    kv, block, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    length, heads, d = q_ref.shape[1:]
    group = heads // k_ref.shape[2]
    r, c, dtype = tiles.rows, tiles.columns, q_ref.dtype
    row = block * r
    s = None if length % r == 0 else length
    k_i, v_i = (tile.load_rows(ref, b, row, r, kv, s) for ref in (k_ref, v_ref))
    segments_i = tile.load_segments(segments_ref, b, row, r)

    def visit(first, n, totals, *, masked: bool):
        """Visits the `n`-th pair of a tile of queries, from tile `first` on, and a query head."""
        k_bar, v_bar = totals
        t, h = tile.divide(n, group)
        start, h = (first + t) * c, kv * group + h
        q_j, o_bar_j = (tile.load_rows(ref, b, start, c, h, s) for ref in (q_ref, o_bar_ref))
        largest, inverse, delta = (
            plgpu.load(ref.at[b, h, pl.ds(start, c)])[None, :]
            for ref in (largest_ref, inverse_ref, delta_ref)
        )
        # Rounded otherwise than in the forward pass, a large logit would differ from the maximum
        # that it is.
        logits = tile.dot_rows_mirrored(k_i, q_j)
        exponents = tile.exponents(logits, largest, scale * LOG2E, dtype)
        weights = tile.exp2(exponents, dtype, interpret, bounded=False) * inverse
        weights_bar = tile.dot_rows(v_i, o_bar_j)
        logits_bar = weights * (weights_bar - delta)
        if masked:
            segments_j = tile.load_segments(segments_ref, b, start, c)
            seen = tile.sees(row, start, segments_i, segments_j, r, c, transposed=True)
            weights, logits_bar = (jnp.where(seen, x, 0) for x in (weights, logits_bar))
        v_bar += tile.dot(weights.astype(dtype), o_bar_j)
        k_bar += tile.dot(logits_bar.astype(dtype), q_j)
        return k_bar, v_bar

    def sweep(first, end, totals, *, masked: bool):
        body = functools.partial(visit, first, masked=masked)
        return jax.lax.fori_loop(0, (end - first) * group, body, totals)

    totals = (zero_tile(r, d),) * 2
    own, own_end = row // c, (row + r) // c
    if segments_ref is None:
        totals = sweep(own_end, (length + c - 1) // c, totals, masked=False)
    else:
        end, unmasked, size = (
            plgpu.load(ref.at[b, block]) for ref in (end_ref, unmasked_ref, size_ref)
        )
        totals = sweep(own_end, unmasked // c, totals, masked=False)
        totals = sweep(unmasked // c, (end + c - 1) // c, totals, masked=True)
        k_bar, v_bar = (tile.keep_rows(x, 0, r - size, r) for x in totals)
        totals = k_bar, v_bar
    k_bar, v_bar = sweep(own, own_end, totals, masked=True)
    tile.store_rows(k_bar_ref, b, row, r, kv, k_bar * scale, s)
    tile.store_rows(v_bar_ref, b, row, r, kv, v_bar, s)
