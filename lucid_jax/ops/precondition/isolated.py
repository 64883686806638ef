"""A solve in which a token that is not finite reaches only the tokens that depend on it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lucid_jax.ops.isolation import bad_tokens, clear, mark, spread
from lucid_jax.ops.precondition.prefix import Prefix
from lucid_jax.ops.transitions import Transitions


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def isolated(
    solve: Callable[..., jax.Array],
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    prefix: Prefix | None,
    beta: jax.Array | None = None,
    transitions: Transitions | None = None,
) -> jax.Array:
    """Returns `solve` of the other arguments, with NaN for the tokens that depend on bad ones.

    A token's gradient depends on the cotangents that are not finite in reverse.
    """
    return _forward(solve, k, v, segment_ids, prefix, beta, transitions)[0]


def _forward(solve, k, v, segment_ids, prefix, beta, transitions):
    bad = bad_tokens(k, v)
    if beta is not None:
        bad |= ~jnp.isfinite(beta)
        beta = jnp.where(bad, 0, beta)
    if transitions is not None:
        bad |= transitions.bad_tokens()
        transitions = transitions.map(clear, bad)
    k, v = clear(k, bad), clear(v, bad)
    ids, p = segment_ids, 0
    if prefix is not None:
        p, bad_prefix = prefix.k.shape[1], bad_tokens(prefix.k, prefix.y)
        bad = jnp.concatenate([bad_prefix, bad], 1)
        prefix = Prefix(
            clear(prefix.k, bad_prefix), clear(prefix.y, bad_prefix), prefix.segment_ids
        )
        if ids is not None:
            ids = jnp.concatenate([prefix.segment_ids, ids], 1)
    bad = spread(bad, ids)[:, p:]

    def of_floats(k, v, beta, transitions, prefix_k, prefix_y):
        joined = prefix and Prefix(prefix_k, prefix_y, prefix.segment_ids)
        return solve(k, v, segment_ids, joined, beta, transitions)

    floats = (None, None) if prefix is None else (prefix.k, prefix.y)
    y, pull_back = jax.vjp(of_floats, k, v, beta, transitions, *floats)
    return mark(y, bad), (pull_back, bad, ids)


def _backward(solve, residuals, y_bar):
    pull_back, bad, ids = residuals
    bad = bad | bad_tokens(y_bar)
    k_bar, v_bar, beta_bar, transitions_bar, *prefix_bar = pull_back(clear(y_bar, bad))
    p = 0 if prefix_bar[0] is None else prefix_bar[0].shape[1]
    if p:
        bad = jnp.pad(bad, ((0, 0), (p, 0), (0, 0)))
    bad = spread(bad, ids, reverse=True)
    own = bad[:, p:]
    if beta_bar is not None:
        beta_bar = jnp.where(own, jnp.nan, beta_bar)
    if transitions_bar is not None:
        transitions_bar = transitions_bar.map(mark, own)
    prefix_k, prefix_y = (mark(x, bad[:, :p]) for x in prefix_bar) if p else prefix_bar
    joined = Prefix(prefix_k, prefix_y) if p else None
    return mark(k_bar, own), mark(v_bar, own), None, joined, beta_bar, transitions_bar


isolated.defvjp(_forward, _backward)
