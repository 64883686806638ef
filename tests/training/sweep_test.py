"""Sweeps run all trials or one, resume, sort the results, and survive diverging trials."""

import contextlib
import json
import logging

import pytest
import toy

from lucid_jax.config import ConfigError
from lucid_jax.runtime.preemption import Stopped
from lucid_jax.runtime.workdir import save_config
from lucid_jax.training import sweep
from lucid_jax.training.loop import TrainResult
from lucid_jax.training.reporter import NonFiniteError
from lucid_jax.training.writer import METRICS_FILE, read_metrics

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture(scope="module")
def values(corpus):
    return toy.toy_config(corpus, steps=4, eval_every=4, telemetry=False).to_dict()


class Training:
    """A fake `train` that writes the files of a run at once and records its calls."""

    def __init__(self):
        self.trained, self.stops_at = [], None

    def __call__(self, config, directory):
        self.trained.append(directory.name)
        save_config(directory, config)
        if config.model.init_std > 1:
            raise NonFiniteError(1, "step 1: loss nan")
        step = self.stops_at or config.steps
        lines = [{"step": i + 1, "loss": 5.0} for i in range(step)]
        if step == config.steps:
            lines.append({"step": step, "eval_loss": -config.optim.learning_rate})
        (directory / METRICS_FILE).write_text("".join(json.dumps(x) + "\n" for x in lines))
        (directory / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
        return TrainResult(step, config.steps, None, finished=step == config.steps)


@pytest.fixture
def training(monkeypatch):
    training = Training()
    monkeypatch.setattr(sweep, "train", training)
    return training


@pytest.fixture
def run(values, tmp_path, monkeypatch):
    """A function that runs a sweep of the given trials."""
    toy.use_devices(monkeypatch, 1)

    def run(trials, trial=None):
        path = tmp_path / "trials.py"
        path.write_text(f"def get_trials():\n    return {trials!r}\n")
        return sweep.run_sweep(values, str(path), tmp_path / "sweep", trial)

    run.workdir = tmp_path / "sweep"
    return run


def order(table: str) -> list[int]:
    return [int(line.split()[0]) for line in table.splitlines()[1:]]


@pytest.mark.slow
def test_a_diverging_trial_does_not_stop_the_others(run, caplog, monkeypatch):
    trials = [{"model.init_std": 1e30}, {"optim.learning_rate": 1e-2}]
    with caplog.at_level(logging.ERROR):
        table = run(trials)
    assert "trial 0: step 1: loss" in caplog.text
    assert order(table) == [1, 0]
    loss = read_metrics(run.workdir / "01")[-1]["eval_loss"]
    assert table.splitlines()[1].split()[:4] == ["1", f"{loss:.4f}", "4", "finished"]
    assert table.splitlines()[2].split()[:4] == ["0", "inf", "1", "diverged"]
    monkeypatch.setattr(sweep, "train", None)
    assert run(trials) == table, "a trial was trained again"
    assert (run.workdir / "table.txt").read_text() == f"{table}\n"


def test_trials_run_once_and_sort_by_loss(run, training):
    trials = [
        {"optim.learning_rate": 1e-5},
        {"optim.learning_rate": 1e-2, "model.attention": "softmax"},
    ]
    table = run(trials)
    assert training.trained == ["00", "01"]
    assert order(table) == [1, 0]
    assert "model.attention=softmax" in table
    assert table.count("finished") == 2
    assert run(trials) == table
    assert training.trained == ["00", "01"], "a finished trial ran again"


def test_one_trial_by_index(run, training):
    trials = [{"seed": i} for i in range(3)]
    table = run(trials, trial=2)
    assert training.trained == ["02"]
    assert table.count("not started") == 2
    with pytest.raises(ConfigError, match="--trial=3 is not one of the 3 trials, 0 to 2"):
        run(trials, trial=3)


def test_a_diverged_trial_runs_again_only_by_number(run, training, monkeypatch):
    trials = [{"model.init_std": 1e30}]
    table = run(trials)
    assert run(trials) == table
    assert training.trained == ["00"]
    assert run(trials, trial=0) == table
    assert training.trained == ["00", "00"]
    with monkeypatch.context() as patch:
        # It runs again and is stopped before it diverges.
        patch.setattr(sweep, "train", lambda config, path: TrainResult(0, 4, None, False))
        with pytest.raises(Stopped, match="not started"):
            run(trials, trial=0)
    assert run(trials) == table


def test_a_stopped_sweep_resumes(run, training):
    trials = [{"seed": 0}, {"seed": 1}]
    training.stops_at = 2
    with pytest.raises(Stopped, match="unfinished"):
        run(trials)
    assert training.trained == ["00"]
    training.stops_at = None
    assert run(trials).count("unfinished") == 0
    assert training.trained == ["00", "00", "01"]


@pytest.mark.parametrize("stops_at", [None, 2], ids=["finished", "unfinished"])
def test_a_trial_refuses_the_directory_of_another(run, training, stops_at):
    trials = [{"model.attention": "softmax"}, {"seed": 1}]
    training.stops_at = stops_at
    with contextlib.suppress(Stopped):
        run(trials)
    trained = list(training.trained)
    message = (
        rf"^trial 0 was trained with seed=0 in {run.workdir}/00, and has seed=1 now: give"
        " the sweep another --workdir"
    )
    with pytest.raises(ConfigError, match=message):
        run(trials[::-1])
    with pytest.raises(ConfigError, match=r"^trial 0 was trained with model.attention='softmax' "):
        run([{}, {"seed": 2}], trial=1)
    assert training.trained == trained
    training.stops_at = None
    assert "not started" in run([*trials, {"seed": 2}], trial=0)
    # A configuration that a crash cut short tells nothing.
    (run.workdir / "00" / "config.json").write_text('{"seed": ')
    assert run(trials).count(" finished") == 2


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        ([{"seed": 1}, {"modle.num_layers": 2}], r"unknown config key modle; did you mean model\?"),
        (
            [{"seed": 1}, {"steps.warmup": 2}],
            "unknown config key steps.warmup: steps is not a section",
        ),
        ([{"seed": 1}, {"mesh.tensor": 3}], "does not fit 1 devices"),
        ([{"seed": 1}, {"data.train": "/nowhere.jsonl"}], "/nowhere.jsonl"),
        ([], "lists no trials"),
    ],
)
def test_no_trial_runs_if_one_cannot(run, training, trials, message):
    with pytest.raises(ConfigError, match=message):
        run(trials)
    assert training.trained == []


def test_a_trial_killed_in_its_last_save_is_unfinished(run, training):
    run([{"seed": 1}])
    checkpoint = run.workdir / "00" / "checkpoints" / "4"
    checkpoint.rename(checkpoint.with_name("4.orbax-checkpoint-tmp"))
    assert "unfinished" not in run([{"seed": 1}])
    assert training.trained == ["00", "00"]
    assert checkpoint.exists()


def test_a_trial_without_its_last_evaluation_is_unfinished(run, training):
    run([{"seed": 1}])
    path = run.workdir / "00" / METRICS_FILE
    path.write_text("".join(line for line in path.open() if "eval_loss" not in line))
    assert "unfinished" not in run([{"seed": 1}])
    assert training.trained == ["00", "00"]


def test_a_loss_that_is_not_a_number_sorts_last(run, training):
    for i, loss in enumerate(["nan", 2.0, "inf", 1.0, 0.5]):
        directory = run.workdir / f"{i:02d}"
        (directory / "checkpoints" / "4").mkdir(parents=True)
        (directory / METRICS_FILE).write_text(json.dumps({"step": 4, "eval_loss": loss}) + "\n")
    # The loss of a trial before it diverged is not its result.
    sweep._note_divergence(directory, 6)
    assert order(run([{"seed": i} for i in range(5)])) == [3, 1, 0, 2, 4]
    assert training.trained == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TRIALS = []", r"^--sweep: .*trials.py: defines no function get_trials\(\)"),
        ("def get_trials(): ...", "must return a list of mappings; got None"),
        ("def get_trials(): return [('seed', 1)]", "must return a list of mappings; got"),
    ],
)
def test_a_file_that_lists_no_trials_is_refused(values, tmp_path, text, message):
    path = tmp_path / "trials.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        sweep.run_sweep(values, str(path), tmp_path, None)
