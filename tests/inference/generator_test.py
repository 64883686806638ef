"""Generation: end tokens, batches, chunked prefill, meshes, sampling, and error messages."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import toy
from small_models import MODELS, hidden_states, meshes, random_params, small

from lucid_jax.config import ConfigError, MeshConfig
from lucid_jax.inference import generator as generate
from lucid_jax.inference.generator import STEPS_PER_CALL, Generator
from lucid_jax.inference.sampling import Sampling

pytestmark = pytest.mark.usefixtures("compilation_cache")


CONFIG = small(**MODELS["pattern"])
NEW = STEPS_PER_CALL + 5
PROMPTS = [np.random.default_rng(n).integers(0, 64, n).tolist() for n in (5, 70, 1, 33, 20)]


def generator(config=CONFIG, devices: int = 1, **arguments) -> Generator:
    model = toy.model_of(config, devices)
    return Generator(model, random_params(model), **arguments)


@functools.cache
def plain() -> Generator:
    return generator()


@functools.cache
def completions() -> list[list[int]]:
    return plain()(PROMPTS, NEW)


def test_greedy_completions_match_the_forward_pass():
    assert_greedy(CONFIG, completions())


def assert_greedy(config, completions):
    """Asserts that each token of a completion is the most likely of the whole forward pass."""
    model = toy.model_of(config)
    params = random_params(model)
    tokens = np.zeros((len(PROMPTS), 70 + NEW), np.int32)
    for sequence, prompt, completion in zip(tokens, PROMPTS, completions, strict=True):
        assert len(completion) == NEW
        sequence[: len(prompt) + NEW] = prompt + completion
    logits = hidden_states(model)(params, tokens) @ model.merge(params).head
    found = np.argmax(logits, -1)
    for sequence, prompt, completion in zip(found, PROMPTS, completions):
        assert sequence[len(prompt) - 1 : len(prompt) + NEW - 1].tolist() == completion


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["path", "beta"])
def test_variants_complete_as_their_forward_pass(variant):
    config = small(**MODELS[variant])
    found = generator(config)(PROMPTS, NEW)
    assert_greedy(config, found)
    # Prompts of PaTH are never split.
    assert generator(config, chunk=9)(PROMPTS, NEW) == found
    mesh = dataclasses.replace(config.mesh, data=2, tensor=2, fsdp=1)
    assert generator(dataclasses.replace(config, mesh=mesh), 4)(PROMPTS, NEW) == found


@pytest.mark.slow
def test_chunked_prefill_does_not_change_completions():
    assert generator(chunk=9)(PROMPTS, NEW) == completions()


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", meshes({"data": 2, "tensor": 2, "fsdp": 1}, {"context": 2, "fsdp": 1})
)
def test_a_mesh_does_not_change_completions(mesh):
    # Five prompts make a batch of eight; stripes of 5 tokens pad the sequences and the cache.
    config = dataclasses.replace(CONFIG, mesh=dataclasses.replace(CONFIG.mesh, stripe=5, **mesh))
    assert generator(config, int(np.prod(list(mesh.values()))))(PROMPTS, NEW) == completions()


def test_an_end_token_ends_its_own_completion_only(monkeypatch):
    ends = {completions()[0][0], completions()[1][STEPS_PER_CALL + 1]}
    ending = generator(end_ids=ends)

    def until_end(ids):
        return ids[: next((i for i, token in enumerate(ids) if token in ends), None)]

    found = ending(PROMPTS, NEW)
    assert found == [until_end(ids) for ids in completions()]
    assert found[0] == []
    assert len({len(ids) for ids in found}) > 2
    # Once all completions are done, no further step runs.
    monkeypatch.setattr(ending, "_steps", lambda *a: pytest.fail("took a step"))
    assert ending(PROMPTS[:1], NEW) == [[]]


def test_finished_is_called_between_device_calls():
    calls = []

    def finished(i, ids):
        calls.append((i, len(ids)))
        return i == 1 and len(ids) > 1

    found = plain()(PROMPTS, NEW, finished)
    middle = 1 + STEPS_PER_CALL
    assert found == [completions()[0], completions()[1][:middle], *completions()[2:]]
    assert [call for call in calls if call[0] < 2] == [
        (0, 1), (1, 1), (0, middle), (1, middle), (0, NEW),
    ]  # fmt: skip


@pytest.mark.slow
def test_lengths_of_one_bucket_share_compiled_functions():
    ours = generator()
    for lengths in ((3, 40), (50, 9), (49,), (10, 20)):
        ours([PROMPTS[1][:n] for n in lengths], 8)
    assert ours._steps._cache_size() == 2  # Batches of one and two.
    sizes = range(1, 5000)
    assert all(n <= generate._bucket(n) <= max(n + 63, 1.25 * n) for n in sizes)
    assert len({generate._bucket(n) for n in sizes}) < 30


def test_samples_are_reproducible_and_differ_by_prompt_and_seed():
    prompts = [PROMPTS[0]] * 3 + PROMPTS[3:4]
    # At this temperature the tokens depend on the random numbers only.
    ours = generator(sampling=Sampling(temperature=1e6))
    found = ours(prompts, NEW)
    assert len(set(map(tuple, found))) == 4
    assert all(len(set(ids)) > NEW / 2 for ids in found)
    assert ours(prompts, NEW) == found
    # The other prompts of the batch make no difference.
    assert ours([PROMPTS[3], PROMPTS[4], PROMPTS[0]], NEW)[::2] == [found[3], found[0]]
    other = generator(sampling=Sampling(temperature=1e6, seed=1))(prompts, NEW)
    assert all(a != b for a, b in zip(other, found))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6), (5, 0.6), (1000, 0.01)])
def test_sampling_has_the_expected_distribution(top_k, top_p):
    sampling = Sampling(temperature=1.5, top_k=top_k, top_p=top_p)
    logits = 2 * np.random.default_rng(0).normal(size=12).astype(np.float32)
    probability = np.exp(logits / 1.5) / np.exp(logits / 1.5).sum()
    expected = np.zeros(12)
    order = np.argsort(-probability)[: top_k or None]
    for token in order:
        if expected.sum() < top_p * probability[order].sum():
            expected[token] = probability[token]
    expected /= expected.sum()

    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    drawn = jax.jit(sampling.choose)(np.broadcast_to(logits, (count, 12)), keys)
    found = np.bincount(drawn, minlength=12) / count
    assert (found[expected == 0] == 0).all()
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / count))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("temperature must be 0 or more; got -1", lambda: Sampling(temperature=-1)),
        ("temperature must be 0 or more; got nan", lambda: Sampling(temperature=float("nan"))),
        ("top_k must be 0 or more; got -2", lambda: Sampling(1.0, top_k=-2)),
        (r"top_p must be in \(0, 1\]; got 0", lambda: Sampling(1.0, top_p=0)),
        ("need a temperature above 0; got top_k=5, top_p=1.0", lambda: Sampling(top_k=5)),
        ("prompt 1 is empty", lambda: plain()([[1], []], 3)),
        ("prompt 0 has token 64, but the vocabulary has 64", lambda: plain()([[3, 64]], 3)),
        ("prompt 0 has token -1", lambda: plain()([[-1]], 3)),
        ("prompt 0 must be a sequence of token ids; got int", lambda: plain()([1, 2], 3)),
        ("prompt 0 must be a sequence .*; got list", lambda: plain()([[[1]]], 3)),
        ("prompt 0 must hold integers; got float64", lambda: plain()([[1, 1.5]], 3)),
        ("max_new_tokens must be an integer; got 3.0", lambda: plain()([[1]], 3.0)),
        ("max_new_tokens must be positive; got 0", lambda: plain()([[1]], 0)),
        ("an end has token 99", lambda: generator(end_ids=[99])),
        ("chunk must be positive; got 0", lambda: generator(chunk=0)),
        (
            "decodes whole sequences: expected mesh.context = 1; got 2",
            lambda: generator(
                dataclasses.replace(small(**MODELS["path"]), mesh=MeshConfig(fsdp=1, context=2)), 2
            ),
        ),
        (
            "prompt 1 is too long: 5 tokens and 6 new ones are 11, more than 10",
            lambda: generator(max_length=10)([[1] * 4, [1] * 5], 6),
        ),
    ],
)  # fmt: skip
def test_invalid_arguments_raise(message, call):
    with pytest.raises(ConfigError, match=message):
        call()


def test_no_prompts_give_no_completions():
    assert plain()([], 3) == []


@pytest.mark.slow
def test_prompts_may_be_an_array_and_integers_may_have_64_bits():
    prompts = np.stack([PROMPTS[0], PROMPTS[0][::-1]])
    with jax.enable_x64(True):
        assert generator()(prompts, NEW) == plain()(prompts.tolist(), NEW)


def test_a_tiny_temperature_takes_the_most_likely_token():
    logits = jax.random.normal(jax.random.key(1), (4, 50))
    keys = jax.random.split(jax.random.key(0), 4)
    for top_k in (0, 3):
        chosen = Sampling(1e-40, top_k=top_k).choose(logits, keys)
        np.testing.assert_array_equal(chosen, logits.argmax(-1))
