"""Attention of one new token to a KV cache, split over the cache (flash-decoding), in two kernels.

The first kernel has one program for each part of the cache. A program multiplies G query rows
and, for LUCID, the new key as one more row with the keys of the part. The query rows have a
running maximum. The maximum of the key's row is always 0, which its exponents never exceed. All
rows then share one product with the values of the part. The second kernel adds up the parts and
the new token's own contribution, and writes the new token into the cache in place.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.call import pallas_call
from pallas_kernels.scaling import largest_exponent, select_range
from pallas_kernels.triton import tile
from pallas_kernels.triton.parts import single_width

_LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class Splits:
    """The split of a cache into parts and tiles.

    Attributes:
      count: N, the number of parts of the valid tokens of every sequence; a power of two.
      columns: C, the keys of a tile; a power of two of at least 16.
      warps: Warps of a program.
      stages: Tiles in flight in the software pipeline.
    """

    count: int
    columns: int
    warps: int
    stages: int


def partial_sums(
    q: jax.Array,
    k: jax.Array,
    cached_k: jax.Array,
    cached_y: jax.Array,
    inverse_norms: jax.Array | None,
    length: jax.Array,
    *,
    scale: float,
    splits: Splits,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the sums over each part of the cache for M rows.

    M is G + 1 with `inverse_norms` (LUCID attention) and G without.

    Args:
      q: Queries `[B,K,G,D]`.
      k: The new key `[B,K,D]`.
      cached_k: `[B,K,P,D]`.
      cached_y: `[B,K,P,D]`.
      inverse_norms: `1/‖k‖` of the cached keys, float32 `[B,K,P]`, or None.
      length: int32 `[B]`, the number of valid tokens.
      scale: Factor of the logits s, which are exponents of 2.
      splits: Parts and tiles.
      interpret: Whether to run in Pallas' interpreter.

    Returns:
      float32: the largest logit `[B,K,N,M]`, `Σ 2^(s − largest)` `[B,K,N,M]`, and
      `Σ 2^(s − largest) y` `[B,K,N,M,D]`. In row G the largest logit counts as 0.
    """
    b, heads, group, d = q.shape
    m = group + (inverse_norms is not None)
    shape = b, heads, splits.count, m
    return pallas_call(
        functools.partial(_sum_part, scale=scale, splits=splits, interpret=interpret),
        grid=(splits.count, heads, b),
        out_shape=tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, shape, (*shape, d))),
        compiler_params=plgpu.CompilerParams(num_warps=splits.warps, num_stages=splits.stages),
        interpret=interpret,
        name="lucid_decode",
    )(q, k, cached_k, cached_y, inverse_norms, length)


def _sum_part(
    # Inputs.
    q_ref,  # [B,K,G,D]
    k_ref,  # [B,K,D]
    cached_k_ref,  # [B,K,P,D]
    cached_y_ref,  # [B,K,P,D]
    norms_ref,  # [B,K,P] or None
    length_ref,  # [B]
    # Outputs.
    largest_ref,  # [B,K,N,M]
    norm_ref,  # [B,K,N,M]
    total_ref,  # [B,K,N,M,D]
    # Static.
    *,
    scale: float,
    splits: Splits,
    interpret: bool,
):
    part, h, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    group, d = q_ref.shape[2:]
    m, c, dtype = total_ref.shape[3], splits.columns, q_ref.dtype
    r, w = max(16, pl.next_power_of_2(m)), single_width(d)
    row, lane = jnp.arange(r), jnp.arange(w)
    # A traced start, because jax rejects a constant one with masked elements beyond the end.
    zero = b * 0

    q_mask = (row < group)[:, None] & (lane < d)[None, :]
    rows = plgpu.load(q_ref.at[b, h, pl.ds(zero, r), pl.ds(zero, w)], mask=q_mask, other=0)
    if norms_ref is not None:
        k = plgpu.load(k_ref.at[b, h, pl.ds(zero, w)], mask=lane < d, other=0)
        inverse_norm = _inverse_norm(k)
        # A factor that keeps the bits of the key, so that the product with a huge key is finite.
        factor = _power_of_two(inverse_norm)
        row_k = (k.astype(jnp.float32) * factor).astype(dtype)
        rows = jnp.where((row == group)[:, None], row_k[None, :], rows)
        key_scale = largest_exponent(d) * (inverse_norm / jnp.where(factor == 0, 1.0, factor))

    length = plgpu.load(length_ref.at[b])
    per_part = pl.cdiv(pl.cdiv(length, c), splits.count) * c
    first = part * per_part
    end = jnp.minimum(first + per_part, length)

    def visit(t, carry):
        largest, norm, total = carry
        start = first + t * c
        inside = start + jnp.arange(c) < end
        at = (b, h, pl.ds(start, c), pl.ds(zero, w))
        mask = inside[:, None] & (lane < d)[None, :]
        k_j = plgpu.load(cached_k_ref.at[at], mask=mask, other=0)
        dots = tile.dot_rows(rows, k_j)
        logits = _finite(dots * scale)
        if norms_ref is not None:
            norms = plgpu.load(norms_ref.at[b, h, pl.ds(start, c)], mask=inside, other=0)
            cosines = dots * (key_scale * norms)[None, :]
            logits = jnp.where((row == group)[:, None], cosines - largest_exponent(d), logits)
        logits = jnp.where(inside[None, :], logits, _LOWEST)
        new_largest = jnp.maximum(largest, jnp.max(logits, 1))
        weights = jnp.where(inside[None, :], jnp.exp2(logits - new_largest[:, None]), 0.0)
        decay = jnp.exp2(largest - new_largest)
        y_j = plgpu.load(cached_y_ref.at[at], mask=mask, other=0)
        total = total * decay[:, None] + tile.dot(weights.astype(dtype), y_j)
        return new_largest, norm * decay + jnp.sum(weights, 1), total

    largest = jnp.where(row == group, 0.0, jnp.full(r, _LOWEST, jnp.float32))
    nothing = jnp.zeros(r, jnp.float32), jnp.zeros((r, w), jnp.float32)
    tiles = pl.cdiv(jnp.maximum(end - first, 0), c)
    largest, norm, total = jax.lax.fori_loop(0, tiles, visit, (largest, *nothing))

    at = (b, h, part, pl.ds(zero, r))
    for ref, x in ((largest_ref, largest), (norm_ref, norm)):
        plgpu.store(ref.at[at], x, mask=row < m)
    mask = (row < m)[:, None] & (lane < d)[None, :]
    plgpu.store(total_ref.at[(*at, pl.ds(zero, w))], total, mask=mask)


def finish(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array | None,
    cached_k: jax.Array,
    cached_y: jax.Array,
    inverse_norms: jax.Array | None,
    length: jax.Array,
    largest: jax.Array,
    norm: jax.Array,
    total: jax.Array,
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Returns the output, and the cache with the new token.

    Args:
      q: Queries `[B,K,G,D]`.
      k: The new key `[B,K,D]`.
      v: The new value `[B,K,D]`.
      beta: float32 `[B,K]`, or None for 1.
      cached_k: `[B,K,P,D]`.
      cached_y: `[B,K,P,D]`.
      inverse_norms: float32 `[B,K,P]`, or None.
      length: int32 `[B]`, the position to write the token to; nothing is written at P.
      largest: The first result of `partial_sums`.
      norm: The second result of `partial_sums`.
      total: The third result of `partial_sums`.
      scale: Factor of the logits.
      interpret: Whether to run in Pallas' interpreter.

    Returns:
      `o [B,K,G,D]` in the dtype of `q`, then `cached_k`, `cached_y` and `inverse_norms`, in place
      where the caller donates them.
    """
    b, heads, group, d = q.shape
    # Sixteen numbers of the parts of a row for each thread: sums within a warp need no barrier.
    warps = max(1, min(8, largest.shape[2] * single_width(d) // 512))
    cache = (cached_k, cached_y, *(() if inverse_norms is None else (inverse_norms,)))
    o, *cache = pallas_call(
        functools.partial(_finish, scale=scale, cached=len(cache)),
        grid=(group, heads, b),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, *cache)),
        input_output_aliases={7 + (beta is not None) + i: 1 + i for i in range(len(cache))},
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="lucid_decode_finish",
    )(q, k, v, beta, length, largest, norm, total, *cache)
    return o, cache[0], cache[1], cache[2] if inverse_norms is not None else None


def _finish(
    # Inputs.
    q_ref,  # [B,K,G,D]
    k_ref,  # [B,K,D]
    v_ref,  # [B,K,D]
    beta_ref,  # [B,K] or None
    length_ref,  # [B]
    largest_ref,  # [B,K,N,M]
    norm_ref,  # [B,K,N,M]
    total_ref,  # [B,K,N,M,D]
    # The cache as inputs, then the outputs: o [B,K,G,D] and the cache.
    *cache_refs,
    # Static.
    scale: float,
    cached: int,
):
    g, h, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    o_ref, k_out_ref, y_out_ref, *norms_out_ref = cache_refs[cached:]
    parts, group, d = total_ref.shape[2], q_ref.shape[2], q_ref.shape[3]
    w, zero = single_width(d), b * 0
    inside = jnp.arange(w) < d
    lanes = pl.ds(zero, w)

    def load(ref, *at):
        return plgpu.load(ref.at[(*at, lanes)], mask=inside, other=0)

    def load_parts(row):
        at = total_ref.at[b, h, pl.ds(0, parts), row, lanes]
        mask = jnp.broadcast_to(inside[None, :], (parts, w))
        return plgpu.load(at, mask=mask, other=0)

    q, k, v = load(q_ref, b, h, g), load(k_ref, b, h), load(v_ref, b, h)
    y = v
    if norms_out_ref:
        update = jnp.sum(load_parts(group + zero), 0)
        y = v.astype(jnp.float32) - update
        if beta_ref is not None:
            y = plgpu.load(beta_ref.at[b, h]) * y
        # Rounded first, because the softmax of a whole sequence reads rounded values too.
        y = y.astype(v.dtype)
    logit = _finite(scale * jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), 0))
    part_largest = plgpu.load(largest_ref.at[b, h, pl.ds(0, parts), g])
    largest = jnp.maximum(jnp.max(part_largest, 0), logit)
    decay, weight = jnp.exp2(part_largest - largest), jnp.exp2(logit - largest)
    norm = jnp.sum(decay * plgpu.load(norm_ref.at[b, h, pl.ds(0, parts), g]), 0) + weight
    total = jnp.sum(decay[:, None] * load_parts(g), 0) + weight * y.astype(jnp.float32)
    plgpu.store(o_ref.at[b, h, g, lanes], (total / norm).astype(o_ref.dtype), mask=inside)

    size = k_out_ref.shape[2]
    place = plgpu.load(length_ref.at[b])
    writes = (g == 0) & (place < size)
    place = jnp.minimum(place, size - 1)
    for ref, x in ((k_out_ref, k), (y_out_ref, y)):
        plgpu.store(ref.at[b, h, place, lanes], x, mask=inside & writes)
    for ref in norms_out_ref:
        x = jnp.broadcast_to(_inverse_norm(k), (1,))
        plgpu.store(ref.at[b, h, pl.ds(place, 1)], x, mask=jnp.broadcast_to(writes, (1,)))


def _finite(logits: jax.Array) -> jax.Array:
    """Brings infinite logits into the range of float32, whose ends tie with each other."""
    return jnp.clip(logits, _LOWEST, -_LOWEST)


def _inverse_norm(k: jax.Array) -> jax.Array:
    """Returns `1/‖k‖` of a key `[W]` in float32, 0 where that is not a normal number."""
    k = k.astype(jnp.float32)

    def rescaled():
        scale = select_range(jnp.max(jnp.abs(k), 0), jnp.float32(1))
        inverse = scale * jax.lax.rsqrt(jnp.sum(jnp.square(k * scale), 0))
        return jnp.where((inverse >= 2.0**-126) & (inverse < 2.0**126), inverse, 0.0)

    # A program computes this before it loads its first keys, so every reduction costs latency.
    square = jnp.sum(jnp.square(k), 0)
    safe = (square > 2.0**-80) & (square < 2.0**127)
    return jax.lax.cond(safe, lambda: jax.lax.rsqrt(square), rescaled)


def _power_of_two(x: jax.Array) -> jax.Array:
    """Rounds float32 `x ≥ 0` down to a power of two, and 0 to 0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(0x7F800000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
