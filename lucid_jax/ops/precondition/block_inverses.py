"""Inverses of large diagonal blocks of `A`, by library products.

By them a stripe of rows is a few products instead of a chain of small blocks that wait for each
other. Small blocks come inverted from a kernel and are joined by halves, all at once,
`[[P,0],[C,Q]]⁻¹ = [[P⁻¹,0],[−Q⁻¹CP⁻¹,Q⁻¹]]`, with products in the compute dtype.

Small blocks keep twice its bits. Where keys are alike, their inverses hold pairs of entries
near 1 and −1, which the ones of `C` cancel; what rounding would leave of them has one sign, adds
up over all rows of a block, and comes out in the first row of the next. For identical keys that
alone is more than bfloat16 may be off by.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.ops.precondition.gram import Keys
from pallas_kernels.scaling import largest_exponent


class BlockInverses(NamedTuple):
    """`A_bb⁻¹` of N blocks of R rows.

    Attributes:
      whole: `[B,K,N,R,R]` in the compute dtype.
      rest: `[B,K,N,R/r,r,r]`, what rounding took off its diagonal blocks of r rows.
    """

    whole: jax.Array
    rest: jax.Array

    @classmethod
    def join(cls, keys: Keys, small: jax.Array, rows: int, d: int) -> BlockInverses:
        """From the inverses of small blocks.

        Args:
          keys: `k̃ [B,K,S,W]`, as the kernels take them.
          small: `A_bb⁻¹ [B,K,S/r,r,r]`, float32.
          rows: R, r times a power of two; divides S.
          d: D.
        """
        b, heads, _, r, _ = small.shape
        dtype = keys.k_hat.dtype
        # Not a cast there and back, which compilers may drop.
        rounded = jax.lax.reduce_precision(small, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
        whole, rest = rounded.astype(dtype), (small - rounded).astype(dtype)
        while (half := whole.shape[-1]) < rows:
            of_half = rest.reshape(b, heads, -1, half // r, r, r)
            upper, lower = (cls(whole[:, :, i::2], of_half[:, :, i::2]) for i in (0, 1))
            corner = upper.apply(_right_of_corner(keys, half, d), transposed=True)
            corner = -lower.apply(jnp.swapaxes(corner, -1, -2))
            top = jnp.concatenate([upper.whole, jnp.zeros_like(corner)], -1)
            whole = jnp.concatenate([top, jnp.concatenate([corner, lower.whole], -1)], -2)
        return cls(whole, rest.reshape(b, heads, -1, rows // r, r, r))

    def apply(self, x: jax.Array, *, transposed: bool = False) -> jax.Array:
        """`A_bb⁻¹ x` or `A_bb⁻ᵀ x`, from `x [B,K,N,R,M]` in the compute dtype."""
        product = "...ji,...jm->...im" if transposed else "...ij,...jm->...im"
        blocks = x.reshape(*self.rest.shape[:-1], x.shape[-1])
        rest = jnp.einsum(product, self.rest, blocks).reshape(x.shape)
        return jnp.einsum(product, self.whole, x) + rest


def _right_of_corner(keys: Keys, half: int, d: int) -> jax.Array:
    """`Cᵀ [B,K,N,half,half]` of the two halves of every block, in the compute dtype."""
    k_hat, ids = keys
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
