"""Generated retrieval: every answer can be found, and runs leave models that are restored."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.retrieval import explore
from experiments.retrieval.runs import Run, Stage, execute, layout_of, save_model, steps_to
from experiments.retrieval.task import Retrieval
from lucid_jax.checkpoint import restore_params
from lucid_jax.data.tokenizer import ByteTokenizer
from lucid_jax.model import abstract_model
from lucid_jax.workdir import read_config

TASK = Retrieval(length=72, digits=2, alphabet=3, needles=6, queries=4)


@pytest.mark.parametrize("needles", [1, 3, 6])
def test_every_answer_stands_once_before_its_question(needles):
    batch, answers = TASK.batch_and_answers(jax.random.key(0), 8, jnp.int32(needles))
    assert (answers.sum(1) == min(needles, TASK.queries)).all()
    for tokens, targets, answer in zip(batch["tokens"], batch["targets"], np.asarray(answers)):
        assert tokens[0] == ByteTokenizer.bos_id
        text = ByteTokenizer().decode(np.append(tokens, targets[-1]))
        haystack = text[: -TASK.queries * TASK.width]
        pairs = re.findall(r"!(\w\w)([A-Z])", haystack)
        assert len(pairs) == len(dict(pairs)) == needles
        for end in np.flatnonzero(answer):
            # The byte at `end` of the text without BOS is the one that target `end` is.
            marker, key, value = text[end - 3], text[end - 2 : end], text[end]
            assert marker == "!"
            assert dict(pairs)[key] == value


def test_needles_are_drawn_and_answers_weigh_most():
    batch, answers = TASK.batch_and_answers(jax.random.key(0), 64)
    assert set(np.asarray(answers.sum(1)).tolist()) == {1, 2, 4}
    np.testing.assert_array_equal(batch["weights"], np.where(answers, 1, np.float32(0.1)))


def test_more_needles_than_places_are_refused():
    with pytest.raises(ValueError, match="72 tokens have 14 places, 2 digits of 3 values 9 keys"):
        dataclasses.replace(TASK, needles=10)


MODEL = (
    ("num_layers", 1), ("embed_dim", 16), ("mlp_dim", 32), ("num_heads", 2), ("num_kv_heads", 1),
    ("head_dim", 8), ("compute_dtype", "float32"),
)  # fmt: skip


def test_runs_are_recorded_and_their_models_restored(tmp_path, capsys):
    run = Run("toy", "lucid", (Stage(TASK, 8, 4),), model=MODEL, chunk=2)
    ((_, state, record),) = execute([run], seconds=100)
    assert [c["step"] for c in record["curve"]] == [2, 4]
    assert steps_to(record, 0.0, 6) == 2
    assert steps_to(record, 1.1, 6) is None
    save_model(tmp_path, run, state)
    config = read_config(tmp_path)
    _, abstract = abstract_model(config.model, layout_of(config))
    step, params, _ = restore_params(tmp_path, abstract)
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_time_that_is_up_stops_a_search(tmp_path, capsys):
    run = Run("toy", "softmax", (Stage(TASK, 8, 4),), model=MODEL, chunk=2)
    assert explore.explore([run], 0, tmp_path / "explore.json") == []
    assert "stopped by the clock in toy softmax" in capsys.readouterr().out


def test_the_search_is_of_pairs():
    runs = explore.runs()
    for softmax, lucid in zip(runs[::2], runs[1::2]):
        assert dataclasses.replace(softmax, attention="lucid") == lucid
