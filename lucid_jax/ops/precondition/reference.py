"""Dense preconditioning, straight from the definition. Memory is quadratic in S."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.ops.numerics import accumulator_dtype
from lucid_jax.ops.precondition.gram import Keys, gram_tile
from lucid_jax.ops.precondition.prefix import Prefix


def precondition(
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    prefix: Prefix | None,
    beta: jax.Array | None,
) -> jax.Array:
    """Solves `A_cc y = v − A_cp y_p` in the accumulator dtype; shapes as in the public op.

    With β it is `(I + diag(β) stril(A_cc)) y = diag(β) (v − A_cp y_p)`.
    """
    highest = jax.lax.Precision.HIGHEST
    dtype = accumulator_dtype(v.dtype)
    k, v = k.astype(dtype), v.astype(dtype)
    keys, rhs = Keys.normalize(k, segment_ids, 1), v.swapaxes(1, 2)

    if prefix is not None:
        columns = Keys.normalize(prefix.k.astype(dtype), prefix.segment_ids, 1)
        prefix_y = prefix.y.astype(dtype).swapaxes(1, 2)
        rhs = rhs - jnp.matmul(gram_tile(keys, columns, highest), prefix_y, precision=highest)

    a_cc = jnp.tril(gram_tile(keys, keys, highest), -1)
    if beta is not None:
        scale = beta.astype(dtype).swapaxes(1, 2)[..., None]
        a_cc, rhs = scale * a_cc, scale * rhs
    y = jax.lax.linalg.triangular_solve(a_cc, rhs, left_side=True, lower=True, unit_diagonal=True)
    return y.swapaxes(1, 2)
