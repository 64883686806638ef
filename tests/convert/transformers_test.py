"""Exported models run in transformers: our logits, and generation with a cache."""

import numpy as np
import pytest
import toy
from convert.llama_fixtures import LLAMA, MODELS
from ops import oracle
from ops.cases import CASES
from ops.conformance import FIXED_TOLERANCE
from safetensors.numpy import load_file
from small_models import MODELS as OURS
from small_models import hidden_states, random_params, small

from lucid_jax.checkpoint.manager import save_params
from lucid_jax.convert.from_hf import from_hf
from lucid_jax.convert.to_hf import to_hf

REASON = "needs torch and transformers: pip install torch 'transformers>=5'"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

pytestmark = pytest.mark.slow
# The models are too small to share among threads, which would wait on other tests' cores.
torch.set_num_threads(1)

EXPORTED = {
    "lucid": {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_length": 64},
    "pattern": {**OURS["pattern"], "rope_scaling": "linear", "rope_factor": 4.0},
    "biases and norms": OURS["biases and norms"],
    "without positions": {"attention": "softmax,lucid", "positions": "none", "qk_norm": "paper"},
}
# Two blocks of the solve.
S, PROMPT, NEW = 200, 150, 20


def load(directory, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=True, **settings
    )


def logits_of(model, tokens, **settings) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(tokens), **settings).logits.numpy()


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


class Exported:
    """A random model of ours, exported, and random tokens `[2,S]`."""

    def __init__(self, config, directory):
        model = toy.model_of(config)
        self.params = random_params(model)
        save_params(directory / "work", config, 0, self.params)
        to_hf(directory / "work", directory / "out")
        self.directory = directory / "out"
        # transformers takes token 0 for padding.
        self.tokens = np.random.default_rng(0).integers(1, 64, (2, S))
        self._hidden_states, self._head = hidden_states(model), model.merge(self.params).head

    def logits(self, tokens) -> np.ndarray:
        """Computes our logits; padding at the end, to one shape, changes nothing."""
        batch, length = tokens.shape
        padded = np.pad(tokens, ((0, 2 - batch), (0, S - length)))
        return np.asarray(self._hidden_states(self.params, padded) @ self._head)[:batch, :length]


@pytest.fixture(scope="module", params=EXPORTED)
def exported(request, tmp_path_factory):
    return Exported(small(**EXPORTED[request.param]), tmp_path_factory.mktemp("exported"))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_ours(exported, attention):
    model = load(exported.directory, attn_implementation=attention)
    tokens = exported.tokens
    expected = exported.logits(tokens)
    assert_close(logits_of(model, tokens), expected)
    # Padding on either side, whose tokens are those of no document.
    left, right = np.roll(tokens, 37, 1), np.roll(tokens, 37, 1)[:, ::-1].copy()
    mask = np.ones((2, S), np.int64)
    mask[1, :37] = 0
    left[0] = tokens[0]
    assert_close(
        logits_of(model, left, attention_mask=torch.tensor(mask))[mask == 1],
        np.concatenate([expected[0], exported.logits(left[1:, 37:])[0]]),
    )
    mask = mask[:, ::-1].copy()
    assert_close(
        logits_of(model, right, attention_mask=torch.tensor(mask))[1, :-37],
        exported.logits(right[1:, :-37])[0],
    )
    # Positions that start again begin another document.
    positions = torch.cat([torch.arange(120), torch.arange(S - 120)])[None]
    packed = logits_of(model, tokens[:1], position_ids=positions, use_cache=False)
    assert_close(packed[:, :120], expected[:1, :120])
    assert_close(packed[:, 120:], exported.logits(tokens[:1, 120:]))
    # Angles are exact at any position.
    positions = 1_000_000 + torch.arange(S)[None]
    assert_close(logits_of(model, tokens, position_ids=positions), expected)


def test_generation_follows_our_logits(exported):
    model = load(exported.directory)

    def generate(tokens, **settings):
        settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | settings
        return model.generate(torch.as_tensor(tokens), pad_token_id=0, **settings).numpy()

    prompts = exported.tokens[:, :PROMPT]
    found = generate(prompts)
    np.testing.assert_array_equal(
        found[:, PROMPT:], exported.logits(found)[:, PROMPT - 1 : -1].argmax(-1)
    )
    for settings in ({"use_cache": False}, {"prefill_chunk_size": 64}):
        np.testing.assert_array_equal(generate(prompts, **settings), found)
    beams = {"num_beams": 3}
    np.testing.assert_array_equal(
        generate(prompts, **beams), generate(prompts, **beams, use_cache=False)
    )
    # Prompts of unequal lengths, padded on the left.
    padded, mask = np.zeros_like(prompts), np.ones_like(prompts)
    padded[0], padded[1, 37:], mask[1, :37] = prompts[0], prompts[1, :-37], 0
    both = generate(padded, attention_mask=torch.tensor(mask))
    np.testing.assert_array_equal(both[0], found[0])
    np.testing.assert_array_equal(both[1, 37:], generate(prompts[1:, :-37])[0])
    with pytest.raises(ValueError, match="needs a plain DynamicCache; got StaticCache"):
        generate(prompts, cache_implementation="static")


def test_an_exported_model_loads_by_its_code_alone(exported):
    with pytest.raises(ValueError, match="contains custom code"):
        transformers.AutoModelForCausalLM.from_pretrained(
            exported.directory, trust_remote_code=False
        )


def test_a_model_saved_by_transformers_comes_back(exported, tmp_path):
    load(exported.directory).save_pretrained(tmp_path / "saved")
    expected = exported.logits(exported.tokens)
    assert_close(logits_of(load(tmp_path / "saved"), exported.tokens), expected)
    from_hf(tmp_path / "saved", tmp_path / "work")


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_of_a_known_type_keeps_its_logits(name, tmp_path):
    from_hf(LLAMA / name, tmp_path / "work", MODELS[name][0])
    to_hf(tmp_path / "work", tmp_path / "out")
    expected = load_file(LLAMA / name / "expected.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    np.testing.assert_allclose(
        logits_of(model, expected["tokens"]), expected["logits"], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("dtype", FIXED_TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_preconditioning_is_the_oracles(case, dtype):
    from lucid_jax.convert.modeling_lucid_llama import precondition

    values = case.draw()
    ids = values["segment_ids"]
    k, v = (values[name].astype(dtype) for name in "kv")
    expected = oracle.precondition(k, v, ids).swapaxes(1, 2)
    k, v = (torch.tensor(x.swapaxes(1, 2)) for x in (k, v))
    half = case.length // 3
    visible = None if ids is None else torch.tensor(ids[:, None, :, None] == ids[:, None, None, :])
    parts = [k[:, :, :0], v[:, :, :0]]
    for tokens in (slice(0, half), slice(half, None)):
        seen = None if visible is None else visible[:, :, tokens, : tokens.stop]
        y = precondition(k[:, :, tokens], v[:, :, tokens], (parts[0], parts[1]), seen)
        parts = [k[:, :, : tokens.stop], torch.cat([parts[1], y], 2)]
    error = np.linalg.norm(parts[1].numpy() - expected) / np.linalg.norm(expected)
    assert error < FIXED_TOLERANCE[dtype]
