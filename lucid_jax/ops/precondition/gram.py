"""The key Gram matrix `A`: normalised keys, tiles of `A`, and inverses of its diagonal blocks.

`A_ij = exp(k̂_i·k̂_j/√D − √D)` below the diagonal, 1 on it, 0 above and between
segments, with `k̂ = k·√D/‖k‖₂` (arXiv 2602.10410). All backends use these definitions,
so that they differ in schedule only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import heads_first, pad_axis, same_segment, take
from lucid_jax.ops.numerics import accumulator_dtype, product
from lucid_jax.ops.precondition import beta as learnt_beta
from pallas_kernels.scaling import select_range

# Blocks of this size are inverted by substitution, larger ones by products of their halves.
_BASE = 16


def normalize_keys(k: jax.Array) -> jax.Array:
    """Returns `k̂ = k·√D/‖k‖₂` over the last axis, in the accumulator dtype.

    A zero key stays zero and passes no gradient back. No square of any other key overflows or
    underflows. CPUs and TPUs read subnormal entries as zero.
    """
    u, _ = _in_range(k)
    square = jax.lax.stop_gradient(jnp.sum(u * u, -1, keepdims=True))
    zero = square == 0
    # A norm near 1 keeps the third power in the derivative of the root in range.
    inverse = jax.lax.rsqrt(jnp.where(zero, 1, square))
    u *= jax.lax.reduce_precision(inverse, jnp.finfo(u.dtype).nexp, 0)
    square = jnp.where(zero, 1, jnp.sum(u * u, -1, keepdims=True))
    return jnp.where(zero, 0, u * (math.sqrt(k.shape[-1]) * jax.lax.rsqrt(square)))


def inverse_norms(k: jax.Array) -> jax.Array:
    """Returns `1/‖k‖₂` over the last axis, in the accumulator dtype.

    It is 0 for a zero key, and for a key whose inverse norm would be subnormal or infinite.
    """
    u, scale = _in_range(k)
    square = jnp.sum(u * u, -1)
    inverse = scale[..., 0] * jax.lax.rsqrt(square)
    limits = jnp.finfo(inverse.dtype)
    return jnp.where((inverse >= limits.smallest_normal) & (inverse < limits.max / 4), inverse, 0)


def _in_range(k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns keys whose squares are normal numbers, and the factor `[…,1]` that makes them so."""
    k = k.astype(accumulator_dtype(k.dtype))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(k), -1, keepdims=True))
    # Products are selected, not factors: XLA may take a factor out of the sum of squares.
    return select_range(largest, k), select_range(largest, jnp.ones_like(largest))


def key_gradient(k: jax.Array, k_hat_bar: jax.Array) -> jax.Array:
    """Pulls `k̂̄` back through the normalisation: `k̄`, shape and dtype of `k`."""
    k_hat, pull_back = jax.vjp(normalize_keys, k)
    return pull_back(k_hat_bar.astype(k_hat.dtype))[0]


class Keys(NamedTuple):
    """Normalised keys: the rows or the columns of `A`.

    Attributes:
      k_hat: Normalised keys `[B,K,S,D]` in the compute dtype.
      segment_ids: int32 `[B,S]`, or None for one segment.
      root_beta: `√β [B,K,S]` in the accumulator dtype, or None for 1; the rectangles of `A` do not
        depend on it.
    """

    k_hat: jax.Array
    segment_ids: jax.Array | None
    root_beta: jax.Array | None = None

    @classmethod
    def normalize(
        cls,
        k: jax.Array,
        segment_ids: jax.Array | None,
        multiple: int,
        beta: jax.Array | None = None,
    ) -> Keys:
        """Normalises keys `[B,S,K,D]`, and pads S with zeros to a multiple; β is `[B,S,K]`."""
        k_hat = heads_first(normalize_keys(k).astype(k.dtype), multiple)
        if segment_ids is not None:
            segment_ids = pad_axis(segment_ids, 1, k_hat.shape[2])
        return cls(k_hat, segment_ids, learnt_beta.roots(beta, multiple))

    @property
    def length(self) -> int:
        """The number of keys, S."""
        return self.k_hat.shape[2]

    def take(self, start: jax.Array | int, size: int) -> Keys:
        """Returns `size` keys from `start`."""
        segments, roots = self.segment_ids, self.root_beta
        return Keys(
            take(self.k_hat, start, size),
            None if segments is None else take(segments, start, size, axis=1),
            None if roots is None else take(roots, start, size, axis=2),
        )

    def slice(self, keys: slice) -> Keys:
        """Returns a static slice of the keys."""
        segments, roots = self.segment_ids, self.root_beta
        return Keys(
            self.k_hat[:, :, keys],
            None if segments is None else segments[:, keys],
            None if roots is None else roots[:, :, keys],
        )

    def align(self, x: jax.Array) -> jax.Array:
        """Turns values `[B,S,K,D]` of these keys into `[B,K,S',D]`, padded as the keys are."""
        return pad_axis(x, 1, self.length).swapaxes(1, 2)

    def flip(self) -> Keys:
        """Returns the keys in reverse order."""
        return self.slice(slice(None, None, -1))


def gram_tile(rows: Keys, columns: Keys, precision: jax.lax.Precision | None) -> jax.Array:
    """Computes `exp(k̂_i·k̂_j/√D − √D)` within segments, without a causal mask.

    Args:
      rows: R keys.
      columns: C keys.
      precision: Precision of the product.

    Returns:
      `[B,K,R,C]` in the accumulator dtype.
    """
    root = math.sqrt(rows.k_hat.shape[-1])
    dots = product("bkrd,bkcd->bkrc", rows.k_hat, columns.k_hat, precision)
    tile = jnp.exp(dots / root - root)
    if rows.segment_ids is None or columns.segment_ids is None:
        return tile
    return jnp.where(same_segment(rows.segment_ids, columns.segment_ids), tile, 0)


def diagonal_blocks(scores: jax.Array, d: int, segment_ids: jax.Array | None) -> jax.Array:
    """Returns the diagonal blocks of `A`, strictly lower, from the scores of normalised keys.

    Args:
      scores: `[B,K,N,R,R]`.
      d: Head width, D.
      segment_ids: int32 `[B,N·R]`, or None.
    """
    root, rows = math.sqrt(d), scores.shape[-1]
    blocks = jnp.tril(jnp.exp(scores / root - root), -1)
    if segment_ids is None:
        return blocks
    ids = segment_ids.reshape(-1, rows)
    mask = same_segment(ids, ids).reshape(scores.shape[0], 1, -1, rows, rows)
    return jnp.where(mask, blocks, 0)


def invert_unit_lower(a: jax.Array) -> jax.Array:
    """Inverts unit lower triangular matrices, batched, in full precision.

    Small blocks are inverted by substitution, then joined by recursive halves,
    `[[P,0],[C,Q]]⁻¹ = [[P⁻¹,0],[−Q⁻¹CP⁻¹,Q⁻¹]]`, all blocks of one size at once. For diagonal
    blocks of `A` every entry of the result is at most 2 (`‖A⁻¹‖₂ ≤ 2`), at any size; the
    Neumann product `(I−N)(I+N²)…` has no such bound and overflows for correlated keys.

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
        """Returns the `n`×`n` blocks at (row, column) of each diagonal block of `2n` (or `n`)."""
        per = 1 if row == column else 2
        count = padded // (per * n)
        tiles = a.reshape(*batch, count, per, n, count, per, n)[..., row, :, :, column, :]
        return jnp.moveaxis(jnp.diagonal(tiles, axis1=-4, axis2=-2), -1, -3)

    base = jnp.tril(blocks(_BASE, 0, 0), -1)
    identity = jnp.broadcast_to(jnp.eye(_BASE, dtype=a.dtype), base.shape)

    def substitute(i, inverse):
        # Row i of the inverse is e_i minus the rows above it, weighted by row i of A.
        update = jnp.sum(base[..., i, :, None] * inverse, -2)
        return inverse.at[..., i, :].add(-update)

    inverse = jax.lax.fori_loop(1, _BASE, substitute, identity)

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
    keys: Keys, block: int, precision: jax.lax.Precision | None = None
) -> jax.Array:
    """Inverts every diagonal block of `A`, all blocks and heads in one batch.

    With β they are blocks of `diag(1/β) + stril(A)`; see `triangular_inverse.invert_block`.

    Args:
      keys: S keys, S a multiple of `block`.
      block: Rows of a block, R.
      precision: Precision of the product of keys; the inversion is always in full precision.

    Returns:
      `[B,K,S/R,R,R]` in the accumulator dtype, zero in rows and columns where β is zero.
    """
    b, heads, s, d = keys.k_hat.shape
    n = s // block
    # Blocks become sequences of the batch, so that `gram_tile` serves.
    k_hat = keys.k_hat.reshape(b, heads, n, block, d).swapaxes(1, 2)
    segments = keys.segment_ids
    blocks = Keys(
        k_hat.reshape(b * n, heads, block, d),
        None if segments is None else segments.reshape(b * n, block),
    )
    a = gram_tile(blocks, blocks, precision)
    if keys.root_beta is None:
        inverse = invert_unit_lower(a)
    else:
        roots = keys.root_beta.reshape(b, heads, n, block).swapaxes(1, 2)
        scale = (roots[..., None] * roots[..., None, :]).reshape(a.shape)
        inverse = scale * invert_unit_lower(scale * a)
    return inverse.reshape(b, n, heads, block, block).swapaxes(1, 2)
