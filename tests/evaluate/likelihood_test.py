"""Log-likelihoods match the training loss for any batch, order and mesh."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import toy

from lucid_jax.config import MESH_AXES
from lucid_jax.data import BatchLoader, load_tokenizer
from lucid_jax.evaluate.likelihood import Continuation, Likelihood
from lucid_jax.evaluate.loss import LossEvaluator


@pytest.fixture(scope="module")
def config(corpus):
    model = {"vocab_size": 264, "num_kv_heads": 4, "init_std": 0.2}
    return toy.toy_config(corpus, model=model, mesh={"stripe": 5}, data={"packing": "document"})


@pytest.fixture(scope="module")
def params(config):
    return toy.model_of(config).init(seed=0)


@pytest.fixture(scope="module")
def continuations():
    """Continuations in two length buckets, unordered."""
    rng = np.random.default_rng(0)
    sizes = [(9, 3), (100, 1), (2, 1), (64, 63), (70, 40), (33, 33 - 1)]
    return [Continuation(rng.integers(0, 264, n).tolist(), counted) for n, counted in sizes]


def test_matches_log_probabilities_from_all_logits(config, params, continuations):
    log_probabilities = toy.log_probabilities(config, params, size=100)
    # One greedy continuation, and one that differs from it in a token.
    greedy = [5, 6]
    for _ in range(3):
        greedy.append(int(log_probabilities(greedy)[-1].argmax()))
    almost = [*greedy[:-2], (greedy[-2] + 1) % 264, greedy[-1]]
    continuations = [Continuation(greedy, 3), *continuations, Continuation(almost, 3)]
    counts = []
    found = Likelihood(config, toy.model_of(config), params)(continuations, counts.append)
    assert sum(counts) == len(continuations)
    for (likelihood, _), continuation in zip(found, continuations, strict=True):
        logs = log_probabilities(continuation.tokens[:-1])
        expected = logs[np.arange(len(logs)), continuation.tokens[1:]][-continuation.counted :]
        assert likelihood == pytest.approx(expected.sum(), rel=1e-5)
    assert [is_greedy for _, is_greedy in found] == [True, *[False] * 7]


@pytest.mark.slow
def test_matches_on_a_mesh(config, params, continuations):
    continuations = [x for x in continuations if len(x.tokens) < 66]
    # The most likely token and the next, from both halves of the vocabulary.
    log_probabilities = toy.log_probabilities(config, params, size=100)
    for context in np.random.default_rng(1).integers(0, 264, (8, 3)).tolist():
        order = log_probabilities(context)[-1].argsort()
        continuations += [Continuation([*context, int(order[-n])], 1) for n in (1, 2)]
    expected = Likelihood(config, toy.model_of(config), params)(continuations)
    sizes = dict(zip(MESH_AXES, (1, 2, 2, 2)))
    split = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))
    model = toy.model_of(split, 8)
    sharded = jax.tree.map(
        lambda x, y: jax.device_put(x, y.sharding), params, model.abstract_params
    )
    found = Likelihood(split, model, sharded)(continuations)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], rel=1e-5)
    assert [x for _, x in found] == [x for _, x in expected]
    assert [x for _, x in found][-16:] == [True, False] * 8


@pytest.mark.slow
def test_matches_the_evaluation_loss(config, params):
    """The total over all documents, with BOS and EOS, is the loss of an evaluation."""
    model = toy.model_of(config)
    layout, tokenizer = model.layout, load_tokenizer("bytes")
    whole = dataclasses.replace(config, eval_batches=6)
    loader = BatchLoader(
        whole, tokenizer, layout.sharding("batch", "sequence"), split="eval",
        stripes=layout.stripes(config.data.sequence_length),
    )  # fmt: skip
    report = LossEvaluator(whole, model, loader)(params)
    files = pathlib.Path(config.data.eval.removeprefix("text:")).glob("*.txt")
    texts = [file.read_text(encoding="utf-8") for file in files]
    documents = [
        [tokenizer.bos_id, *tokenizer.encode(text).tolist(), tokenizer.eos_id][:65]
        for text in texts
    ]
    found = Likelihood(config, model, params)([Continuation(x, len(x) - 1) for x in documents])
    assert report.tokens == sum(len(x) - 1 for x in documents)
    assert -sum(x for x, _ in found) / report.tokens == pytest.approx(report.loss, rel=1e-5)
