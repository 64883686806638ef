"""Decoding with PaTH's transitions, token by token, gives what the whole sequence does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.conformance import FIXED_TOLERANCE, assert_close, slow
from ops.path_test import draw

from lucid_jax import lucid_attention, precondition, softmax_attention
from lucid_jax.ops.decode import LayerCache, PathCache, decode_path_attention
from lucid_jax.ops.decode import path as decode_path

PREFILLED, STEPS = (70, 67), 15
# The cached keys are rounded to 9 bits at the end of each window, four times here; a transition
# that is left out changes the output by half.
TOLERANCE = FIXED_TOLERANCE | {"bfloat16": 2**-5}


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Windows of 4 tokens, so that several are filled."""
    monkeypatch.setattr(decode_path, "_WINDOW", 4)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("lucid", [True, *slow(False)])
@pytest.mark.parametrize("dtype", ["float64", *slow("float32", "bfloat16")])
def test_decoding_equals_the_whole_sequence(lucid, dtype):
    with jax.enable_x64(dtype == "float64"):
        arrays = draw(max(PREFILLED) + STEPS, batch=2, dtype=np.float64)
        q, k, v, transitions = jax.tree.map(lambda x: jnp.asarray(x, dtype), arrays)
        # Projections, which no step may invert.
        transitions = transitions._replace(beta=transitions.beta.at[:, ::3].set(1))
        op, options = lucid_attention, {}
        if not lucid:
            op, options = softmax_attention, {"temperature": 0.5}
        expected = op(q, k, v, transitions=transitions, precision="highest", **options)
        # Sequences of different lengths, whose windows begin at different places.
        caches = [prefill(k, v, transitions, b, lucid) for b in range(2)]
        cached = jax.tree.map(lambda *x: jnp.concatenate(x), *caches)
        for step in range(STEPS):
            length = jnp.array(PREFILLED) + step
            new = jax.tree.map(lambda x: x[jnp.arange(2), length], (q, k, v, transitions))  # noqa: B023
            o, cached = decode_path_attention(*new, cached, length, **options)
            ref = np.asarray(expected, np.float64)[np.arange(2), length]
            assert o.dtype == dtype
            assert_close(f"step {step}", o, ref, TOLERANCE[dtype])


def test_what_does_not_fit_is_named():
    q, k, v, transitions = draw(max(PREFILLED))
    cached = prefill(k, v, transitions, 0, True)
    new = jax.tree.map(lambda x: x[:, 0], (q, k, v, transitions))
    length, t = jnp.array([70]), new[3]
    for error, message, arguments in (
        (TypeError, "cached must be a PathCache; got LayerCache", (*new, cached.layer)),
        (TypeError, "transitions must be Transitions; got tuple", (*new[:3], tuple(t), cached)),
        (
            ValueError,
            r"transitions.beta must have shape \[B,K\] = \(1, 2\); got \(1, 1\)",
            (*new[:3], t._replace(beta=t.beta[:, :1]), cached),
        ),
        (
            TypeError,
            "cached.layer.k must have dtype bfloat16; got float32",
            (*jax.tree.map(lambda x: x.astype(jnp.bfloat16), new), cached),
        ),
    ):
        with pytest.raises(error, match=message):
            decode_path_attention(*arguments, length)
    with pytest.raises(ValueError, match="a place for each token; got 100 for 101"):
        PathCache.from_tokens(
            cached.layer, *(jax.tree.map(jnp.asarray, draw(101)[i]) for i in (1, 3))
        )
    with pytest.raises(TypeError, match="k must have dtype float32; got bfloat16"):
        PathCache.from_tokens(cached.layer, k.astype(jnp.bfloat16), transitions)


def prefill(k, v, transitions, b, lucid):
    """Returns the cache of one sequence, with places for 100 tokens."""
    first = slice(b, b + 1), slice(PREFILLED[b])
    k, v, transitions = jax.tree.map(lambda x: x[first], (k, v, transitions))
    y = precondition(k, v, transitions=transitions, precision="highest") if lucid else v
    empty = jnp.zeros((1, k.shape[2], 100, k.shape[3]), k.dtype)
    norms = jnp.zeros(empty.shape[:3], jnp.promote_types(k.dtype, jnp.float32)) if lucid else None
    layer = LayerCache(empty, empty, norms).with_tokens(k, y, jnp.int32(0))
    return PathCache.from_tokens(layer, k, transitions)
