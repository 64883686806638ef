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
    transitions: Transitions | None = None,
) -> jax.Array:
    """Returns `solve` of the other arguments, with NaN for the tokens that depend on bad ones.

    A token's gradient depends on the cotangents that are not finite in reverse.
    """
    return _forward(solve, k, v, segment_ids, prefix, transitions)[0]


def _forward(solve, k, v, segment_ids, prefix, transitions):
    bad = bad_tokens(k, v)
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

    def of_floats(k, v, transitions, prefix_k, prefix_y):
        joined = prefix and Prefix(prefix_k, prefix_y, prefix.segment_ids)
        return solve(k, v, segment_ids, joined, transitions)

    floats = (None, None) if prefix is None else (prefix.k, prefix.y)
    y, pull_back = jax.vjp(of_floats, k, v, transitions, *floats)
    return mark(y, bad), (pull_back, bad, ids)


def _backward(solve, residuals, y_bar):
    pull_back, bad, ids = residuals
    bad = bad | bad_tokens(y_bar)
    k_bar, v_bar, transitions_bar, *prefix_bar = pull_back(clear(y_bar, bad))
    if prefix_bar[0] is None:
        bad = spread(bad, ids, reverse=True)
        if transitions_bar is not None:
            transitions_bar = transitions_bar.map(mark, bad)
        return mark(k_bar, bad), mark(v_bar, bad), None, None, transitions_bar
    p = prefix_bar[0].shape[1]
    bad = spread(jnp.pad(bad, ((0, 0), (p, 0), (0, 0))), ids, reverse=True)
    k_bar, v_bar = (mark(x, bad[:, p:]) for x in (k_bar, v_bar))
    return k_bar, v_bar, None, Prefix(*(mark(x, bad[:, :p]) for x in prefix_bar)), None


isolated.defvjp(_forward, _backward)
