"""Generated retrieval: every answer can be found, and interrupted studies go on."""

import dataclasses
import itertools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.retrieval import report, runs, study
from experiments.retrieval.runs import Group, Stage, Training, build_trainer, init_states
from experiments.retrieval.task import Retrieval
from lucid_jax.data.tokenizer import ByteTokenizer

pytestmark = pytest.mark.usefixtures("compilation_cache")

TASK = Retrieval(length=73, digits=2, alphabet=3, needles=6, queries=4)
KEY = jax.random.key(0)


def drawn(task, count, needles=None):
    return jax.device_get(jax.jit(task.draw, static_argnums=(1, 2))(KEY, count, needles))


@pytest.mark.slow
@pytest.mark.parametrize("needles", [1, 3, 6])
def test_every_answer_stands_once_before_its_question(needles):
    texts, answers = drawn(TASK, 8, needles)
    assert (answers.sum(1) == min(needles, TASK.queries)).all()
    orders = set()
    for tokens, answer in zip(texts, answers):
        assert tokens[0] == ByteTokenizer.bos_id
        text = " " + ByteTokenizer().decode(tokens)
        pairs = re.findall(r"(\d\d)([A-Z])", text[: -TASK.asked_tokens])
        assert len(pairs) == len(dict(pairs)) == needles
        asked = [text[end - 2 : end] for end in np.flatnonzero(answer)]
        assert len(set(asked)) == len(asked)
        for key, end in zip(asked, np.flatnonzero(answer)):
            assert dict(pairs)[key] == text[end]
        orders.add(tuple(list(dict(pairs)).index(key) for key in asked))
    # Questions are in another order than pairs, and in another one in every sequence.
    assert len(orders) > needles / 2
    batch = TASK.batch(jnp.asarray(texts), jnp.asarray(answers))
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    weights = np.where(answers[:, 1:], 1, np.float32(0.1))
    np.testing.assert_array_equal(batch["weights"], weights)


@pytest.mark.slow
def test_numbers_of_needles_and_repeated_texts_are_drawn():
    assert set(drawn(TASK, 300)[1].sum(1).tolist()) == {1, 2, 4}
    repeats = 0
    for text, answer in zip(*drawn(dataclasses.replace(TASK, repeated=0.5), 100)):
        first = int(answer.argmax())
        if answer[first:].all() and first > 7:
            repeats += 1
            np.testing.assert_array_equal(text[first:], text[1 : 1 - first])
    assert 35 < repeats < 65


def test_settings_fit_chunks_and_longer_sequences():
    for name, setting in study.SETTINGS.items():
        group = study.make_group(name, "lucid")
        assert all(stage.steps % group.chunk == 0 for stage in setting.stages)
        last = setting.stages[-1].task
        for factor in study._EVAL_FACTORS:
            task = study.evaluation_task(last, factor * last.length)
            assert last.needles in runs.needle_counts(task)
    with pytest.raises(ValueError, match="73 tokens have 20 places, 2 digits of 3 values 9 keys"):
        dataclasses.replace(TASK, needles=10)


def toy_group():
    """Returns two stages of two steps, two rates, two seeds."""
    few = dataclasses.replace(TASK, length=27, needles=4, repeated=0.5)
    stages = Stage(few, 4, 2), Stage(dataclasses.replace(TASK, needles=4), 4, 2)
    model = (
        ("num_layers", 1), ("embed_dim", 16), ("mlp_dim", 32), ("num_heads", 2),
        ("num_kv_heads", 1), ("head_dim", 8), ("compute_dtype", "float32"),
    )  # fmt: skip
    return Group("toy", "lucid", stages, (1e-3, 1e-2), (0, 1), model=model, chunk=2)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    training = Training(toy_group(), tmp_path_factory.mktemp("uninterrupted"))
    training.run(float("inf"))
    return training


@pytest.mark.slow
def test_a_study_stops_goes_on_and_reports(tmp_path, monkeypatch, capsys, uninterrupted):
    monkeypatch.setattr(study, "make_group", lambda *a: toy_group())
    monkeypatch.setattr(study, "_EVAL_TOKENS", 96)
    monkeypatch.setattr(study, "_EVAL_FACTORS", (1, 2))
    command = ["--setting=4of4", "--variant=lucid", f"--out={tmp_path}"]
    part = tmp_path / "study_4of4-lucid.json"
    with monkeypatch.context() as patch:
        # The time is up after the first chunk.
        clock = itertools.chain([0], itertools.repeat(1e9))
        fake = types.SimpleNamespace(monotonic=lambda: next(clock), perf_counter=lambda: 0.0)
        patch.setattr(runs, "time", fake)
        study.main(command)
    stopped = json.loads(part.read_text())["records"]
    assert [(r["finished"], r["curve"]["step"]) for r in stopped] == [(False, [2])] * 4
    study.main(["--report", f"--out={tmp_path}"])
    assert "| lucid, stopped at step 2 |" in capsys.readouterr().out

    study.main(command)
    assert "best rate:" in capsys.readouterr().out
    assert not (tmp_path / "unfinished_4of4-lucid").exists()
    assert (tmp_path / "models/4of4-lucid/checkpoints/4").exists()
    for record, curve in zip(json.loads(part.read_text())["records"], uninterrupted.curves):
        assert record["curve"]["accuracy"] == pytest.approx(curve["accuracy"], rel=1e-5)
        assert set(record["evaluation"]["146"]) == {"1", "2", "4", "8", "9"}
    study.main(["--report", f"--out={tmp_path}"])
    part.unlink()
    study.main(["--report", f"--out={tmp_path}"])  # From study.json.
    assert capsys.readouterr().out.count("| `toy` | lucid | 0.0") == 4
    for name in ("accuracy.png", "needles_and_length.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_models_side_by_side_are_those_of_the_projects_step(uninterrupted):
    group = toy_group()
    rate, seed = group.models[2]
    state = build_trainer(group.config(group.stages[0], rate, seed)).init_state()
    for x, y in zip(jax.tree.leaves(init_states(group)), jax.tree.leaves(state)):
        np.testing.assert_array_equal(x[2], y)
    for stage in group.stages:
        step = build_trainer(group.config(stage, rate, seed)).make_step()
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        text, answers = stage.task.draw(key, 8)
        for one in (slice(4), slice(4, 8)):
            state, _ = step(state, stage.task.batch(text[one], answers[one]))
    for x, y in zip(jax.tree.leaves(uninterrupted.states.params), jax.tree.leaves(state.params)):
        np.testing.assert_allclose(x[2], y, atol=1e-5)


def test_the_best_rate_has_the_highest_accuracy_then_the_fewest_steps():
    def record(rate, accuracies, seed):
        steps = range(1, len(accuracies) + 1)
        curve = {"step": [10 * i for i in steps], "seconds": [5.0 * i for i in steps]}
        return {"setting": "x", "attention": "lucid", "temperature": 1.0, "learning_rate": rate,
                "seed": seed, "needles": 8, "finished": rate < 1e-2,
                "curve": {**curve, "accuracy": accuracies}}  # fmt: skip

    slow = [record(1e-4, (0.1, 0.6, 1.0), seed) for seed in (0, 1)]
    fast = [record(1e-3, (0.1, 1.0, 1.0), 0), record(1e-3, (0.99, 1.0, 1.0), 1)]
    bad = [record(1e-2, (1.0, 1.0, 0.5), seed) for seed in (0, 1)]
    assert report.best_rates([*slow, *fast, *bad]) == [fast]
    assert report.first_at(fast[0], 0.5, "step") == 20
    assert report.first_at(bad[0], 1.1, "step") is None
    assert "| 15 (10–20) | 15 (10–20) | 15 (10–20) | 7.5 (5.0–10.0)" in report.table(fast)
    assert "| lucid, stopped at step 30 | 0.01 |" in report.table(bad)
