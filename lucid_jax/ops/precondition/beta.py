"""The learnt β of a token: the system `(diag(1/β) + stril(A)) y = v` for any β in [0, 1].

It differs from `A y = v` in the diagonal blocks alone, whose inverses
`triangular_inverse.invert_block` computes without a division by β. Substitution gives the rows

    y_i = β_i (v_i − Σ_{j<i} A_ij y_j)        v̄_i = β_i (ȳ_i − Σ_{j>i} A_ij v̄_j),

and the gradient of β_i is the product of the two brackets, `v̄_i·y_i / β_i²`. A row of y or v̄ is as
small as its β, but its relative precision is that of any row as long as it stays in the range of
its dtype. Hence β has a least value, and float16 is too narrow: its normal numbers end at 2⁻¹⁴.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import heads_first

# Far below the rounding errors of y, even those of float64.
_LEAST = 2.0**-60


def at_least(beta: jax.Array | None) -> jax.Array | None:
    """Raises β to the least value whose rows of y and v̄ are normal numbers of float32."""
    return None if beta is None else jnp.maximum(beta, _LEAST)


def roots(beta: jax.Array | None, multiple: int) -> jax.Array | None:
    """Turns `β [B,S,K]` into `√β [B,K,S']`, zero-padded to a multiple; None stays None."""
    return None if beta is None else jnp.sqrt(heads_first(beta[..., None], multiple))[..., 0]


def gradient(beta: jax.Array, y: jax.Array, v_bar: jax.Array) -> jax.Array:
    """Returns `β̄ = Σ_d v̄ y / β² [B,S,K]`, dtype of `beta`, from `y` and `v̄ [B,S,K,D]`."""
    y, v_bar = (x.astype(beta.dtype) / beta[..., None] for x in (y, v_bar))
    return jnp.sum(y * v_bar, -1)
