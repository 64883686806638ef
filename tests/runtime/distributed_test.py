"""Runs of several processes train, save, stop and resume as one process does."""

import re
import signal
import subprocess
import sys

import pytest
import toy

from lucid_jax.config import ConfigError
from lucid_jax.evaluate.request import TaskRequest
from lucid_jax.evaluate.run_tasks import evaluate_tasks
from lucid_jax.runtime import distributed, peers
from lucid_jax.training.loop import train
from lucid_jax.training.writer import read_metrics

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.mark.parametrize("host", ["localhost", "no.such.host.invalid"])
def test_a_missing_process_0_is_a_one_line_error(host, monkeypatch):
    port = toy.free_port()
    monkeypatch.setattr(distributed, "_TIMEOUT", 0.3)
    with pytest.raises(ConfigError, match=f"no process 0 answers at {host}:{port}") as error:
        distributed.join(f"{host}:{port},1,2")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line", ["F1129 client.h:80] Term", "E1129 1 coordination_service.cc:9] x"]
)
def test_what_aborts_a_process_is_one_line(line):
    text = f"step 1\nW1129 coordination_service.cc:3] a warning\n{line}\n@ 0x7fb a::stack()\n"
    command = [sys.executable, "-c", peers._FILTER, peers._MESSAGE]
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    assert result.stderr == text[: text.index(line)] + peers._MESSAGE
    result = subprocess.run(command, input=peers._MESSAGE + text, capture_output=True, text=True)
    assert result.stderr == peers._MESSAGE


def start_all(count: int, *arguments, devices: int) -> list[subprocess.Popen]:
    """Starts `count` processes with `devices` devices each."""
    port = toy.free_port()
    return [
        toy.start(f"--distributed=localhost:{port},{i},{count}", *arguments, devices=devices)
        for i in range(count)
    ]


def start_both(*arguments) -> list[subprocess.Popen]:
    return start_all(2, *arguments, devices=2)


def finish(started, code: int = 0) -> list[tuple[str, str]]:
    """Waits for all processes to end with an exit code; returns output and errors of each.

    Gloo's threads write to the output too, into each other's lines: such lines are left out.
    """
    try:
        outputs = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert {process.returncode for process in started} == {code}, outputs
    gloo = re.compile(r"^.*(\[Gloo\]|is connected to|peer ranks).*\n|^[\d\s]*\n", re.MULTILINE)
    return [(gloo.sub("", out), err) for out, err in outputs]


def kill_after_a_checkpoint(started, workdir, config) -> int:
    """Kills all processes at once; returns the step of the newest checkpoint."""
    toy.until(started[0], lambda: toy.newest_step(workdir) >= 3, timeout=180)
    assert all(process.poll() is None for process in started)
    for process in started:
        process.kill()
    for process in started:
        process.communicate()
    killed_after = toy.newest_step(workdir)
    assert 3 <= killed_after < config.steps
    return killed_after


def assert_same_run(workdir, expected_workdir, config) -> None:
    """Checks that the newest checkpoints and the metrics agree."""
    states = [toy.saved_state(directory, config) for directory in (workdir, expected_workdir)]
    toy.assert_close(*states)
    toy.assert_close_curves(workdir, expected_workdir)


def long_run(corpus):
    # Adam divides by gradients, which magnifies the rounding of small ones; eps bounds that.
    return toy.toy_config(
        corpus, steps=12, eval_every=6, checkpoint={"every": 3}, optim={"eps": 1e-3}
    )


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_a_run_of_one_process(corpus, tmp_path, monkeypatch):
    config = long_run(corpus)
    toy.use_devices(monkeypatch, 1)
    train(config, tmp_path / "one")

    workdir = tmp_path / "two"
    path = toy.write_config(tmp_path / "config.py", config)
    arguments = (f"--config={path}", f"--workdir={workdir}", "--config.mesh.tensor=2")
    killed_after = kill_after_a_checkpoint(start_both(*arguments), workdir, config)
    first, second = finish(start_both(*arguments))
    assert f"resuming at step {killed_after}\n" in first[1]
    assert "on 4 × cpu" not in first[1], "the run started anew"
    assert "step 12/12  loss" in first[1]
    assert "finished at step 12 of 12" in first[0]
    assert second == ("", "")

    checkpoints = workdir / "checkpoints"
    assert sorted(int(x.name) for x in checkpoints.iterdir()) == [6, 9, 12]
    records = [x.name for x in (checkpoints / "12" / "record").glob("*.json")]
    assert sorted(records) == ["process_0.json", "process_1.json"]
    assert_same_run(workdir, tmp_path / "one", config)

    first, second = finish(start_both(*arguments, "--mode=eval"))
    loss = read_metrics(workdir)[-1]["eval_loss"]
    assert first[0].startswith(f"step 12 of {workdir}: loss {loss:.4f}")
    assert second == ("", "")


@pytest.mark.slow
def test_a_context_parallel_run_resumes_on_another_number_of_processes(
    corpus, tmp_path, monkeypatch
):
    # Sequences of 64 tokens in blocks of 5 end in padding.
    config = long_run(corpus)
    toy.use_devices(monkeypatch, 1)
    train(config, tmp_path / "one")

    workdir = tmp_path / "many"
    path = toy.write_config(tmp_path / "config.py", config)
    arguments = (f"--config={path}", f"--workdir={workdir}", "--config.mesh.stripe=5")
    four = start_all(4, *arguments, "--config.mesh.context=4", devices=1)
    killed_after = kill_after_a_checkpoint(four, workdir, config)
    records = (workdir / "checkpoints" / str(killed_after) / "record").glob("process_*.json")
    assert len(list(records)) == 4

    first, second = finish(start_both(*arguments, "--config.mesh.context=2"))
    assert f"resuming at step {killed_after}\n" in first[1]
    assert "finished at step 12 of 12" in first[0]
    assert second == ("", "changed since the checkpoint: mesh.context was 4, is now 2\n")
    assert_same_run(workdir, tmp_path / "one", config)

    first, _ = finish(start_both(*arguments, "--config.mesh.context=4", "--mode=eval"))
    loss = read_metrics(workdir)[-1]["eval_loss"]
    assert first[0].startswith(f"step 12 of {workdir}: loss {loss:.4f}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "index"), [(signal.SIGTERM, 0), (signal.SIGTERM, 1), (signal.SIGINT, 1)]
)
def test_a_signal_to_one_process_stops_both_at_the_same_step(corpus, tmp_path, number, index):
    # An evaluation after each step, so that the signal may also arrive in one.
    config = toy.toy_config(corpus, steps=5000, telemetry=False, eval_every=1)
    path = toy.write_config(tmp_path / "config.py", config)
    workdir = tmp_path / "run"
    both = start_both(f"--config={path}", f"--workdir={workdir}")
    toy.until(both[0], lambda: len(read_metrics(workdir)) >= 4, timeout=180)
    both[index].send_signal(number)
    (out, _), _ = finish(both, code=75)
    step = toy.newest_step(workdir)
    assert f"stopped at step {step} of 5000" in out
    assert read_metrics(workdir)[-1]["step"] == step
    records = (workdir / "checkpoints" / str(step) / "record").glob("*.json")
    assert len(list(records)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(corpus, tmp_path, index):
    # A barrier of a save would wait for the killed process until its heartbeats are missed.
    every = {"eval_every": 5000, "checkpoint": {"every": 5000}}
    config = toy.toy_config(corpus, steps=5000, telemetry=False, **every)
    path = toy.write_config(tmp_path / "config.py", config)
    workdir = tmp_path / "run"
    both = start_both(f"--config={path}", f"--workdir={workdir}")
    toy.until(both[0], lambda: len(read_metrics(workdir)) >= 4, timeout=180)
    both[index].kill()
    _, err = both[1 - index].communicate(timeout=60)
    assert both[1 - index].returncode == 1
    assert err.endswith(peers._MESSAGE)
    assert "Traceback" not in err


@pytest.mark.slow
def test_stopped_and_resumed_tasks_equal_those_of_one_process(corpus, tmp_path, monkeypatch):
    config = toy.toy_config(corpus, batch_size=24, model={"init_std": 0.2})
    toy.use_devices(monkeypatch, 1)
    toy.save_random(tmp_path / "run", config)
    step = str(tmp_path / "run" / "checkpoints" / "4")
    request = TaskRequest.parse(["ruler_niah_single_1"], ["600"], 12, [])
    evaluate_tasks(config, tmp_path / "one", step, request)

    path = toy.write_config(tmp_path / "config.py", config)
    workdir = tmp_path / "two"
    arguments = (
        f"--config={path}", f"--workdir={workdir}", "--config.mesh.tensor=2", "--mode=eval",
        f"--checkpoint={step}", "--tasks=ruler_niah_single_1", "--lengths=600", "--samples=12",
    )  # fmt: skip
    both = start_both(*arguments)
    samples = workdir / "tasks" / "samples.jsonl"
    toy.until(both[0], lambda: samples.exists() and samples.read_bytes() != b"", timeout=180)
    both[1].send_signal(signal.SIGTERM)
    first, second = finish(both, code=75)
    done = len(samples.read_text().splitlines())
    assert 0 < done < 12
    assert f"stopped after {done} of 12 samples" in first[0]
    assert second[0] == ""

    first, second = finish(start_both(*arguments))
    assert f"{done} samples are saved already" in first[1]
    assert second[0] == ""
    results = [
        (directory / "tasks" / "samples.jsonl").read_text().splitlines()
        for directory in (tmp_path / "one", workdir)
    ]
    assert results[0] == results[1]
