"""Tokens that are not finite: whom they reach, forward and backward."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.conformance import slow
from ops.interpreter import interpreted

import lucid_jax
from lucid_jax import Prefix
from lucid_jax.ops.isolation import spread

S, H, K, D, BAD = 300, 4, 2, 8, 150
# Documents of 100 tokens, then the same tokens in an order that mixes the documents.
SORTED = np.repeat(np.array([-(2**31), 7, 2**31 - 1], np.int32), 100)
MIXED = np.random.default_rng(1).permutation(SORTED)


def draw():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(1, S, heads, D)).astype(np.float32) for heads in (H, K, K)]


def lucid(q, k, v, ids, implementation):
    return lucid_jax.lucid_attention(q, k, v, segment_ids=ids, implementation=implementation)


def softmax(q, k, v, ids, implementation):
    return lucid_jax.softmax_attention(q, k, v, segment_ids=ids, implementation=implementation)


def precondition(q, k, v, ids, implementation):
    return lucid_jax.precondition(k, v, segment_ids=ids, implementation=implementation)


def run(op, arrays, ids, implementation, out_bar=None):
    """Returns the output and the gradients of q, k and v."""

    @jax.jit
    def both(out_bar, *arrays):
        ids_ = None if ids is None else jnp.asarray(ids)[None]
        out, pull_back = jax.vjp(lambda *x: op(*x, ids_, implementation), *arrays)
        return out, *pull_back(out if out_bar is None else out_bar)

    return [np.asarray(x) for x in both(out_bar, *arrays)]


@pytest.mark.parametrize("implementation", ["xla", *slow("reference", "triton", "mosaic_tpu")])
def test_a_bad_beta_reaches_what_a_bad_value_reaches(implementation):
    rng = np.random.default_rng(3)
    _, k, v = draw()
    beta = rng.random(v.shape[:3]).astype(np.float32)
    bad_v, bad_beta = v.copy(), beta.copy()
    bad_v[0, BAD, 0, 2] = bad_beta[0, BAD, 0] = np.nan

    def op(v, beta, ids):
        y, pull_back = jax.vjp(
            lambda *x: lucid_jax.precondition(
                k, x[0], beta=x[1], segment_ids=ids, implementation=implementation
            ),
            v,
            beta,
        )
        return y, *pull_back(y)

    with interpreted(implementation):
        found, expected = (jax.jit(op)(*x, SORTED[None]) for x in ((v, bad_beta), (bad_v, beta)))
    same = SORTED[BAD] == SORTED
    for x, y in zip(found, expected):
        np.testing.assert_array_equal(x[0, ~same], y[0, ~same])
        if implementation != "triton":
            np.testing.assert_array_equal(x, y)
        assert np.isnan(x[0, same & (np.arange(S) >= BAD), 0]).all()


def heads_of(bad, x):
    """Repeats bool `[S,K]` for the heads of `x`."""
    return np.repeat(bad, x.shape[2] // K, 1)


@pytest.mark.parametrize(
    ("implementation", "op"),
    [
        *itertools.product(["xla"], [precondition, softmax, lucid]),
        *(
            pytest.param(*run, marks=pytest.mark.slow)
            for run in itertools.product(["reference"], [precondition, softmax, lucid])
        ),
        pytest.param("mosaic_tpu", precondition, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("ids", [MIXED, None], ids=["mixed", "one"])
@pytest.mark.parametrize("bad", ["v_nan", *slow("k_nan", "v_inf")])
def test_a_bad_token_reaches_later_ones_of_its_segment(bad, ids, implementation, op):
    name, value = bad.split("_")
    arrays = dict(zip("qkv", draw()))
    with interpreted(implementation):
        clean = run(op, arrays.values(), ids, implementation)
        arrays[name][0, BAD, 1, 3] = float(value)
        out, *gradients = run(op, arrays.values(), ids, implementation)
    same = np.ones(S, bool) if ids is None else ids == ids[BAD]
    reached = np.stack([np.zeros(S, bool), same & (np.arange(S) >= BAD)], 1)
    np.testing.assert_array_equal(np.isnan(out[0]).all(-1), heads_of(reached, out))
    np.testing.assert_array_equal(np.isnan(out[0]).any(-1), heads_of(reached, out))
    others = np.stack([np.ones(S, bool), ~same], 1)
    for x, expected in zip([out, *gradients], clean):
        untouched = heads_of(others, x)
        np.testing.assert_allclose(x[0][untouched], expected[0][untouched], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", [precondition, softmax, lucid])
def test_a_bad_cotangent_reaches_earlier_gradients_of_its_segment(op):
    arrays, rng = draw(), np.random.default_rng(2)
    out_bar = rng.normal(size=arrays[1 if op is precondition else 0].shape).astype(np.float32)
    clean = run(op, arrays, MIXED, "xla", out_bar)
    out_bar[0, BAD, 0, 2] = np.nan
    bad = run(op, arrays, MIXED, "xla", out_bar)
    same = MIXED[BAD] == MIXED
    reached = np.stack([same & (np.arange(S) <= BAD), np.zeros(S, bool)], 1)
    for x in bad[2:]:
        np.testing.assert_array_equal(np.isnan(x[0]).any(-1) & reached, reached)
    others = np.stack([~same, np.ones(S, bool)], 1)
    for x, expected in zip(bad, clean):
        untouched = heads_of(others, x)
        np.testing.assert_allclose(x[0][untouched], expected[0][untouched], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "bad"),
    [
        (precondition, "v_nan"), (precondition, "k_nan"), (precondition, "v_inf"),
        (softmax, "v_nan"), (softmax, "k_nan"), (lucid, "k_nan"),
    ],
)  # fmt: skip
def test_triton_keeps_a_bad_token_from_other_documents_and_earlier_blocks(op, bad):
    """The blocks of 64 or 128 rows that the token's document enters or leaves hold others too."""
    name, value = bad.split("_")
    arrays, rng = dict(zip("qkv", draw())), np.random.default_rng(2)
    out_bar = rng.normal(size=arrays["k" if op is precondition else "q"].shape).astype(np.float32)
    with interpreted("triton"):
        clean = run(op, arrays.values(), SORTED, "triton", out_bar)
        arrays[name][0, BAD, 1, 3] = float(value)
        found = run(op, arrays.values(), SORTED, "triton", out_bar)
    same = SORTED[BAD] == SORTED
    untouched = np.stack([np.ones(S, bool), ~same], 1)
    for x, expected in zip(found, clean):
        rows = heads_of(untouched, x)
        np.testing.assert_array_equal(x[0][rows], expected[0][rows])
    reached = heads_of(np.stack([np.zeros(S, bool), same & (np.arange(S) >= BAD)], 1), found[0])
    assert np.isnan(found[0][0][reached]).any(-1).all()
    np.testing.assert_array_equal(found[0][0, :128], clean[0][0, :128])


@pytest.mark.parametrize("implementation", ["xla", *slow("reference", "triton")])
def test_a_bad_token_of_a_prefix_reaches_its_segment(implementation):
    _, k, v = draw()
    prefix_k, ids = k.copy(), MIXED[None]
    prefix_k[0, BAD, 0] = np.inf

    def solve(prefix_k):
        prefix = Prefix(prefix_k, jnp.asarray(v), jnp.asarray(ids))
        return lucid_jax.precondition(
            k, v, segment_ids=jnp.asarray(ids), prefix=prefix, implementation=implementation
        )

    with interpreted(implementation):
        y, clean = solve(prefix_k), solve(k)
    same = MIXED[BAD] == MIXED
    assert np.isnan(y[0, same, 0]).all()
    np.testing.assert_allclose(y[0, ~same], clean[0, ~same], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y[:, :, 1], clean[:, :, 1], rtol=1e-5, atol=1e-6)


def test_spread_follows_the_definition():
    rng = np.random.default_rng(0)
    bad = rng.random((2, 40, 3)) < 0.05
    ids = rng.integers(-2, 3, (2, 40), np.int32)
    for segments in (ids, None):
        same = np.ones((2, 40, 40), bool) if segments is None else ids[:, :, None] == ids[:, None]
        for reverse in (False, True):
            sees = np.triu(same) if reverse else np.tril(same)
            expected = np.einsum("bij,bjk->bik", sees, bad.astype(int)) > 0
            found = spread(jnp.asarray(bad), segments, reverse=reverse)
            np.testing.assert_array_equal(found, expected)
