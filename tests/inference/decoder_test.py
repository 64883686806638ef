"""Prefill and decode steps give the hidden states of the training forward pass."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from ops.conformance import FIXED_TOLERANCE
from ops.interpreter import ON_GPU
from small_models import MODELS, hidden_states, meshes, random_params, rest_slow, small

from lucid_jax.config import Config
from lucid_jax.inference.decoder import Decoder, DecoderParams
from lucid_jax.models.language_model import LanguageModel

LENGTHS = (37, 5, 21, 1)
SIZE = 40
ALL = np.full(len(LENGTHS), SIZE, np.int32)


@functools.cache
def setting(config: Config):
    """Returns a decoder, its parameters, tokens `[B,SIZE]` and the expected hidden states."""
    model = toy.model_of(config)
    params = random_params(model)
    tokens = np.random.default_rng(0).integers(0, 64, (len(LENGTHS), SIZE)).astype(np.int32)
    return *compiled(model), tokens, np.asarray(hidden_states(model)(params, tokens))


class Compiled:
    """The jitted functions of a decoder."""

    def __init__(self, decoder: Decoder):
        self.prefill, self.step = jax.jit(decoder.prefill), jax.jit(decoder.step)
        self.init_cache = jax.jit(decoder.attention.init_cache, static_argnums=(0, 1))


def compiled(model: LanguageModel) -> tuple[Compiled, DecoderParams]:
    decoder = Decoder(model)
    return Compiled(decoder), jax.jit(decoder.prepare)(random_params(model))


def abstract(config: Config, batch: int, size: int):
    """Returns a decoder, and the shapes of its parameters and cache."""
    model = toy.model_of(config)
    decoder = Decoder(model)
    params = jax.eval_shape(decoder.prepare, model.abstract_params)
    return decoder, params, jax.eval_shape(lambda: decoder.attention.init_cache(batch, size))


def assert_close(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error <= FIXED_TOLERANCE["float32"]


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(x, marks=() if x in ("lucid", "pattern", "path") else pytest.mark.slow)
        for x in MODELS
    ],
)
def test_prefill_and_steps_equal_the_forward_pass(model):
    """Prompts of different lengths are padded to the longest, then continue each on its own."""
    decoder, params, tokens, expected = setting(small(**MODELS[model]))
    cache = decoder.init_cache(len(LENGTHS), SIZE)
    prompt = max(LENGTHS)
    padded = np.where(np.arange(prompt) < np.array(LENGTHS)[:, None], tokens[:, :prompt], 9)
    positions = np.broadcast_to(np.arange(prompt), padded.shape)
    lengths = np.array(LENGTHS, np.int32)
    x, cache = decoder.prefill(params, cache, padded, positions, lengths, None)
    x = np.asarray(x)
    for states, expected_states, length in zip(x, expected, LENGTHS):
        assert_close(states[:length], expected_states[:length])

    while (is_new := lengths < SIZE).any():
        # Sequences whose cache is full write their last token again. In a PaTH cache it would
        # carry the keys again.
        checked = is_new if model == "path" else ...
        lengths = np.minimum(lengths, SIZE - 1)
        batch = np.arange(len(LENGTHS))
        x, cache = decoder.step(params, cache, tokens[batch, lengths], lengths)
        assert_close(np.asarray(x)[checked], expected[batch, lengths][checked])
        lengths = lengths + 1


@pytest.mark.parametrize("model", rest_slow("pattern", "differential", "beta"))
@pytest.mark.parametrize("chunk", rest_slow(8, 7, 1))
def test_chunked_prefill_gives_the_same_cache(chunk, model):
    decoder, params, tokens, expected = setting(small(**MODELS[model]))

    def prefill(chunk):
        cache = decoder.init_cache(len(LENGTHS), SIZE + 9)
        states = []
        for start in range(0, SIZE, chunk):
            part = slice(start, start + chunk)
            positions = np.broadcast_to(np.arange(SIZE), tokens.shape)[:, part]
            length = np.int32(start) if start else None
            x, cache = decoder.prefill(params, cache, tokens[:, part], positions, ALL, length)
            states.append(x)
        return np.concatenate(states, 1), cache

    (_, whole), (states, cache) = prefill(SIZE), prefill(chunk)
    assert_close(states, expected)
    jax.tree.map(assert_close, cache, whole)


def test_parameters_are_cast_to_the_compute_dtype_and_norms_are_not():
    config = small(compute_dtype="bfloat16")
    decoder, params, tokens, expected = setting(config)
    dtypes = {x.dtype.name for x in jax.tree.leaves(params)}
    assert dtypes == {"bfloat16", "float32"}
    assert all((x.dtype == jnp.float32) == (x.ndim == 1) for x in jax.tree.leaves(params))
    assert len({leaf.shape for leaf in jax.tree.leaves(params.layers)}) > 1
    cache = decoder.init_cache(len(LENGTHS), SIZE)
    positions = np.broadcast_to(np.arange(SIZE), tokens.shape)
    x, _ = decoder.prefill(params, cache, tokens, positions, ALL, None)
    assert x.dtype == jnp.bfloat16
    error = np.linalg.norm(np.float32(x) - np.float32(expected)) / np.linalg.norm(expected)
    assert error < 0.02


@pytest.mark.parametrize("kind", rest_slow("lucid", "softmax", "differential", "path"))
def test_steps_update_the_cache_in_place(kind):
    fields = {"positions": "path"} if kind == "path" else {"attention": kind}
    config = small(implementation="xla", **fields)
    decoder, params, cache = abstract(config, batch=3, size=4096)

    def steps(params, cache, tokens, lengths):
        def step(i, carry):
            x, cache = decoder.step(params, carry[1], tokens, lengths + i)
            return x, cache

        x = jnp.zeros((3, config.model.embed_dim))
        return jax.lax.fori_loop(0, 5, step, (x, cache))

    ids = jax.ShapeDtypeStruct((3,), jnp.int32)
    text = jax.jit(steps, donate_argnums=1).lower(params, cache, ids, ids).compile().as_text()
    heads = 4 if kind == "differential" else 2
    assert f"f32[3,{heads},4096,8]" in text
    assert not re.search(rf"= f32\[3,{heads},4096,8\]\S* copy\(", text)


@pytest.mark.skipif(ON_GPU, reason="the error names a missing GPU")
def test_a_configured_implementation_that_cannot_run_raises():
    decoder, params, cache = abstract(small(implementation="triton"), batch=1, size=SIZE)
    ids = jax.ShapeDtypeStruct((1,), jnp.int32)
    with pytest.raises(ValueError, match="'triton' cannot run this call: it needs a GPU"):
        jax.eval_shape(decoder.step, params, cache, ids, ids)


_CONTEXT = meshes({"tensor": 2, "context": 2, "fsdp": 1}, {"fsdp": 2, "context": 2})


@pytest.mark.parametrize("model", rest_slow("pattern", "differential", "beta"))
@pytest.mark.parametrize("mesh", _CONTEXT)
def test_context_parallelism_gives_the_hidden_states_of_one_device(mesh, model):
    assert_same_on_a_mesh(mesh, model)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", meshes({"tensor": 2, "fsdp": 2}, {"data": 4, "fsdp": 1}))
def test_a_mesh_gives_the_hidden_states_of_path_on_one_device(mesh):
    assert_same_on_a_mesh(mesh, "path")


def assert_same_on_a_mesh(mesh, model):
    single = small(**MODELS[model])
    config = dataclasses.replace(single, mesh=dataclasses.replace(single.mesh, stripe=3, **mesh))
    _, _, tokens, expected = setting(single)
    devices = int(np.prod(list(mesh.values())))
    model = toy.model_of(config, devices)
    decoder, params = compiled(model)
    cache = decoder.init_cache(len(LENGTHS), SIZE)
    prompt = max(LENGTHS)
    stripes = model.layout.stripes(prompt)
    inputs = stripes.apply({
        "tokens": tokens[:, :prompt],
        "positions": np.broadcast_to(np.arange(prompt), (len(LENGTHS), prompt)),
    })  # fmt: skip
    lengths, batch = np.array(LENGTHS, np.int32), np.arange(len(LENGTHS))
    x, cache = decoder.prefill(params, cache, *inputs.values(), lengths, None)
    assert_close(stripes.restore(np.asarray(x)), expected[:, :prompt])
    for _ in range(3):
        x, cache = decoder.step(params, cache, tokens[batch, lengths], lengths)
        assert_close(x, expected[batch, lengths])
        lengths += 1
