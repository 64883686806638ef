"""Decoding against a cache equals the forward pass of training, at every position."""

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
from small_models import MODELS, random_params, small

from lucid_jax.config import Config
from lucid_jax.inference.decoder import Decoder, DecoderParams
from lucid_jax.models.language_model import LanguageModel

LENGTHS = (37, 5, 21, 1)
SIZE = 40


@functools.cache
def setting(config: Config):
    """The decoder, its parameters, tokens `[B,SIZE]` and the hidden states of training."""
    model = toy.model_of(config)
    params = random_params(model)
    tokens = np.random.default_rng(0).integers(0, 64, (len(LENGTHS), SIZE)).astype(np.int32)

    @jax.jit
    def forward(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(SIZE), tokens.shape)
        return model.merge(params)(tokens, positions, None)[0]

    return *compiled(model), tokens, np.asarray(forward(params, tokens))


class Compiled:
    """The functions of a decoder, each compiled once for its shapes."""

    def __init__(self, decoder: Decoder):
        self.prefill, self.step = jax.jit(decoder.prefill), jax.jit(decoder.step)
        self.empty = jax.jit(decoder.attention.empty, static_argnums=(0, 1))


def compiled(model: LanguageModel) -> tuple[Compiled, DecoderParams]:
    decoder = Decoder(model)
    return Compiled(decoder), jax.jit(decoder.prepare)(random_params(model))


def assert_close(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error <= FIXED_TOLERANCE["float32"]


@pytest.mark.parametrize("model", MODELS)
def test_token_by_token_equals_the_forward_pass(model):
    """Prompts of different lengths, all padded to the longest, then each row on its own."""
    decoder, params, tokens, expected = setting(small(**MODELS[model]))
    cache = decoder.empty(len(LENGTHS), SIZE)
    prompt = max(LENGTHS)
    padded = np.where(np.arange(prompt) < np.array(LENGTHS)[:, None], tokens[:, :prompt], 9)
    positions = np.broadcast_to(np.arange(prompt), padded.shape)
    x, cache = decoder.prefill(params, cache, padded, positions, None)
    x = np.asarray(x)
    for row, length in enumerate(LENGTHS):
        assert_close(x[row, :length], expected[row, :length])

    lengths = np.array(LENGTHS, np.int32)
    while (lengths < SIZE).any():
        # Rows that are full go on writing their last token.
        lengths = np.minimum(lengths, SIZE - 1)
        rows = np.arange(len(LENGTHS))
        x, cache = decoder.step(params, cache, tokens[rows, lengths], lengths)
        assert_close(x, expected[rows, lengths])
        lengths = lengths + 1


@pytest.mark.parametrize("chunk", [1, 7])
def test_any_chunks_give_the_same_cache(chunk):
    decoder, params, tokens, expected = setting(small(**MODELS["pattern"]))

    def read(chunk):
        cache = decoder.empty(len(LENGTHS), SIZE + 9)
        states = []
        for start in range(0, SIZE, chunk):
            part = slice(start, start + chunk)
            positions = np.broadcast_to(np.arange(SIZE), tokens.shape)[:, part]
            here = np.int32(start) if start else None
            x, cache = decoder.prefill(params, cache, tokens[:, part], positions, here)
            states.append(x)
        return np.concatenate(states, 1), cache

    (_, whole), (states, cache) = read(SIZE), read(chunk)
    assert_close(states, expected)
    jax.tree.map(assert_close, cache, whole)


def test_padding_never_reaches_a_token():
    decoder, params, tokens, _ = setting(small())

    def after(padding):
        cache = decoder.empty(len(LENGTHS), SIZE)
        padded = np.where(np.arange(SIZE) < np.array(LENGTHS)[:, None], tokens, padding)
        positions = np.broadcast_to(np.arange(SIZE), padded.shape)
        _, cache = decoder.prefill(params, cache, padded, positions, None)
        lengths = np.array(LENGTHS, np.int32)
        x, _ = decoder.step(params, cache, tokens[:, 0], lengths)
        return np.asarray(x)

    np.testing.assert_array_equal(after(3), after(60))


def test_a_step_reads_parameters_in_the_compute_dtype():
    config = small(compute_dtype="bfloat16")
    decoder, params, tokens, expected = setting(config)
    dtypes = {x.dtype.name for x in jax.tree.leaves(params)}
    assert dtypes == {"bfloat16", "float32"}
    assert all((x.dtype == jnp.float32) == (x.ndim == 1) for x in jax.tree.leaves(params))
    assert len({leaf.shape for leaf in jax.tree.leaves(params.layers)}) > 1
    cache = decoder.empty(len(LENGTHS), SIZE)
    positions = np.broadcast_to(np.arange(SIZE), tokens.shape)
    x, _ = decoder.prefill(params, cache, tokens, positions, None)
    assert x.dtype == jnp.bfloat16
    error = np.linalg.norm(np.float32(x) - np.float32(expected)) / np.linalg.norm(expected)
    assert error < 0.02


@pytest.mark.parametrize("kind", ["softmax", "lucid"])
def test_steps_copy_no_cache(kind):
    """A row is written in place, whatever else reads the cache."""
    config = small(attention=kind, implementation="xla")
    model = toy.model_of(config)
    decoder = Decoder(model)
    params = jax.eval_shape(decoder.prepare, model.abstract_params)
    cache = jax.eval_shape(lambda: decoder.attention.empty(3, 4096))

    def steps(params, cache, tokens, lengths):
        def step(i, carry):
            x, cache = decoder.step(params, carry[1], tokens, lengths + i)
            return x, cache

        x = jnp.zeros((3, config.model.embed_dim))
        return jax.lax.fori_loop(0, 5, step, (x, cache))

    row = jax.ShapeDtypeStruct((3,), jnp.int32)
    text = jax.jit(steps, donate_argnums=1).lower(params, cache, row, row).compile().as_text()
    assert "f32[3,2,4096,8]" in text
    assert not re.search(r"= f32\[3,2,4096,8\]\S* copy\(", text)


@pytest.mark.skipif(ON_GPU, reason="the error names a missing GPU")
def test_the_configured_kernels_run_or_raise():
    config = small(implementation="triton")
    model = toy.model_of(config)
    decoder = Decoder(model)
    params = jax.eval_shape(decoder.prepare, model.abstract_params)
    cache = jax.eval_shape(lambda: decoder.attention.empty(1, SIZE))
    row = jax.ShapeDtypeStruct((1,), jnp.int32)
    with pytest.raises(ValueError, match="'triton' cannot run this call: it needs a GPU"):
        jax.eval_shape(decoder.step, params, cache, row, row)


@pytest.mark.parametrize(
    "mesh", toy.meshes({"tensor": 2, "context": 2, "fsdp": 1}, {"fsdp": 2, "context": 2})
)
def test_devices_share_the_work(mesh):
    """Rows over data and fsdp, heads over tensor, the tokens of the cache over context."""
    one = small(**MODELS["pattern"])
    config = dataclasses.replace(one, mesh=dataclasses.replace(one.mesh, stripe=3, **mesh))
    _, _, tokens, expected = setting(one)
    devices = int(np.prod(list(mesh.values())))
    model = toy.model_of(config, devices)
    decoder, params = compiled(model)
    cache = decoder.empty(len(LENGTHS), SIZE)
    prompt = max(LENGTHS)
    stripes = model.layout.stripes(prompt)
    batch = stripes.apply({
        "tokens": tokens[:, :prompt],
        "positions": np.broadcast_to(np.arange(prompt), (len(LENGTHS), prompt)),
    })  # fmt: skip
    x, cache = decoder.prefill(params, cache, *batch.values(), None)
    assert_close(stripes.restore(np.asarray(x)), expected[:, :prompt])
    lengths, rows = np.array(LENGTHS, np.int32), np.arange(len(LENGTHS))
    for _ in range(3):
        x, cache = decoder.step(params, cache, tokens[rows, lengths], lengths)
        assert_close(x, expected[rows, lengths])
        lengths += 1
