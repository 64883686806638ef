"""Dense preconditioning, straight from the definition. Memory is quadratic in S."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import same_segment
from lucid_jax.ops.numerics import accumulator_dtype
from lucid_jax.ops.precondition.carry import dense_scores
from lucid_jax.ops.precondition.gram import Keys, gram_tile, normalize_keys
from lucid_jax.ops.precondition.prefix import Prefix
from lucid_jax.ops.transitions import Transitions


def precondition(
    solved: int,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    prefix: Prefix | None,
    beta: jax.Array | None,
    transitions: Transitions | None,
) -> jax.Array:
    """Solves `A_cc y = v − A_cp y_p` in the accumulator dtype; shapes as in the public op.

    With β it is `(I + diag(β) stril(A_cc)) y = diag(β) (v − A_cp y_p)`. The first `solved` rows of
    `A_cc` are those of the identity.
    """
    highest = jax.lax.Precision.HIGHEST
    dtype = accumulator_dtype(v.dtype)
    k, v = k.astype(dtype), v.astype(dtype)
    keys, rhs = Keys.normalize(k, segment_ids, 1), v.swapaxes(1, 2)

    if prefix is not None:
        columns = Keys.normalize(prefix.k.astype(dtype), prefix.segment_ids, 1)
        prefix_y = prefix.y.astype(dtype).swapaxes(1, 2)
        rhs = rhs - jnp.matmul(gram_tile(keys, columns, highest), prefix_y, precision=highest)

    if transitions is None:
        a_cc = jnp.tril(gram_tile(keys, keys, highest), -1)
    else:
        k_hat, root = normalize_keys(k), math.sqrt(k.shape[-1])
        transitions = jax.tree.map(lambda x: x.astype(dtype), transitions)
        scores = dense_scores(k_hat[:, :, :, None], k_hat, transitions, segment_ids)[:, :, 0]
        a_cc = jnp.tril(jnp.exp(scores / root - root), -1)
        if segment_ids is not None:
            a_cc = jnp.where(same_segment(segment_ids, segment_ids), a_cc, 0)
    a_cc = jnp.where((jnp.arange(k.shape[1]) >= solved)[:, None], a_cc, 0)
    if beta is not None:
        scale = beta.astype(dtype).swapaxes(1, 2)[..., None]
        a_cc, rhs = scale * a_cc, scale * rhs
    y = jax.lax.linalg.triangular_solve(a_cc, rhs, left_side=True, lower=True, unit_diagonal=True)
    return y.swapaxes(1, 2)
