"""Numeric checks that the experiments' claims rest on."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from experiments import activations, measuring
from experiments.attention_noise import weights
from experiments.conditioning import definitions, keys, operators
from experiments.conditioning import run as conditioning
from experiments.learnability import layer
from experiments.learnability import run as learnability
from experiments.retrieval.task import Retrieval
from lucid_jax import lucid_attention, softmax_attention
from lucid_jax.config import Config

TASK = Retrieval(length=72, digits=2, alphabet=3, needles=6, queries=4)


def test_rounds_have_random_orders():
    calls = []
    runs = {name: functools.partial(calls.append, name) for name in "abc"}
    times = measuring.interleaved(runs, 0, fewest=8, most=8)
    assert {name: len(x) for name, x in times.items()} == dict.fromkeys("abc", 8)
    rounds = [tuple(calls[i : i + 3]) for i in range(3, len(calls), 3)]
    assert all(set(x) == set("abc") for x in rounds)
    assert len(set(rounds)) > 2


@pytest.mark.parametrize("wrong", [1.1, np.nan])
def test_a_wrong_result_is_refused(wrong):
    exact = {"out": np.ones(3)}
    assert measuring.judge("op", {"out": np.full(3, 1.001)}, exact, 0.01) == pytest.approx(1e-3)
    with pytest.raises(measuring.GateError, match="op: out has relative error"):
        measuring.judge("op", {"out": np.full(3, wrong)}, exact, 0.01)


# Learnability.


def test_the_floor_of_functions_of_the_own_token(monkeypatch):
    monkeypatch.setattr(layer, "TOKENS", 5)
    sequences = np.array(list(itertools.permutations(range(5))))
    average = sequences.cumsum(1) / np.arange(1, 6)
    best = np.array([average[sequences == token].mean() for token in range(5)])
    expected = np.mean((average - best[sequences]) ** 2)
    assert learnability.own_token_loss() == pytest.approx(expected)


# Conditioning.


@pytest.mark.slow
def test_norms_are_those_of_the_dense_matrix(monkeypatch):
    length = 256
    k = keys.random_keys(0.9, length, seeds=2)
    k[:, :, 1] = k[:, :1, 1]  # Identical keys have the largest norm.
    k32 = jnp.asarray(k, jnp.float32)
    x = jax.random.normal(jax.random.key(0), k.shape)
    found = {}
    for name, op in (("norm", operators.multiply), ("inverse_norm", operators.solve)):
        found[name] = np.asarray(operators.norm(op, k32, x, steps=8).value)
        for head, transpose in itertools.product(range(2), (False, True)):
            a = conditioning.dense(k[0, :, head])
            a = a if name == "norm" else np.linalg.inv(a)
            exact = (a.T if transpose else a) @ np.asarray(x[0, :, head], np.float64)
            y = op(k32, x, transpose=transpose)[0, :, head]
            assert np.linalg.norm(y - exact) < 1e-5 * np.linalg.norm(exact)
    conditioning.check_dense(k, found)
    assert found["norm"][1] == pytest.approx(operators.most_possible(length), rel=1e-4)
    assert found["inverse_norm"].max() <= 2
    with pytest.raises(measuring.GateError, match="norm at 256 rows: off by 5"):
        conditioning.check_dense(k, {name: 1.05 * x for name, x in found.items()})


def test_definitions_are_extrapolated_from_the_longer_lengths():
    k = keys.random_keys(0.7, 64, seeds=1)
    assert definitions.conditions(k)["A"] == pytest.approx(
        np.linalg.cond(conditioning.dense(k[0, :, 0])), rel=1e-3
    )
    slope, far = definitions.extrapolate([1, 2, 4, 8], [5, 1, 16, 64])
    assert slope == pytest.approx(2)
    assert far == pytest.approx(definitions.FAR**2)


# Attention noise.


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random models: softmax layers, a softmax and a LUCID layer, and the latter but sharper."""
    model = {
        "vocab_size": 258, "num_layers": 2, "embed_dim": 32, "mlp_dim": 32, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 8, "init_std": 0.5,
    }  # fmt: skip
    loaded = []
    for attention, temperature in (
        ("softmax", 1.0),
        ("softmax,lucid", 1.0),
        ("softmax,lucid", 0.5),
    ):
        values = {**model, "attention": attention, "temperature": temperature}
        directory = tmp_path_factory.mktemp("run")
        toy.save_random(directory, Config.from_dict({"model": values}))
        loaded.append(activations.Trained.load(directory))
    return loaded


@pytest.fixture(scope="module")
def questions():
    """One sequence, whose needles stand before their questions."""
    [text], [answers] = jax.device_get(TASK.draw(jax.random.key(0), 1, 6))
    found = weights.questions(TASK, text, answers)
    np.testing.assert_array_equal(found.tokens[found.value], found.answer)
    for back in range(TASK.digits):
        key = found.tokens[found.value - 1 - back]
        np.testing.assert_array_equal(key, found.tokens[found.asked - back])
    assert (found.value < 73 - TASK.asked_tokens).all()
    return found


@pytest.mark.slow
def test_weights_are_those_of_the_models_attention(models, questions):
    _, _, sharp = models
    found = activations.activations(sharp.model, sharp.params, jnp.asarray(questions.tokens)[None])
    by_weights = weights.weights(sharp, questions)
    ops = functools.partial(softmax_attention, temperature=0.5), lucid_attention
    for i, op in enumerate(ops):
        q, k, v = (x[i] for x in found)
        expected = op(q, k, v)[0, questions.asked]
        values = jnp.repeat(v[0], 2, axis=1)
        actual = jnp.einsum("hmt,thd->mhd", by_weights.effective[i], values)
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert (by_weights.effective[1] < 0).any()
    with pytest.raises(ValueError, match=r"temperature of 0\.5; expected 1"):
        sharp.without_inverse(1)


@pytest.mark.slow
def test_a_layer_without_its_inverse_is_a_softmax_layer(models, questions):
    softmax, model, _ = models
    without = model.without_inverse(1)
    before, after = (weights.weights(x, questions) for x in (model, without))
    assert not np.allclose(before.effective[1], before.softmax[1], atol=1e-3)
    np.testing.assert_array_equal(after.effective[1], after.softmax[1])
    # Both models have the same random parameters.
    logits = [
        x.model.merge(x.params)(questions.tokens[None], np.arange(72)[None], None)[0]
        for x in (model, without, softmax)
    ]
    np.testing.assert_array_equal(logits[1], logits[2])
    assert not np.allclose(logits[0], logits[2], atol=1e-3)


def test_descriptions_of_weights_by_hand():
    questions = weights.Questions(np.zeros(12), np.arange(8, 12), np.arange(2, 6), np.zeros(4))
    itself, value = (np.eye(12)[at] for at in (questions.asked, questions.value))
    only_itself = weights.Weights(itself[None, None], itself[None, None])
    found = weights.describe(questions, only_itself, 3)
    assert {n: x.item() for n, x in found.items() if x != 0} == {"own": 1, "effective_size": 1}
    # The needle's weight is below zero; another token has a larger one for the last question.
    other = np.outer(np.arange(4) == 3, np.eye(12)[0])
    effective = (itself - 0.5 * value + 0.6 * other)[None, None]
    found = weights.describe(questions, weights.Weights(itself[None, None], effective), 3)
    assert found["largest"] == 0.75
    assert found["effective_value"] == -0.5
    assert found["negative"] == pytest.approx(np.mean([1 / 3] * 3 + [0.5 / 2.1]))
