"""Dense preconditioning: the definition, in a page. Memory is quadratic in S."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.ops.precondition.gram import Keys, accumulator_dtype, gram_tile, normalize_keys
from lucid_jax.ops.precondition.prefix import Prefix


def precondition(
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    prefix: Prefix | None,
    precision: jax.lax.Precision | None,
) -> jax.Array:
    """Solves `A_cc y = v − A_cp y_p` with the whole of `A`; shapes as in the public op."""
    del precision  # Everything here is in the accumulator dtype, in full precision.
    highest = jax.lax.Precision.HIGHEST
    dtype = accumulator_dtype(v.dtype)
    keys = Keys(normalize_keys(k).swapaxes(1, 2), segment_ids)
    rhs = v.astype(dtype).swapaxes(1, 2)

    if prefix is not None:
        columns = Keys(normalize_keys(prefix.k).swapaxes(1, 2), prefix.segment_ids)
        prefix_y = prefix.y.astype(dtype).swapaxes(1, 2)
        rhs = rhs - jnp.matmul(gram_tile(keys, columns, highest), prefix_y, precision=highest)

    a_cc = jnp.tril(gram_tile(keys, keys, highest), -1)
    y = jax.lax.linalg.triangular_solve(a_cc, rhs, left_side=True, lower=True, unit_diagonal=True)
    return y.swapaxes(1, 2)
