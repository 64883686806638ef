"""Generated retrieval: every answer can be found, and runs leave models that are restored."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.retrieval import explore, report, study
from experiments.retrieval.runs import (
    Run,
    Stage,
    execute,
    layout_of,
    steps_to,
    training_rows,
)
from experiments.retrieval.task import Retrieval
from lucid_jax.checkpoint import restore_params
from lucid_jax.data.tokenizer import ByteTokenizer
from lucid_jax.model import abstract_model
from lucid_jax.train_step import init_state, make_train_step
from lucid_jax.workdir import read_config

TASK = Retrieval(length=72, digits=2, alphabet=3, needles=6, queries=4)


@pytest.mark.parametrize("needles", [1, 3, 6])
@pytest.mark.parametrize("echo", [False, True])
def test_every_answer_stands_once_before_its_question(needles, echo):
    task = dataclasses.replace(TASK, echo=echo)
    texts, answers = task.rows(np.random.default_rng(0), 8, needles)
    assert (answers.sum(1) == min(needles, task.queries)).all()
    for row, answer in zip(texts, answers):
        assert row[0] == ByteTokenizer.bos_id
        text = " " + ByteTokenizer().decode(row)
        haystack = text[: -task.asked_tokens]
        pairs = re.findall(r"(\d\d)([A-Z])" + (r"\1" if echo else ""), haystack)
        assert len(pairs) == len(dict(pairs)) == needles
        for end in np.flatnonzero(answer):
            assert dict(pairs)[text[end - 2 : end]] == text[end]


def test_needles_and_order_are_drawn():
    task = dataclasses.replace(TASK, in_order=0.5)
    texts, answers = task.rows(np.random.default_rng(0), 200)
    assert set(answers.sum(1).tolist()) == {1, 2, 4}
    in_order = 0
    for row, answer in zip(texts, answers):
        text = " " + ByteTokenizer().decode(row)
        where = [text.index(text[end - 2 : end]) for end in np.flatnonzero(answer)]
        in_order += answer.sum() == 4 and where == sorted(where)
    four = (answers.sum(1) == 4).sum()
    assert 0.3 * four < in_order < 0.7 * four


def test_answers_weigh_most_and_targets_follow_tokens():
    text, answers = TASK.rows(np.random.default_rng(0), 4)
    batch = TASK.batch(jnp.asarray(text), jnp.asarray(answers))
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    weights = np.where(answers[:, 1:], 1, np.float32(0.1))
    np.testing.assert_array_equal(batch["weights"], weights)


def test_more_needles_than_places_are_refused():
    with pytest.raises(ValueError, match="72 tokens have 20 places, 2 digits of 3 values 9 keys"):
        dataclasses.replace(TASK, needles=10)


MODEL = (
    ("num_layers", 1), ("embed_dim", 16), ("mlp_dim", 32), ("num_heads", 2), ("num_kv_heads", 1),
    ("head_dim", 8), ("compute_dtype", "float32"),
)  # fmt: skip


def test_the_study_trains_evaluates_saves_and_reports(tmp_path, monkeypatch, capsys):
    """One variant at two rates; the model of the first comes back from its directory."""
    task = dataclasses.replace(TASK, needles=4)
    runs = [
        Run("toy", "lucid", (Stage(task, 8, 4),), rate, model=MODEL, chunk=2)
        for rate in (1e-3, 1e-2)
    ]
    monkeypatch.setattr(study, "runs", lambda: runs)
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
    config = read_config(tmp_path / "models/toy-lucid")
    _, abstract = abstract_model(config.model, layout_of(config))
    step, params, _ = restore_params(tmp_path / "models/toy-lucid", abstract)
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


def test_time_that_is_up_ends_a_search():
    runs = [Run(name, "softmax", (Stage(TASK, 8, 4),), model=MODEL, chunk=2) for name in "ab"]
    ((run, _, record),) = execute(runs, seconds=0)
    assert run.name == "a"
    assert not record["finished"]


def test_a_rate_scales_the_updates_of_the_projects_step():
    """The share taken of an update at rate 1 is what the optimiser does at the rate itself."""
    stage = Stage(TASK, 8, 2)
    run = Run("toy", "softmax", (stage,), 1e-2, model=MODEL, chunk=2)
    config = run.config(stage)
    layout = layout_of(config)
    graph, _ = abstract_model(config.model, layout)
    step = make_train_step(config, graph, layout)
    state = init_state(config, layout)
    text, answers = training_rows(stage, run.seed)
    for one in range(2):
        state, _ = step(state, TASK.batch(jnp.asarray(text[one]), jnp.asarray(answers[one])))
    ((_, found, _),) = execute([run], 100)
    for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(state.params)):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_forms_are_searched_side_by_side(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(explore, "SCALES", (1.0,))
    path = tmp_path / "explore.json"
    model = {**dict(MODEL), "implementation": "reference"}
    explore.explore({"form": TASK}, {"rows": 8, "steps": 2}, model, 100, path)
    (record,) = json.loads(path.read_text())["records"]
    assert set(record["curve"][0]) == {"1e-03/1", "3e-03/1"}
    assert "form: 1e-03/1" in capsys.readouterr().out
