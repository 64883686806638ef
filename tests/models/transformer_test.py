"""The model: parameters, causality, packing, remat, layer patterns, RoPE, norms, the loss."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
import toy
from ops import oracle
from ops.cases import Case
from small_models import rest_slow

from lucid_jax.config import Config
from lucid_jax.models.loss import weighted_losses
from lucid_jax.ops import rope
from lucid_jax.ops.cross_entropy import token_losses
from lucid_jax.ops.lucid_attention import measured_lucid_attention
from lucid_jax.ops.norm import rms_norm
from lucid_jax.ops.precondition.diagnostics import Sample, sampled_rows

pytestmark = pytest.mark.usefixtures("compilation_cache")

B, S = 2, 40
PATTERN = "softmax,softmax,lucid"
small = functools.partial(small_models.small, num_layers=3, init_std=0.2)


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (B, S + 1)).astype(np.int32)
    segment_ids = np.repeat([[1, 2], [1, 3]], (13, S - 13), axis=1).astype(np.int32)
    positions = np.concatenate([np.arange(13), np.arange(S - 13)])
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segment_ids,
        "positions": np.broadcast_to(positions, (B, S)).astype(np.int32),
        "weights": np.ones((B, S), np.float32),
    }


@functools.cache
def forward(config: Config):
    """Returns random parameters, and `weighted_losses` jitted for this configuration."""
    model = toy.model_of(config)
    return model.init(seed=0), jax.jit(
        functools.partial(weighted_losses, config, model), static_argnames="telemetry"
    )


@pytest.mark.parametrize("attention", rest_slow(PATTERN, "lucid", "softmax"))
def test_a_loss_does_not_depend_on_later_tokens_or_other_segments(attention):
    params, run = forward(small(attention=attention))
    before = batch()
    after = {**before, "tokens": before["tokens"].copy()}
    after["tokens"][:, 25] = (after["tokens"][:, 25] + 1) % 64
    a, b = (run(params, x)[0] for x in (before, after))
    np.testing.assert_array_equal(a[:, :25], b[:, :25])
    assert (np.abs(a[:, 25] - b[:, 25]) > 0).all()
    # The first segment ends at token 13, so changing it does not affect the second.
    after["tokens"][:, :13] = batch(1)["tokens"][:, :13]
    c, _ = run(params, after)
    np.testing.assert_array_equal(b[:, 13:], c[:, 13:])


@pytest.mark.slow
def test_attention_patterns_choose_the_kind_of_each_layer():
    losses = {}
    for attention in ("lucid", "softmax", "lucid,softmax,softmax", PATTERN):
        params, run = forward(small(attention=attention))
        losses[attention] = np.asarray(run(params, batch())[0])
    values = list(losses.values())
    assert all(np.abs(a - b).max() > 1e-4 for i, a in enumerate(values) for b in values[:i]), (
        "the parameters are the same, so the losses differ by the layers' kinds only"
    )


@pytest.mark.slow
def test_temperature_affects_softmax_layers_only():
    def losses(attention, temperature):
        params, run = forward(small(attention=attention, temperature=temperature))
        return np.asarray(run(params, batch())[0])

    np.testing.assert_array_equal(losses("lucid", 0.5), losses("lucid", 1.0))
    assert np.abs(losses("softmax", 0.5) - losses("softmax", 1.0)).max() > 1e-4


def test_a_model_without_positions_does_not_read_them():
    for positions, reads in (("none", False), ("rope", True)):
        params, run = forward(small(attention=PATTERN, positions=positions))
        before = batch()
        after = {**before, "positions": 3 * before["positions"]}
        a, b = (np.asarray(run(params, x)[0]) for x in (before, after))
        assert (np.abs(a - b).max() > 1e-4) == reads


def test_normalised_queries_and_keys_have_no_length():
    config = small(attention=PATTERN, qk_norm="paper", norm_eps=1e-12)
    params, run = forward(config)
    attention = params["layers"]["attention"]
    before = np.asarray(run(params, batch())[0])
    for name in ("query", "key"):
        attention[name].set_value(4 * attention[name].get_value())
    np.testing.assert_allclose(run(params, batch())[0], before, rtol=1e-4)
    assert toy.model_of(config).num_params == toy.model_of(small()).num_params
    learnt = toy.model_of(small(qk_norm="rms"))
    assert learnt.num_params - toy.model_of(small()).num_params == 3 * 2 * 8


def test_differential_layers_add_four_vectors_and_a_scale():
    model = toy.model_of(small(attention="softmax,differential,lucid"))
    assert model.num_params - toy.model_of(small()).num_params == 3 * 6 * 8


@functools.cache
def compiled_gradient(remat: str):
    """Returns the compiled gradient of the sum of all losses, and parameters."""
    params, run = forward(small(remat=remat, attention="softmax,lucid"))
    loss = jax.grad(lambda p: run(p, batch())[0].sum())
    return jax.jit(loss).lower(params).compile(), params


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots", "attention"])
def test_remat_does_not_change_gradients(remat):
    found, expected = (run(params) for run, params in map(compiled_gradient, (remat, "none")))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.slow
def test_remat_that_keeps_attention_does_not_recompute_it():
    def loops(remat):
        return compiled_gradient(remat)[0].as_text().count(" while(")

    assert loops("attention") == loops("none") < loops("full")


def test_bfloat16_compute_is_close_to_float32_and_gradients_are_float32():
    params, run = forward(small(attention=PATTERN))
    low_params, low_run = forward(small(attention=PATTERN, compute_dtype="bfloat16"))
    exact, low = run(params, batch())[0], low_run(low_params, batch())[0]
    assert low.dtype == jnp.float32
    assert 0 < np.linalg.norm(exact - low) / np.linalg.norm(exact) < 0.05
    gradients = jax.eval_shape(jax.grad(lambda p: low_run(p, batch())[0].sum()), low_params)
    assert {x.dtype.name for x in jax.tree.leaves(gradients)} == {"float32"}


def test_embedding_gradients_count_every_occurrence_of_a_token():
    config = small(compute_dtype="bfloat16")
    params, _ = forward(config)
    model = toy.model_of(config)
    tokens = jnp.zeros((B, 500), jnp.int32)

    def total(params):
        return model.merge(params).embed(tokens).astype(jnp.float32).sum()

    gradient = jax.grad(total)(params)["embedding"][...]
    np.testing.assert_array_equal(gradient[0], np.full(32, tokens.size))


def test_telemetry_measures_every_layer():
    params, run = forward(small())
    _, measured = run(params, batch(), telemetry=True)
    assert measured["off_diagonal"].shape == measured["value_gain"].shape == (3,)
    assert ((measured["off_diagonal"] > 0) & (measured["off_diagonal"] <= 1 + 1e-5)).all()
    assert ((measured["value_gain"] > 0) & (measured["value_gain"] <= 2)).all()
    params, run = forward(small(attention=PATTERN))
    with jax.enable_x64(True):
        _, measured = jax.eval_shape(functools.partial(run, telemetry=True), params, batch())
    assert {x.dtype.name for x in measured.values()} == {"float32"}


@pytest.mark.parametrize("segments", rest_slow("packed", "none", "single"))
def test_diagnostics_match_the_oracle(segments):
    drawn = Case(segments, batch=2, length=300, kv_heads=2, segments=segments).draw()
    k_hat, _ = oracle.normalized_keys(drawn["k"])
    ids = drawn["segment_ids"]
    ids = np.ones((2, 300), np.int32) if ids is None else ids.copy()
    # The last tokens are padding.
    ids[1, 250:] = 0
    rows = sampled_rows(300)
    entries = np.tril(oracle.gram(k_hat, ids), -1) * (ids != 0)[:, None, :, None]
    y = oracle.precondition(drawn["k"], drawn["v"], ids)
    norms = [np.sqrt((np.where((ids != 0)[..., None, None], x, 0) ** 2).sum((1, 3)))
             for x in (drawn["v"], y)]  # fmt: skip
    q, k, v = (jnp.asarray(drawn[n], jnp.float32) for n in "qkv")
    sample = Sample(rows, jnp.asarray(ids))
    _, found = measured_lucid_attention(q, k, v, sample=sample, segment_ids=jnp.asarray(ids))
    np.testing.assert_allclose(found.off_diagonal, entries[:, :, rows].max((1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(found.value_gain, (norms[1] / norms[0]).max(1), rtol=1e-4)


def test_rotations_are_exact_at_large_positions():
    frequency = rope.frequencies(64, 10_000.0, "none", 1.0, 2048)
    positions = np.array([[0, 1, 131_071, 1_048_575]], np.int32)
    cos, sin = rope.rotations(jnp.asarray(positions), frequency)
    angle = positions[..., None, None].astype(np.float64) * frequency
    np.testing.assert_allclose(cos, np.cos(angle), atol=1e-3)
    np.testing.assert_allclose(cos[:, :3], np.cos(angle)[:, :3], atol=1.2e-4)
    np.testing.assert_allclose(sin[:, :3], np.sin(angle)[:, :3], atol=1.2e-4)


def test_rotated_scores_depend_on_the_distance_only():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 64)).astype(np.float32)
    frequency = rope.frequencies(64, 10_000.0, "none", 1.0, 2048)

    def score(i, j):
        at = [rope.rotations(jnp.full((1, 1), n, jnp.int32), frequency) for n in (i, j)]
        return float(jnp.sum(rope.rotate(q, *at[0]) * rope.rotate(k, *at[1])))

    assert score(100, 40) == pytest.approx(score(100_100, 100_040), abs=1e-2)
    assert abs(score(100, 40) - score(100, 41)) > 1e-2


@pytest.mark.parametrize("scaling", ["linear", "ntk", "llama3"])
def test_rope_scaling_divides_the_lowest_frequency_by_its_factor(scaling):
    plain = rope.frequencies(64, 10_000.0, "none", 1.0, 2048)
    scaled = rope.frequencies(64, 10_000.0, scaling, 16.0, 2048)
    assert plain[-1] / scaled[-1] == pytest.approx(16)
    if scaling != "linear":
        assert plain[0] == pytest.approx(scaled[0])
    assert (np.diff(scaled) < 0).all()


def test_llama3_frequencies_match_the_published_rule():
    """Llama 3.1 has base 500000, factor 8 and original length 8192."""
    frequency = 500_000.0 ** (-np.arange(0, 128, 2) / 128)
    expected = []
    for f in frequency:
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            expected.append(f)
        elif wavelength > 8192 / 1:
            expected.append(f / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * f / 8 + smooth * f)
    found = rope.frequencies(128, 500_000.0, "llama3", 8.0, 8192)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_rms_norm_computes_in_float32():
    x = np.random.default_rng(0).normal(size=(3, 64)) * 100
    scale = np.random.default_rng(1).normal(size=64)
    expected = x * scale / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    found = rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), 1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    low = rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale, jnp.float32), 1e-5)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rms_norm(jnp.zeros((1, 4)), jnp.ones(4), 1e-5), 0)


@pytest.mark.parametrize("z_loss", [0.0, 0.5])
@pytest.mark.parametrize("chunk", rest_slow(7, 1, 16, 40, 100))
def test_chunked_losses_and_gradients_match_numpy(chunk, z_loss):
    rng = np.random.default_rng(0)
    x, head = rng.normal(size=(B, S, 8)), rng.normal(size=(8, 50))
    targets = rng.integers(0, 50, (B, S)).astype(np.int32)
    cotangent = rng.normal(size=(B, S))
    logits = x @ head
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    probability = shifted / shifted.sum(-1, keepdims=True)
    one_hot = np.eye(50)[targets]
    expected = -np.log((probability * one_hot).sum(-1))
    log_z = np.log(np.exp(logits).sum(-1, keepdims=True))
    logits_bar = cotangent[..., None] * (probability * (1 + 2 * z_loss * log_z) - one_hot)

    f = functools.partial(token_losses, targets=jnp.asarray(targets), chunk=chunk, z_loss=z_loss)
    losses, pull_back = jax.vjp(f, jnp.asarray(x, jnp.float32), jnp.asarray(head, jnp.float32))
    x_bar, head_bar = pull_back(jnp.asarray(cotangent, jnp.float32))
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x_bar, logits_bar @ head.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        head_bar, np.einsum("bse,bsv->ev", x, logits_bar), rtol=1e-4, atol=1e-4
    )


def test_products_with_the_head_have_bfloat16_operands():
    x, head = jnp.ones((1, 4, 8), jnp.bfloat16), jnp.ones((8, 50), jnp.float32)
    targets = jnp.zeros((1, 4), jnp.int32)
    loss = jax.grad(lambda *a: token_losses(*a, chunk=4).sum(), (0, 1))
    products = re.findall(
        r"dot_general.*: \((.*)\) -> ", jax.jit(loss).lower(x, head, targets).as_text()
    )
    assert len(products) == 3
    assert not any("f32" in p.replace("bf16", "") for p in products)
    assert [g.dtype for g in loss(x, head, targets)] == [jnp.bfloat16, jnp.float32]


def test_only_one_chunk_of_logits_is_in_memory():
    def temporaries(chunk):
        x = jax.ShapeDtypeStruct((1, 8192, 16), jnp.bfloat16)
        head = jax.ShapeDtypeStruct((16, 4096), jnp.float32)
        targets = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
        loss = jax.grad(lambda *a: token_losses(*a, chunk=chunk).sum(), (0, 1))
        return jax.jit(loss).lower(x, head, targets).compile().memory_analysis()

    all_logits = 8192 * 4096 * 4
    assert temporaries(256).temp_size_in_bytes < all_logits / 8
    assert temporaries(8192).temp_size_in_bytes > all_logits


def test_parameters_do_not_depend_on_the_mesh():
    config = small()
    reference = jax.tree.map(np.asarray, forward(config)[0])
    split = dataclasses.replace(
        config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=2, tensor=2)
    )
    params = toy.model_of(split, 4).init(seed=0)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, params), reference)
    gate = params["layers"]["mlp"]["gate"].get_value()
    assert gate.sharding.shard_shape(gate.shape) == (3, 16, 24)
