"""The key Gram matrix: its normalised keys, its tiles, and the inverses of its diagonal.

`A_ij = exp(k̂_i·k̂_j/√D − √D)` below the diagonal, 1 on it, 0 above and between
segments, with `k̂ = k·√D/‖k‖₂` (arXiv 2602.10410). Every backend takes the
definitions here, so that they differ in schedule only.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import same_segment

# Substitution handles blocks this small; halves above it are matrix products.
_BASE = 16


def accumulator_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """float64 for float64 operands, float32 for all narrower ones."""
    return jnp.promote_types(dtype, jnp.float32)


def normalize_keys(k: jax.Array) -> jax.Array:
    """`k̂ = k·√D/‖k‖₂` over the last axis, in the accumulator dtype.

    A zero key stays zero and passes no gradient back. The largest entry is divided
    out first, so that neither a huge nor a tiny key overflows in the square; `k̂`
    does not depend on that factor, hence no gradient flows through it.
    """
    k = k.astype(accumulator_dtype(k.dtype))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(k), -1, keepdims=True))
    zero = largest == 0
    u = jnp.where(zero, 1, k / jnp.where(zero, 1, largest))
    k_hat = u * (math.sqrt(k.shape[-1]) * jax.lax.rsqrt(jnp.sum(u * u, -1, keepdims=True)))
    return jnp.where(zero, 0, k_hat)


def gram_tile(
    rows: jax.Array,
    columns: jax.Array,
    row_segments: jax.Array | None,
    column_segments: jax.Array | None,
    precision: jax.lax.Precision | None,
) -> jax.Array:
    """`exp(k̂_i·k̂_j/√D − √D)` within segments, without a causal mask.

    Args:
      rows: Normalised keys `[B,K,R,D]` in the compute dtype.
      columns: Normalised keys `[B,K,C,D]`.
      row_segments: int32 `[B,R]` or None.
      column_segments: int32 `[B,C]` or None.
      precision: Of the product.

    Returns:
      `[B,K,R,C]` in the accumulator dtype.
    """
    root = math.sqrt(rows.shape[-1])
    dots = jnp.einsum(
        "bkrd,bkcd->bkrc",
        rows,
        columns,
        precision=precision,
        preferred_element_type=accumulator_dtype(rows.dtype),
    )
    tile = jnp.exp(dots / root - root)
    mask = same_segment(row_segments, column_segments)
    return tile if mask is None else jnp.where(mask, tile, 0)


def invert_unit_lower(a: jax.Array) -> jax.Array:
    """Inverses of unit lower triangular matrices, batched, in full precision.

    Recursive halves: `[[P,0],[C,Q]]⁻¹ = [[P⁻¹,0],[−Q⁻¹CP⁻¹,Q⁻¹]]`, all blocks of one
    size at once, from a small base by substitution. For diagonal blocks of `A` every
    entry of the result is at most 2 (`‖A⁻¹‖₂ ≤ 2`), at any size; the Neumann product
    `(I−N)(I+N²)…` has no such bound and overflows for correlated keys.

    Args:
      a: `[..., R, R]`, float32 or float64. Only the strictly lower part is read.

    Returns:
      `[..., R, R]`, exactly zero above the diagonal and one on it.
    """
    *batch, size, _ = a.shape
    doublings = max(0, math.ceil(math.log2(size / _BASE)))
    padded = _BASE << doublings
    a = jnp.pad(a, [(0, 0)] * len(batch) + [(0, padded - size)] * 2)

    def blocks(n: int, row: int, column: int) -> jax.Array:
        """The `n`×`n` blocks at (row, column) of each diagonal block of `2n` (or `n`)."""
        per = 1 if row == column else 2
        count = padded // (per * n)
        tiles = a.reshape(*batch, count, per, n, count, per, n)[..., row, :, :, column, :]
        return jnp.moveaxis(jnp.diagonal(tiles, axis1=-4, axis2=-2), -1, -3)

    base = blocks(_BASE, 0, 0)
    rows = [jnp.broadcast_to(jnp.eye(_BASE, dtype=a.dtype)[0], (*base.shape[:-2], _BASE))]
    for i in range(1, _BASE):
        # Row i of the inverse is e_i minus the solved rows, weighted by row i of A.
        solved = jnp.stack(rows, -2)
        update = jnp.sum(base[..., i, :i, None] * solved, -2)
        rows.append(jnp.eye(_BASE, dtype=a.dtype)[i] - update)
    inverse = jnp.stack(rows, -2)

    highest = jax.lax.Precision.HIGHEST
    for level in range(doublings):
        n = _BASE << level
        p, q = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = jnp.matmul(blocks(n, 1, 0), p, precision=highest)
        corner = -jnp.matmul(q, corner, precision=highest)
        upper = jnp.concatenate([p, jnp.zeros_like(p)], -1)
        lower = jnp.concatenate([corner, q], -1)
        inverse = jnp.concatenate([upper, lower], -2)
    return inverse[..., 0, :size, :size]


def diagonal_inverses(
    k_hat: jax.Array,
    segment_ids: jax.Array | None,
    block: int,
    precision: jax.lax.Precision | None = None,
) -> jax.Array:
    """`A_bb⁻¹` of every diagonal block, all blocks and heads in one batch.

    Args:
      k_hat: Normalised keys `[B,K,S,D]` in the compute dtype, S a multiple of `block`.
      segment_ids: int32 `[B,S]` or None.
      block: Rows of a block, R.
      precision: Of the product of keys; the inversion itself is always full.

    Returns:
      `[B,K,S/R,R,R]` in the accumulator dtype.
    """
    b, heads, s, d = k_hat.shape
    n = s // block
    # Blocks become batch rows, so that the tile's own code serves.
    tiles = k_hat.reshape(b, heads, n, block, d).swapaxes(1, 2).reshape(b * n, heads, block, d)
    segments = None if segment_ids is None else segment_ids.reshape(b * n, block)
    inverse = invert_unit_lower(gram_tile(tiles, tiles, segments, segments, precision))
    return inverse.reshape(b, n, heads, block, block).swapaxes(1, 2)
