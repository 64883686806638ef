"""The task runner: files, resuming, samples left out or truncated, and bad requests."""

import dataclasses
import json
import os
import signal
from unittest import mock

import numpy as np
import pytest
import toy
from echo import EchoGenerator

from lucid_jax.checkpoint.manager import checkpoint_directory
from lucid_jax.checkpoint.reader import CheckpointError
from lucid_jax.config import ConfigError
from lucid_jax.evaluate import text_generator
from lucid_jax.evaluate.request import TaskRequest
from lucid_jax.evaluate.run_tasks import evaluate_tasks
from lucid_jax.runtime.preemption import Stopped

# In bytes; about half of a sample is the question and room for the answer.
LENGTH = 700


class KilledError(Exception):
    """Simulates SIGKILL."""


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """Returns a configuration and the directory of a checkpoint of random parameters."""
    directory = tmp_path_factory.mktemp("tasks")
    # A batch holds two samples of LENGTH.
    config = toy.toy_config(corpus, batch_size=24)
    toy.save_random(directory, config)
    return config, checkpoint_directory(directory) / "4"


@pytest.fixture
def model(monkeypatch):
    toy.use_devices(monkeypatch, 1)
    model = EchoGenerator()
    monkeypatch.setattr(text_generator, "Generator", model)
    return model


def request(tasks="ruler_niah_single_1,ruler_niah_k2", lengths=(LENGTH,), samples=5, sources=()):
    return TaskRequest.parse(tasks.split(","), [str(n) for n in lengths], samples, sources)


def read(workdir):
    """Returns the scores and the sorted samples of a work directory."""
    scores = json.loads((workdir / "tasks" / "scores.json").read_text())
    lines = (workdir / "tasks" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    return scores, sorted(samples, key=lambda x: (x["task"], x["length"], x["index"]))


def test_writes_samples_scores_table_and_picture(run, model, tmp_path):
    config, checkpoint = run
    table = evaluate_tasks(config, tmp_path, str(checkpoint), request())
    scores, samples = read(tmp_path)
    assert scores["step"] == 4
    assert scores["finished"]
    assert [task["task"] for task in scores["tasks"]] == [
        "ruler_niah_single_1", "ruler_niah_k2[prose]",
    ]  # fmt: skip
    assert len(samples) == len(model.prompts) == 10
    assert {prompt[0] for prompt in model.prompts} == {256}, "prompts begin with BOS"
    for task in scores["tasks"]:
        scores_of_task = [x["scores"] for x in samples if x["task"] == task["task"]]
        mean = np.mean([x["string_match_all"] for x in scores_of_task])
        score = task["scores"]["string_match_all"]
        assert (task["samples"], score["mean"]) == (5, mean)
        assert score["low"] < mean < score["high"]
    # The fake model is sometimes right.
    assert 0 < np.mean([x["scores"]["string_match_all"] for x in samples]) < 1
    assert all(x["prediction"].endswith(".\nMore") for x in samples)
    directory = tmp_path / "tasks"
    assert (directory / "scores.md").read_text() in table
    assert (directory / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_a_number_is_a_step_of_the_run(run, model):
    config, checkpoint = run
    workdir = checkpoint.parent.parent
    assert "at step 4" in evaluate_tasks(config, workdir, "4", request(samples=1))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 160 in .*; its steps: 4$"):
        evaluate_tasks(config, workdir, "160", request(samples=1))


def test_groups_of_tasks():
    names = [task.name.removesuffix("[prose]") for task in request("ruler,ruler_vt,babilong").tasks]
    assert len(names) == 13 + 10
    assert {"ruler_niah_multiquery", "ruler_qa_2", "babilong_qa10"} <= {*names}
    assert "ruler_niah_k2" not in names
    for found in (
        r"closest is 'ruler_vt'",
        r"groups ruler \(13 tasks\), babilong",
        "ruler_niah_k2",
    ):
        with pytest.raises(ConfigError, match=found):
            request("ruler_vtt")


def test_a_killed_run_resumes_to_the_same_result(run, model, tmp_path):
    config, checkpoint = run
    evaluate_tasks(config, tmp_path / "one", str(checkpoint), request())
    expected, model.prompts = model.prompts, []

    model.patience, model.alarm = 4, mock.Mock(side_effect=KilledError)
    with pytest.raises(KilledError):
        evaluate_tasks(config, tmp_path / "two", str(checkpoint), request())
    # Four batches: 2 + 2 + 1 samples of the first task and 2 of the second. Then cut a line short.
    path = tmp_path / "two" / "tasks" / "samples.jsonl"
    assert path.read_bytes().count(b"\n") == len(model.prompts) == 7
    with path.open("a") as file:
        file.write(path.read_text().splitlines()[-1][:50])
    model.patience = 10**9
    evaluate_tasks(config, tmp_path / "two", str(checkpoint), request())
    assert model.prompts == expected
    assert read(tmp_path / "two") == read(tmp_path / "one")

    # A request for more samples runs only the new ones.
    model.prompts = []
    evaluate_tasks(config, tmp_path / "two", str(checkpoint), request(samples=6))
    assert len(model.prompts) == 2
    scores, _ = read(tmp_path / "two")
    assert [task["samples"] for task in scores["tasks"]] == [6, 6]
    # A request for fewer reports only the first ones.
    evaluate_tasks(config, tmp_path / "two", str(checkpoint), request())
    assert read(tmp_path / "two")[0] == read(tmp_path / "one")[0]
    assert len(model.prompts) == 2


def test_saved_samples_are_reused_only_for_equal_inputs(run, model, tmp_path):
    config, checkpoint = run
    essays = tmp_path / "essays"
    essays.mkdir()
    (essays / "a.txt").write_text("An essay of some words. " * 40)
    sources = [f"essays=text:{essays}"]

    def count_run(config=config, tasks="ruler_niah_k2", **changes):
        """Returns how many of two samples were run, not reused."""
        model.prompts = []
        evaluate_tasks(config, tmp_path, str(checkpoint), request(tasks, samples=2, **changes))
        return len(model.prompts)

    assert (count_run(), count_run()) == (2, 0)
    assert (count_run(sources=sources), count_run(sources=sources)) == (2, 0)
    # Essays do not matter to a task that does not read them.
    assert count_run(tasks="ruler_niah_single_1") == 2
    assert count_run(tasks="ruler_niah_single_1", sources=sources) == 0
    # The content of the essays counts, not their path.
    essays.rename(tmp_path / "moved")
    moved = [f"essays=text:{tmp_path / 'moved'}"]
    assert count_run(sources=moved) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("An essay of more words. " * 40)
    assert count_run(sources=[f"essays=text:{tmp_path / 'other'}"]) == 2
    model_config = dataclasses.replace(config.model, attention="lucid")
    assert count_run(config=dataclasses.replace(config, model=model_config)) == 2
    # Options that do not change the answers do not matter.
    model_config = dataclasses.replace(config.model, remat="full")
    assert count_run(config=dataclasses.replace(config, model=model_config)) == 0


def test_sigterm_keeps_finished_samples(run, model, tmp_path):
    config, checkpoint = run
    model.patience, model.alarm = 2, lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped after 5 of 10 samples") as stopped:
        evaluate_tasks(config, tmp_path, str(checkpoint), request())
    assert "run the same command again to continue" in str(stopped.value)
    assert not read(tmp_path)[0]["finished"]
    assert [task["samples"] for task in read(tmp_path)[0]["tasks"]] == [5, 0]
    model.prompts.clear()
    output = evaluate_tasks(config, tmp_path, str(checkpoint), request())
    assert len(model.prompts) == 5
    assert "stopped" not in output


def test_samples_that_do_not_fit_are_counted_and_not_tried_again(run, model, tmp_path, caplog):
    config, checkpoint = run
    too_short = request("ruler_vt,ruler_qa_1", lengths=(800,), samples=7)
    for _ in range(2):
        table = evaluate_tasks(config, tmp_path, str(checkpoint), too_short)
    vt, qa = read(tmp_path)[0]["tasks"]
    assert (vt["samples"], vt["left_out"], vt["scores"]) == (0, 7, {})
    assert (qa["samples"], qa["left_out"]) == (6, 1)
    assert len(model.prompts) == 6
    assert "Left out 7 of ruler_vt at 800, the first because ruler_vt does not fit in 800" in table
    assert "lengths 800 are longer than the sequences of training" in caplog.text
    assert "trained on sequences of 64 tokens, fewer than 800" in table


def test_truncated_prompts_are_counted_and_small_tasks_run_completely(run, model, tmp_path):
    config, checkpoint = run
    folder = tmp_path / "longbench"
    folder.mkdir()
    rows = [
        {"input": "Type?", "context": "words " * n, "answers": ["A"], "all_classes": ["A", "B"]}
        for n in (10, 400, 500)
    ]
    (folder / "trec.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trec = request("longbench_trec", samples=100, sources=[f"longbench={folder}"])
    evaluate_tasks(config, tmp_path, str(checkpoint), trec)
    scores, samples = read(tmp_path)
    (task,) = scores["tasks"]
    assert (task["samples"], task["wanted"], task["truncated_samples"]) == (3, 3, 2)
    lost = [sample["meta"]["truncated_tokens"] for sample in samples]
    assert task["truncated_tokens"] == sum(lost) > 2000
    # Answers of this task end with their first line.
    assert all("\n" not in sample["prediction"] for sample in samples)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": "loss,ruler_vt"}, "--tasks=loss cannot be combined; got loss,ruler_vt"),
        ({"lengths": ("0",)}, "--lengths must be positive integers; got '0'"),
        ({"sources": ["essays"]}, "got 'essays'"),
        ({"sources": ["essays=x.txt"]}, "no such file, folder or pattern"),
        ({"tasks": "longbench_lcc"}, "--tasks: longbench_lcc needs the path of a folder"),
    ],
)
def test_bad_requests_are_refused_in_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        request(**arguments)
    assert "\n" not in str(error.value)
