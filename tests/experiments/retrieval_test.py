"""Generated retrieval: every answer can be found, and groups leave models that are restored."""

import concurrent.futures
import dataclasses
import json
import re
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.retrieval import report, runs, study
from experiments.retrieval.runs import (
    Group,
    Stage,
    Training,
    compiling,
    first_at,
    init_states,
    needle_counts,
    trainer_of,
)
from experiments.retrieval.task import Retrieval
from lucid_jax.checkpoint.restore import restore_params
from lucid_jax.data.tokenizer import ByteTokenizer
from lucid_jax.runtime.workdir import read_config

pytestmark = pytest.mark.usefixtures("compilation_cache")

TASK = Retrieval(length=73, digits=2, alphabet=3, needles=6, queries=4)
KEY = jax.random.key(0)
MODEL = (
    ("num_layers", 1), ("embed_dim", 16), ("mlp_dim", 32), ("num_heads", 2), ("num_kv_heads", 1),
    ("head_dim", 8), ("compute_dtype", "float32"),
)  # fmt: skip


def drawn(task, count, needles=None):
    return jax.device_get(jax.jit(task.rows, static_argnums=(1, 2))(KEY, count, needles))


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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """States and records of the toy group."""
    training = Training(toy(), tmp_path_factory.mktemp("uninterrupted"))
    records = training.run(time.monotonic() + 1000)
    return training.states, records


def without_seconds(records):
    points = [[{**point, "seconds": None} for point in r["curve"]] for r in records]
    return [
        {"run": r["run"], "finished": r["finished"], "curve": x} for r, x in zip(records, points)
    ]


def test_the_study_stops_goes_on_evaluates_saves_and_reports(
    tmp_path, monkeypatch, capsys, uninterrupted
):
    """It stops after a stage. The best rate's first seed comes back from its directory."""
    command = ["--setting=4of4", "--variant=lucid", f"--out={tmp_path}"]
    unfinished = tmp_path / "unfinished_4of4-lucid"
    part = tmp_path / "study_4of4-lucid.json"
    monkeypatch.setattr(study, "group", lambda setting, variant, seeds: toy())
    monkeypatch.setattr(study, "_EVAL_TOKENS", 96)
    with monkeypatch.context() as patch:
        advance, late = Training._advance, []
        patch.setattr(Training, "_advance", lambda *x: late.append(1e6) or advance(*x))
        clock = types.SimpleNamespace(
            monotonic=lambda: time.monotonic() + sum(late), perf_counter=time.perf_counter
        )
        patch.setattr(runs, "time", clock)
        patch.setattr(study, "_EVAL_FACTORS", ())
        study.main(command)
    stopped = json.loads(part.read_text())["records"]
    assert [(r["finished"], [c["step"] for c in r["curve"]]) for r in stopped] == [(False, [2])] * 4
    study.main(["--report", f"--out={tmp_path}"])
    assert "| toy | lucid, stopped at step 2 | 0.0" in capsys.readouterr().out
    assert not (tmp_path / "needles_and_length.png").exists()

    # Other groups, of the same shapes and of others, do not take up these states.
    for changes in {"rates": (1e-3, 2e-2)}, {"seeds": (0,)}:
        with monkeypatch.context() as patch:
            patch.setattr(study, "group", lambda *x, changes=changes: toy(**changes))
            with pytest.raises(SystemExit):
                study.main(command)
        message = "has states of other models, rates, seeds or stages: remove it"
        assert f"{unfinished} {message}" in capsys.readouterr().err

    monkeypatch.setattr(study, "_EVAL_FACTORS", (1, 2))
    study.main(command)
    assert capsys.readouterr().out.count(" lucid  ") == 4
    assert not unfinished.exists()
    finished = json.loads(part.read_text())["records"]
    assert without_seconds(finished) == without_seconds(uninterrupted[1])
    for record, before in zip(finished, stopped):
        first, second = record["curve"]
        assert first == before["curve"][0]
        assert second["seconds"] > first["seconds"]

    study.main(["--report", f"--out={tmp_path}"])
    assert "| toy | lucid | 0.0" in capsys.readouterr().out
    merged = json.loads((tmp_path / "study.json").read_text())
    assert merged["environment"]["versions"]["flax"]
    for record in merged["records"]:
        assert [(c["step"], c["stage"]) for c in record["curve"]] == [(2, 0), (4, 1)]
        assert set(record["curve"][0]["accuracy"]) == {"1", "2", "4"}
        assert {n: set(x) for n, x in record["evaluation"].items()} == {
            "73": {"1", "2", "4", "8", "9"}, "146": {"1", "2", "4", "8", "9"},
        }  # fmt: skip
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    workdir = tmp_path / "models/4of4-lucid"
    config = read_config(workdir)
    assert config.seed == 0
    step, params, _ = restore_params(workdir, trainer_of(config).model.abstract_params)
    assert step == 4
    ((best, *_),) = report.best_rates(merged["records"])
    rate = config.optim.learning_rate
    assert rate == best["run"]["learning_rate"]
    where = [(r["run"]["learning_rate"], r["run"]["seed"]) for r in finished].index((rate, 0))
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(uninterrupted[0].params)):
        np.testing.assert_array_equal(x, y[where])
    monkeypatch.setattr(study, "_EVAL_FACTORS", (2,))
    one = jax.tree.map(lambda x: x[None], params)
    (again,) = study.evaluate(study.evaluations(toy(rates=(rate,), seeds=(0,)), one), one)
    assert again["146"] == finished[where]["evaluation"]["146"]


def test_models_side_by_side_are_those_of_the_projects_step(uninterrupted):
    """A model of a group is what the optimiser makes at its rate of its seed's parameters."""
    group = toy()
    states, _ = uninterrupted
    rate, seed = group.models[2]
    first = group.config(group.stages[0], rate, seed)
    state = trainer_of(first).init_state()
    for x, y in zip(jax.tree.leaves(init_states(group)), jax.tree.leaves(state)):
        np.testing.assert_array_equal(x[2], y)
    for stage in group.stages:
        config = group.config(stage, rate, seed)
        step = trainer_of(config).make_step()
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        text, answers = stage.task.rows(key, 8)
        for one in (slice(4), slice(4, 8)):
            state, _ = step(state, stage.task.batch(text[one], answers[one]))
    for x, y in zip(jax.tree.leaves(states.params), jax.tree.leaves(state.params)):
        np.testing.assert_allclose(x[2], y, atol=1e-5)


def test_programs_compile_side_by_side():
    together = threading.Barrier(2, timeout=30)

    def program(name):
        return types.SimpleNamespace(compile=lambda: together.wait() * 0 or name)

    assert [x.result() for x in compiling([program("a"), program("b")])] == ["a", "b"]


def test_time_that_is_up_ends_a_group_whatever_is_still_compiling(tmp_path, monkeypatch, capsys):
    for module in (runs, study):
        monkeypatch.setattr(
            module, "compiling", lambda programs: [concurrent.futures.Future() for _ in programs]
        )
    study.run(toy(), "toy", 0, tmp_path)
    assert "time was up before the first steps" in capsys.readouterr().out
    assert not list(tmp_path.glob("study*"))


def test_nothing_compiles_beside_the_first_step(tmp_path, monkeypatch):
    compiling, waited = [], []

    def compile_never(programs):
        futures = [concurrent.futures.Future() for _ in programs]
        compiling.extend(futures)
        return futures

    for module in (runs, study):
        monkeypatch.setattr(module, "compiling", compile_never)
    monkeypatch.setattr(runs, "wait", lambda programs, timeout: waited.extend(programs))
    study.run(toy(), "toy", 0, tmp_path)
    assert set(waited) == set(compiling)


def test_settings_fit_chunks_and_longer_rows():
    for name, setting in study.SETTINGS.items():
        group = study.group(name, "lucid")
        assert all(stage.steps % group.chunk == 0 for stage in setting.stages)
        last = setting.stages[-1].task
        for factor in study._EVAL_FACTORS:
            task = study.evaluation_task(last, factor * last.length)
            assert last.needles in needle_counts(task)
    short, long = study.SETTINGS["2of6"].stages, study.SETTINGS["long"].stages
    assert long[: len(short)] == short
    last = dataclasses.asdict(short[-1].task)
    for stage, (length, rows) in zip(long[len(short) :], [(512, 32), (1024, 16), (2048, 8)]):
        assert dataclasses.asdict(stage.task) == {**last, "length": length}
        assert (stage.rows, stage.steps) == (rows, 400)
    assert long[-1].task.length == 2048
    pairs = [stage.task for stage in study.SETTINGS["recall"].stages[1:]]
    assert [(t.needles, t.places, t.queries) for t in pairs] == [(n, n, n) for n in (4, 16, 32)]


def reported(name, attention):
    """A record of a setting, evaluated."""
    stages = study.SETTINGS[name].stages
    task = stages[-1].task
    asked = [study.evaluation_task(task, n * task.length) for n in study._EVAL_FACTORS]

    def accuracies(task, accuracy):
        return dict.fromkeys(map(str, needle_counts(task)), accuracy)

    return {
        "run": {"name": name, "attention": attention, "temperature": 1.0, "learning_rate": 1e-3,
                "seed": 0, "stages": [dataclasses.asdict(stage) for stage in stages]},
        "finished": True,
        "curve": [{"step": 50, "seconds": 1.0, "accuracy": accuracies(task, 0.5)}],
        "evaluation": {str(x.length): accuracies(x, 0.25) for x in asked},
    }  # fmt: skip


def test_the_report_takes_all_settings_in_one_folder_or_one(tmp_path):
    """Their lengths and needles differ, and some have fewer variants."""
    with pytest.raises(SystemExit):
        study.main(["--report", f"--out={tmp_path}"])
    for name in study.SETTINGS:
        records = [reported(name, x) for x in ("lucid", "softmax")[: 1 if name == "long" else 2]]
        runs.write(tmp_path / f"study_{name}.json", records)
    runs.write(tmp_path / "alone" / "study_small.json", [reported("small", "softmax")])
    together, alone = report.merge(tmp_path), report.merge(tmp_path / "alone")
    assert "| setting | variant | needles | 2048 | 4096 | 8192 | 16384 |" in together
    of_small = "| small | softmax | 16 | 0.250 | 0.250 | 0.250 | 0.250 |"
    assert of_small in together
    assert of_small in alone
    for name in study.SETTINGS:
        assert together.count(f"| {name} | lucid | ") == 2
    for folder in (tmp_path, tmp_path / "alone"):
        for name in ("accuracy.png", "needles_and_length.png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")


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
