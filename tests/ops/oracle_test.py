"""The oracle's hand-written gradients agree with central differences."""

import numpy as np
import pytest
from ops import oracle
from ops.cases import Case

CASES = (
    Case("random", length=9, heads=4, kv_heads=2, head_dim=4),
    Case("near", length=9, head_dim=4, keys="cosine0.9"),
    Case("split", length=9, head_dim=4, segments="packed"),
)


def central_difference(f, x, cotangent, step=1e-5):
    gradient = np.empty(x.shape)
    for index in np.ndindex(x.shape):
        shifted = x.copy(), x.copy()
        shifted[0][index] += step
        shifted[1][index] -= step
        gradient[index] = ((f(shifted[0]) - f(shifted[1])) * cotangent).sum() / (2 * step)
    return gradient


@pytest.mark.parametrize("case", CASES, ids=str)
def test_precondition_gradients(case):
    x = case.draw()
    arrays, ids, y_bar = {n: x[n] for n in ("k", "v", "beta")}, x["segment_ids"], x["y_bar"]
    # Without β its gradient is the one at 1.
    for beta in (x["beta"], None):
        arrays["beta"] = beta
        gradients, _ = oracle.precondition_gradients(**arrays, y_bar=y_bar, segment_ids=ids)
        arrays["beta"] = np.ones_like(x["beta"]) if beta is None else beta
        for name, value in arrays.items():
            expected = central_difference(
                lambda a, name=name: oracle.precondition(**{**arrays, name: a}, segment_ids=ids),
                value,
                y_bar,
            )
            np.testing.assert_allclose(gradients[name], expected, atol=1e-7, err_msg=name)


def test_differential_attention_gradients():
    x = Case("pairs", length=7, heads=8, kv_heads=4, head_dim=2, segments="packed").draw()
    arguments = {**{n: x[n] for n in "qkv"}, "weight": np.array(0.3), "scale": np.arange(1.0, 5)}
    ids, o_bar = x["segment_ids"], x["o_bar"]
    gradients = oracle.differential_attention_gradients(
        **arguments, o_bar=o_bar, segment_ids=ids, layer=2
    )
    for name, value in arguments.items():
        expected = central_difference(
            lambda a, name=name: oracle.differential_attention(
                **{**arguments, name: a}, segment_ids=ids, layer=2
            ),
            value,
            o_bar,
        )
        np.testing.assert_allclose(gradients[name], expected, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_softmax_attention_gradients(case):
    x = case.draw()
    arrays, ids, o_bar = {n: x[n] for n in "qkv"}, x["segment_ids"], x["o_bar"]
    gradients, _ = oracle.softmax_attention_gradients(
        **arrays, o_bar=o_bar, segment_ids=ids, temperature=0.7
    )
    for name, value in arrays.items():
        expected = central_difference(
            lambda a, name=name: oracle.softmax_attention(
                **{**arrays, name: a}, segment_ids=ids, temperature=0.7
            ),
            value,
            o_bar,
        )
        np.testing.assert_allclose(gradients[name], expected, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", [oracle.path_attention, oracle.path_precondition])
def test_path_gradients(op, case):
    x = case.draw()
    names, cotangent = ("qkv", "o_bar") if op is oracle.path_attention else ("kv", "y_bar")
    arrays = {name: x[name] for name in (*names, "w", "w_beta")}
    _, gradients, _ = op(*arrays.values(), x[cotangent], x["segment_ids"])
    for name, value in arrays.items():
        expected = central_difference(
            lambda a, name=name: op(*{**arrays, name: a}.values(), x[cotangent], x["segment_ids"])[
                0
            ],
            value,
            x[cotangent],
        )
        np.testing.assert_allclose(gradients[name], expected, atol=1e-7, err_msg=name)
