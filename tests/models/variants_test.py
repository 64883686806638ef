"""PaTH and learnt β in the model: what they compute from, documents, gradients, resumption."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx
from models.transformer_test import S, batch, forward
from ops import oracle
from ops.conformance import FIXED_TOLERANCE, assert_close
from ops.interpreter import interpreted
from small_models import random_params, rest_slow, small

from lucid_jax.ops.implementations import recorded
from lucid_jax.training.flops import model_flops
from lucid_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("compilation_cache")

PATTERN = "softmax,lucid"
VARIANTS = {
    "lucid_path": {"attention": "lucid", "positions": "path"},
    "path": {"attention": "softmax", "positions": "path"},
    "both": {"attention": PATTERN, "positions": "path", "remat": "full"},
    "beta": {"attention": PATTERN, "lucid_beta": True},
}


def of_variant(name):
    return small(**VARIANTS[name], init_std=0.2)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def first_layer(config, x, segment_ids):
    """Returns the first layer's parameters in float64, its inputs of attention and transitions."""
    model = toy.model_of(config)
    params = random_params(model)
    layers = model.merge(params).layers
    structure, stacked = nnx.split(layers)
    layer = nnx.merge(structure, jax.tree.map(lambda x: x[0], stacked)).attention
    _, inputs = layer(jnp.asarray(x), None, lambda inputs: (inputs.q, inputs))
    directions = inputs.directions
    transitions = None if directions is None else directions.transitions(segment_ids=segment_ids)
    attention = params["layers"]["attention"]
    named = {name: np.float64(attention[name].get_value()[0]) for name in attention}
    return named, inputs, transitions


def test_transitions_are_those_of_the_definition():
    ids = np.repeat([[1, 2], [1, 3]], (5, 8), axis=1).astype(np.int32)
    x = np.random.default_rng(0).normal(size=(2, 13, 32)).astype(np.float32)
    params, inputs, found = first_layer(small(positions="path"), x, jnp.asarray(ids))
    projected = np.einsum("bse,ekd->bskd", x, params["direction"])
    before = np.zeros_like(projected[:, :2])
    w, _ = oracle.short_convolution(
        projected, params["direction_taps"], before, 0 * projected, segment_ids=ids
    )
    tolerance = FIXED_TOLERANCE["float32"]
    assert_close("w", found.w, w * sigmoid(w), tolerance)
    logits = np.einsum("bse,ek->bsk", x, params["transition_beta"])
    beta = 2 * sigmoid(logits + params["transition_beta_bias"])
    assert_close("beta", found.beta, beta, tolerance)
    assert inputs.beta is None


def test_learnt_beta_is_a_sigmoid_that_starts_near_one():
    x = np.random.default_rng(0).normal(size=(2, 13, 32)).astype(np.float32)
    config = small(lucid_beta=True)
    params, inputs, _ = first_layer(config, x, None)
    logits = np.einsum("bse,ek->bsk", x, params["lucid_beta"]) + params["lucid_beta_bias"]
    assert_close("beta", inputs.beta, sigmoid(logits), FIXED_TOLERANCE["float32"])
    started = toy.model_of(config).init(seed=0)["layers"]["attention"]
    bias = np.asarray(started["lucid_beta_bias"].get_value())
    np.testing.assert_allclose(sigmoid(bias), 0.982, atol=1e-3)
    assert np.std(started["lucid_beta"].get_value()) == pytest.approx(0.02, rel=0.3)


def test_parameters_and_operations_are_those_that_the_fields_state():
    plain = small()
    e, k, d, layers = 32, 2, 8, 2
    path = layers * (e * k * d + 3 * k * d + e * k + k)
    beta = layers * (e * k + k)
    for fields, added in (({"positions": "path"}, path), ({"lucid_beta": True}, beta)):
        config = small(**fields)
        assert toy.model_of(config).num_params - toy.model_of(plain).num_params == added
        # A multiply and an add in the forward pass, twice that behind; biases are left out.
        operations = [model_flops(c.model, tokens=1, pairs=0) for c in (config, plain)]
        assert operations[0] - operations[1] == 6 * (added - layers * k)


@pytest.mark.parametrize("variant", rest_slow(*VARIANTS))
def test_packed_documents_have_the_losses_that_they_have_alone(variant):
    params, run = forward(of_variant(variant))
    packed = batch()
    losses, _ = run(params, packed)
    # Of one shape with it: the last document comes first, and zeros instead of the others.
    alone = {name: np.zeros_like(x) for name, x in packed.items()}
    for name, x in packed.items():
        alone[name][:, : S - 13] = x[:, 13:]
    found, _ = run(params, alone)
    expected = np.float64(found[:, : S - 13])
    assert_close("losses", losses[:, 13:], expected, FIXED_TOLERANCE["float32"])


@pytest.mark.parametrize("variant", rest_slow(*VARIANTS))
def test_gradients_reach_every_parameter(variant):
    params, run = forward(of_variant(variant))
    gradients = toy.named(jax.grad(lambda p: run(p, batch())[0].sum())(params))
    for name, gradient in gradients.items():
        # The first layer of the pattern is a softmax layer, which does not read β.
        unread = variant == "beta" and "lucid_beta" in name
        for i, of_layer in enumerate(gradient if "layers" in name else [gradient]):
            assert np.isfinite(of_layer).all()
            assert np.any(of_layer) == (not unread or i == 1), (name, i)


def test_telemetry_of_path_has_the_gain_alone():
    params, run = forward(small(attention=PATTERN, positions="path"))
    _, measured = run(params, batch(), telemetry=True)
    [(name, gains)] = measured.items()
    assert name == "value_gain"
    assert gains[0] == 0
    assert 0 < gains[1] <= 2


@pytest.mark.slow
def test_kernels_run_both_ops_of_path():
    found = {}
    for name in ("xla", "triton"):
        params, run = forward(small(attention=PATTERN, positions="path", implementation=name))
        with interpreted("triton"), recorded() as implementations:
            found[name], _ = run(params, batch())
        assert str(implementations) == f"attention {name} · solve {name}"
    assert_close("out", found["triton"], np.float64(found["xla"]), FIXED_TOLERANCE["float32"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["both", "beta"])
def test_a_run_resumes_where_it_was_stopped(variant, corpus, tmp_path, monkeypatch):
    toy.use_devices(monkeypatch, 1)
    config = functools.partial(toy.toy_config, corpus, model=VARIANTS[variant], steps=8)
    train(config(), tmp_path / "whole")
    with monkeypatch.context() as stopping:
        toy.stop_after(stopping, 4)
        train(config(), tmp_path / "stopped")
    assert toy.newest_step(tmp_path / "stopped") == 4
    train(config(), tmp_path / "stopped")
    states = (toy.saved_state(tmp_path / name, config()) for name in ("stopped", "whole"))
    toy.assert_same_bits(*states)
