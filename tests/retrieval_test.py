"""Generated retrieval: every answer can be found, and groups leave models that are restored."""

import dataclasses
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.retrieval import report, study
from experiments.retrieval.runs import Group, Stage, first_at, init_states, layout_of, train
from experiments.retrieval.task import Retrieval
from lucid_jax.checkpoint import restore_params
from lucid_jax.data.tokenizer import ByteTokenizer
from lucid_jax.model import abstract_model
from lucid_jax.train_step import init_state, make_train_step
from lucid_jax.workdir import read_config

TASK = Retrieval(length=73, digits=2, alphabet=3, needles=6, queries=4)
KEY = jax.random.key(0)
MODEL = (
    ("num_layers", 1), ("embed_dim", 16), ("mlp_dim", 32), ("num_heads", 2), ("num_kv_heads", 1),
    ("head_dim", 8), ("compute_dtype", "float32"),
)  # fmt: skip


def drawn(task, count, needles=None):
    return jax.device_get(task.rows(KEY, count, needles))


@pytest.mark.parametrize("needles", [1, 3, 6])
def test_every_answer_stands_once_before_its_question(needles):
    texts, answers = drawn(TASK, 8, needles)
    assert texts.shape == answers.shape == (8, TASK.length + 1)
    assert (answers.sum(1) == min(needles, TASK.queries)).all()
    orders = set()
    for row, answer in zip(texts, answers):
        assert row[0] == ByteTokenizer.bos_id
        text = " " + ByteTokenizer().decode(row)
        pairs = re.findall(r"(\d\d)([A-Z])", text[: -TASK.asked_tokens])
        assert len(pairs) == len(dict(pairs)) == needles
        asked = [text[end - 2 : end] for end in np.flatnonzero(answer)]
        assert len(set(asked)) == len(asked)
        for key, end in zip(asked, np.flatnonzero(answer)):
            assert dict(pairs)[key] == text[end]
        orders.add(tuple(list(dict(pairs)).index(key) for key in asked))
    # Questions are in another order than pairs, another one in every row.
    assert len(orders) > needles / 2


def test_needles_are_drawn_and_every_place_is_taken():
    texts, answers = drawn(TASK, 300)
    assert set(answers.sum(1).tolist()) == {1, 2, 4}
    values = (texts >= ord("A")) & (texts <= ord("Z"))
    assert values[:, : -TASK.asked_tokens].sum(1).max() == 6
    assert (values[:, 4 : -TASK.asked_tokens : 3].any(0)).all()


def test_some_rows_repeat_a_sequence_and_have_no_other_answers():
    task = dataclasses.replace(TASK, repeated=0.5)
    texts, answers = drawn(task, 100)
    repeats = 0
    for text, answer in zip(texts, answers):
        first = int(answer.argmax())
        if answer[first:].all() and first > 7:
            period = first - 1
            repeats += 1
            np.testing.assert_array_equal(text[first:], text[first - period : -period])
    assert 35 < repeats < 65
    # What pairs are counted in has none of them.
    assert (drawn(task, 100, 2)[1].sum(1) == 2).all()


def test_answers_weigh_most_and_targets_follow_tokens():
    text, answers = drawn(TASK, 4)
    batch = TASK.batch(jnp.asarray(text), jnp.asarray(answers))
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    weights = np.where(answers[:, 1:], 1, np.float32(0.1))
    np.testing.assert_array_equal(batch["weights"], weights)


def test_more_needles_than_places_are_refused():
    with pytest.raises(ValueError, match="73 tokens have 20 places, 2 digits of 3 values 9 keys"):
        dataclasses.replace(TASK, needles=10)


def toy(**changes):
    """Two stages of two steps, two rates, two seeds."""
    few = dataclasses.replace(TASK, length=27, needles=4, repeated=0.5)
    stages = Stage(few, 4, 2), Stage(dataclasses.replace(TASK, needles=4), 4, 2)
    return dataclasses.replace(
        Group("toy", "lucid", stages, (1e-3, 1e-2), (0, 1), model=MODEL, chunk=2), **changes
    )


def test_the_study_trains_evaluates_saves_and_reports(tmp_path, monkeypatch, capsys):
    """The model of the best rate's first seed comes back from its directory."""
    monkeypatch.setattr(study, "group", lambda setting, variant, seeds: toy())
    monkeypatch.setattr(study, "_EVAL_LENGTHS", (96,))
    monkeypatch.setattr(study, "_EVAL_TOKENS", 96)
    study.main(["--setting=4of4", "--variant=lucid", f"--out={tmp_path}"])
    assert capsys.readouterr().out.count(" lucid  ") == 4
    study.main(["--report", f"--out={tmp_path}"])
    assert "| toy | lucid | 0.0" in capsys.readouterr().out
    merged = json.loads((tmp_path / "study.json").read_text())
    assert merged["environment"]["versions"]["flax"]
    for record in merged["records"]:
        assert [(c["step"], c["stage"]) for c in record["curve"]] == [(2, 0), (4, 1)]
        assert set(record["curve"][0]["accuracy"]) == {"1", "2", "4"}
        assert {n: set(x) for n, x in record["evaluation"].items()} == {
            "73": {"1", "2", "4", "8", "9"}, "96": {"1", "2", "4", "8", "9"},
        }  # fmt: skip
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    workdir = tmp_path / "models/4of4-lucid"
    config = read_config(workdir)
    assert config.seed == 0
    _, abstract = abstract_model(config.model, layout_of(config))
    step, params, _ = restore_params(workdir, abstract)
    assert step == 4
    ((best, *_),) = report.best_rates(merged["records"])
    rate = config.optim.learning_rate
    assert rate == best["run"]["learning_rate"]
    alone = toy(rates=(rate,), seeds=(0,))
    (again,) = study.evaluate(alone, jax.tree.map(lambda x: x[None], params))
    (record,) = (
        r for r in merged["records"] if (r["run"]["learning_rate"], r["run"]["seed"]) == (rate, 0)
    )
    assert again == record["evaluation"]

    # Runs that the clock stopped have none.
    (part,) = tmp_path.glob("study_*.json")
    stopped = json.loads(part.read_text())
    for record in stopped["records"]:
        del record["evaluation"]
        record["finished"] = False
    part.write_text(json.dumps(stopped))
    study.main(["--report", f"--out={tmp_path}"])
    assert "| toy | lucid, stopped at step 4 | 0.0" in capsys.readouterr().out


def test_models_side_by_side_are_those_of_the_projects_step():
    """A model of a group is what the optimiser makes at its rate of its seed's parameters."""
    group = toy()
    states, _ = train(group, time.monotonic() + 100)
    rate, seed = group.models[2]
    first = group.config(group.stages[0], rate, seed)
    state = init_state(first, layout_of(first))
    for x, y in zip(jax.tree.leaves(init_states(group)), jax.tree.leaves(state)):
        np.testing.assert_array_equal(x[2], y)
    for stage in group.stages:
        config = group.config(stage, rate, seed)
        layout = layout_of(config)
        step = make_train_step(config, abstract_model(config.model, layout)[0], layout)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        text, answers = stage.task.rows(key, 8)
        for one in (slice(4), slice(4, 8)):
            state, _ = step(state, stage.task.batch(text[one], answers[one]))
    for x, y in zip(jax.tree.leaves(states.params), jax.tree.leaves(state.params)):
        np.testing.assert_allclose(x[2], y, atol=1e-5)


def test_time_that_is_up_ends_a_group():
    _, records = train(toy(), deadline=0)
    assert [r["finished"] for r in records] == [False] * 4
    assert not records[0]["curve"]


def test_the_best_rate_has_the_highest_accuracy_then_the_fewest_steps():
    def record(rate, accuracies, seed):
        run = {"name": "x", "attention": "lucid", "temperature": 1.0, "learning_rate": rate,
               "seed": seed, "stages": [{"task": {"needles": 8}}]}  # fmt: skip
        curve = [
            {"step": 10 * i, "seconds": 5.0 * i, "accuracy": {"8": a}}
            for i, a in enumerate(accuracies, 1)
        ]
        return {"run": run, "curve": curve, "finished": rate < 1e-2}

    slow = [record(1e-4, (0.1, 0.6, 1.0), seed) for seed in (0, 1)]
    fast = [record(1e-3, (0.1, 1.0, 1.0), 0), record(1e-3, (0.99, 1.0, 1.0), 1)]
    bad = [record(1e-2, (1.0, 1.0, 0.5), seed) for seed in (0, 1)]
    assert report.best_rates([*slow, *fast, *bad]) == [fast]
    assert first_at(fast[0], 0.5, 8)["step"] == report.steps_to(fast[0], 0.5) == 20
    assert report.steps_to(bad[0], 1.1) is None
    assert "| 15 (10–20) | 15 (10–20) | 15 (10–20) | 7.5 (5.0–10.0)" in report.table(fast)
    assert "| lucid, stopped at step 30 | 0.01 |" in report.table(bad)
