"""Generated retrieval: every answer can be found, and runs leave models that are restored."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.retrieval import explore, report, study
from experiments.retrieval.runs import Run, Stage, layout_of, steps_to
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


def test_the_study_trains_evaluates_saves_and_reports(tmp_path, monkeypatch, capsys):
    """One variant at two rates; the model at one of them comes back from its directory."""
    task = dataclasses.replace(TASK, needles=4)
    runs = [
        Run("toy", "lucid", (Stage(task, 8, 4),), rate, model=MODEL, chunk=2)
        for rate in (1e-3, 1e-2)
    ]
    monkeypatch.setattr(study, "runs", lambda: runs)
    monkeypatch.setattr(study, "SAVED", {("toy", 1e-3, 0)})
    monkeypatch.setattr(study, "_EVAL_LENGTHS", (96,))
    monkeypatch.setattr(study, "_EVAL_TOKENS", 96)
    study.main(["--part=0/1", f"--out={tmp_path}"])
    assert capsys.readouterr().out.count("lucid") == 2
    study.main(["--report", f"--out={tmp_path}"])
    assert "| toy | lucid | 0.0" in capsys.readouterr().out
    merged = json.loads((tmp_path / "study.json").read_text())
    assert merged["environment"]["versions"]["flax"]
    for record in merged["records"]:
        assert [c["step"] for c in record["curve"]] == [2, 4]
        assert {n: set(x) for n, x in record["evaluation"].items()} == {
            "72": {"1", "2", "4", "8", "9"}, "96": {"1", "2", "4", "8", "9"},
        }  # fmt: skip
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    config = read_config(tmp_path / "models/lucid")
    _, abstract = abstract_model(config.model, layout_of(config))
    step, params, _ = restore_params(tmp_path / "models/lucid", abstract)
    assert step == 4
    again = study.evaluate(runs[0], params)
    assert again == merged["records"][0]["evaluation"]


def test_the_best_rate_has_the_highest_accuracy_then_the_fewest_steps():
    def record(rate, accuracies, seed):
        run = {"name": "x", "attention": "lucid", "temperature": 1.0, "learning_rate": rate,
               "seed": seed, "stages": [{"task": {"needles": 8}}]}  # fmt: skip
        curve = [{"step": 10 * i, "accuracy": {"8": a}} for i, a in enumerate(accuracies, 1)]
        return {"run": run, "curve": curve, "seconds_per_step": 0.5}

    slow = [record(1e-4, (0.1, 0.6, 1.0), seed) for seed in (0, 1)]
    fast = [record(1e-3, (0.1, 1.0, 1.0), 0), record(1e-3, (0.99, 1.0, 1.0), 1)]
    bad = [record(1e-2, (1.0, 1.0, 0.5), seed) for seed in (0, 1)]
    assert report.best_rates([*slow, *fast, *bad]) == [fast]
    assert steps_to(fast[0], 0.5, 8) == 20
    assert steps_to(bad[0], 1.1, 8) is None
    assert "| 15 (10–20) | 15 (10–20) | 15 (10–20) | 500.0 | 7.5 (5.0–10.0)" in report.table(fast)


def test_time_that_is_up_stops_a_search(tmp_path, capsys):
    run = Run("toy", "softmax", (Stage(TASK, 8, 4),), model=MODEL, chunk=2)
    assert explore.explore([run], 0, tmp_path / "explore.json") == []
    assert "stopped by the clock in toy softmax" in capsys.readouterr().out


def test_the_search_is_of_pairs():
    runs = explore.runs()
    for softmax, lucid in zip(runs[::2], runs[1::2]):
        assert dataclasses.replace(softmax, attention="lucid") == lucid
