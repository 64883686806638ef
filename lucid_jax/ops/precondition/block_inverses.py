"""Inverses of large diagonal blocks of `A`, by library products.

With them a stripe is solved by a few products instead of a chain of small blocks that wait for
each other. A kernel inverts small blocks, and those are joined by halves, all at once,
`[[P,0],[C,Q]]⁻¹ = [[P⁻¹,0],[−Q⁻¹CP⁻¹,Q⁻¹]]`, with products in the compute dtype. A learnt β changes
the small blocks alone.

**Small blocks keep twice the bits of the compute dtype.** Where keys are alike, the inverses of
small blocks hold pairs of entries near 1 and −1, which cancel against the ones of `C`. The
rounding errors of such pairs have one sign, add up over all rows of a block, and appear in the
first row of the next block. For identical keys that error alone exceeds the bfloat16 tolerance.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.ops.precondition.gram import Keys
from pallas_kernels.scaling import largest_exponent


class BlockInverses(NamedTuple):
    """The inverses `A_bb⁻¹` of N blocks of R rows.

    Attributes:
      whole: `[B,K,N,R,R]`, rounded to the compute dtype.
      rest: `[B,K,N,R/r,r,r]`, the rounding errors of its diagonal blocks of r rows.
    """

    whole: jax.Array
    rest: jax.Array

    @classmethod
    def join(cls, keys: Keys, small: jax.Array, rows: int, d: int) -> BlockInverses:
        """Joins the inverses of small blocks.

        Args:
          keys: `k̃ [B,K,S,W]`, as the kernels take them.
          small: `A_bb⁻¹ [B,K,S/r,r,r]`, float32.
          rows: R, which is r times a power of two and divides S.
          d: The head width D.
        """
        b, heads, _, r, _ = small.shape
        dtype = keys.k_hat.dtype
        # Compilers may drop a cast to the compute dtype and back.
        rounded = jax.lax.reduce_precision(small, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
        whole, rest = rounded.astype(dtype), (small - rounded).astype(dtype)
        while (half := whole.shape[-1]) < rows:
            half_rest = rest.reshape(b, heads, -1, half // r, r, r)
            upper, lower = (cls(whole[:, :, i::2], half_rest[:, :, i::2]) for i in (0, 1))
            corner = upper.apply(_transposed_corner(keys, half, d), transposed=True)
            corner = -lower.apply(jnp.swapaxes(corner, -1, -2))
            top = jnp.concatenate([upper.whole, jnp.zeros_like(corner)], -1)
            whole = jnp.concatenate([top, jnp.concatenate([corner, lower.whole], -1)], -2)
        return cls(whole, rest.reshape(b, heads, -1, rows // r, r, r))

    def apply(self, x: jax.Array, *, transposed: bool = False) -> jax.Array:
        """Multiplies `A_bb⁻¹ x` or `A_bb⁻ᵀ x`, with `x [B,K,N,R,M]` in the compute dtype."""
        product = "...ji,...jm->...im" if transposed else "...ij,...jm->...im"
        blocks = x.reshape(*self.rest.shape[:-1], x.shape[-1])
        rest = jnp.einsum(product, self.rest, blocks).reshape(x.shape)
        return jnp.einsum(product, self.whole, x) + rest


def _transposed_corner(keys: Keys, half: int, d: int) -> jax.Array:
    """Computes `Cᵀ [B,K,N,half,half]` between the halves of every block, in the compute dtype."""
    k_hat, ids = keys.k_hat, keys.segment_ids
    halves = k_hat.reshape(*k_hat.shape[:2], -1, 2, half, k_hat.shape[-1])
    exponents = jnp.einsum(
        "bknrw,bkncw->bknrc",
        halves[:, :, :, 0],
        halves[:, :, :, 1],
        preferred_element_type=jnp.float32,
    )
    a = jnp.exp2(exponents - largest_exponent(d))
    if ids is not None:
        ids = ids.reshape(ids.shape[0], 1, -1, 2, half)
        a = jnp.where(ids[:, :, :, 0, :, None] == ids[:, :, :, 1, None, :], a, 0)
    return a.astype(k_hat.dtype)
