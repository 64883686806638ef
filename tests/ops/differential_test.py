"""Differential attention by softmax attention of twice the heads: the oracle's, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops import oracle
from ops.cases import Case
from ops.conformance import FIXED_TOLERANCE, assert_close

from lucid_jax import softmax_attention
from lucid_jax.ops import differential

CASES = (
    Case("pairs", length=63, batch=2, heads=2, kv_heads=2),
    Case("grouped_pairs", length=130, heads=12, kv_heads=4, head_dim=6),
    Case("packed_pairs", length=70, batch=2, heads=4, kv_heads=2, segments="packed"),
)
EPS = 1e-5


def draw(case):
    """Returns the arguments by name, float64, segment ids and a cotangent."""
    x, rng = case.draw(), np.random.default_rng(0)
    arguments = {name: np.float32(x[name]).astype(np.float64) for name in "qkv"}
    arguments |= {
        "weight": np.float64(0.25),
        "scale": 1 + 0.25 * rng.normal(size=2 * case.head_dim),
    }
    return arguments, x["segment_ids"], x["o_bar"]


@pytest.mark.parametrize("layer", [0, 5])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_are_the_oracles(case, layer):
    arguments, ids, o_bar = draw(case)

    def attend(q, k, v, weight, scale):
        mixing = differential.Mixing(weight, scale)
        o = softmax_attention(*differential.expand(q, k, v), segment_ids=ids, precision="highest")
        return differential.combine(o, mixing, layer, case.kv_heads, EPS)

    arrays = [jnp.asarray(x, jnp.float32) for x in arguments.values()]
    o, pull_back = jax.vjp(attend, *arrays)
    tolerance = FIXED_TOLERANCE["float32"]
    expected = oracle.differential_attention(**arguments, segment_ids=ids, layer=layer, eps=EPS)
    assert_close("o", o, expected, tolerance)
    gradients = oracle.differential_attention_gradients(
        **arguments, o_bar=o_bar, segment_ids=ids, layer=layer, eps=EPS
    )
    for name, found in zip(arguments, pull_back(jnp.asarray(o_bar, jnp.float32)), strict=True):
        assert_close(f"{name} gradient", found, np.asarray(gradients[name]), tolerance)


def test_the_learnt_weight_is_a_difference_of_exponentials():
    q1, k1, q2, k2 = 0.3 * np.random.default_rng(0).normal(size=(4, 16))
    expected = np.exp(q1 @ k1) - np.exp(q2 @ k2)
    found = differential.learnt_weight(*(jnp.asarray(x, jnp.float32) for x in (q1, k1, q2, k2)))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_outputs_keep_the_dtype():
    q, k = jnp.ones((1, 3, 4, 8), jnp.bfloat16), jnp.ones((1, 3, 2, 8), jnp.bfloat16)
    mixing = differential.Mixing(jnp.float32(0), jnp.ones(16))
    o = differential.combine(softmax_attention(*differential.expand(q, k, k)), mixing, 0, 2, EPS)
    assert (o.shape, o.dtype) == (q.shape, q.dtype)
