"""Sweeps: all trials or one, resumed, in a table, and stopped by no diverging trial."""

import json
import logging

import pytest
import toy

from lucid_jax import sweep
from lucid_jax.config import Config, ConfigError
from lucid_jax.metrics.writer import METRICS_FILE, read_metrics
from lucid_jax.train import TrainResult


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    with toy.cached_compilation(tmp_path_factory.getbasetemp() / "xla"):
        yield


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    corpus = toy.write_corpus(tmp_path_factory.mktemp("sweep") / "corpus")
    return toy.toy_config(corpus, steps=4, eval_every=4, telemetry=False).to_dict()


@pytest.fixture
def run(values, tmp_path, monkeypatch):
    """Runs a sweep of the given trials; counts what was trained."""
    toy.use_devices(monkeypatch, 1)
    trained = []
    train = sweep.train
    monkeypatch.setattr(
        sweep, "train", lambda config, path: (trained.append(path.name), train(config, path))[1]
    )

    def run(trials, trial=None):
        path = tmp_path / "trials.py"
        path.write_text(f"def get_trials():\n    return {trials!r}\n")
        return sweep.run_sweep(values, str(path), tmp_path / "sweep", trial)

    run.trained, run.workdir = trained, tmp_path / "sweep"
    return run


def order(table: str) -> list[int]:
    return [int(line.split()[0]) for line in table.splitlines()[1:]]


def test_trials_run_once_and_are_sorted_by_loss(run):
    trials = [
        {"optim.learning_rate": 1e-5},
        {"optim.learning_rate": 1e-2, "model.attention": "softmax"},
    ]
    table = run(trials)
    assert run.trained == ["00", "01"]
    assert order(table) == [1, 0]
    assert "model.attention=softmax" in table
    assert table.count("finished") == 2
    assert run(trials) == table
    assert run.trained == ["00", "01"], "finished trials were run again"


def test_one_trial_by_index(run):
    trials = [{"seed": i} for i in range(3)]
    table = run(trials, trial=2)
    assert run.trained == ["02"]
    assert table.count("not started") == 2
    with pytest.raises(ConfigError, match="--trial=3 is not one of the 3 trials, 0 to 2"):
        run(trials, trial=3)


def test_a_diverging_trial_does_not_stop_the_others(run, caplog):
    with caplog.at_level(logging.ERROR):
        table = run([{"model.init_std": 1e30}, {"optim.learning_rate": 1e-2}])
    assert run.trained == ["00", "01"]
    assert "trial 0: step 1: loss" in caplog.text
    assert order(table) == [1, 0]
    assert "finished" in table.splitlines()[1]
    assert table.splitlines()[2].split()[:4] == ["0", "inf", "1", "diverged"]


def test_a_diverged_trial_is_run_again_only_by_number_or_when_changed(run, monkeypatch):
    trials = [{"model.init_std": 1e30}]
    table = run(trials)
    assert run(trials) == table
    assert run.trained == ["00"]
    assert run(trials, trial=0) == table
    assert run.trained == ["00", "00"]
    with monkeypatch.context() as patch:
        # Tried again, and stopped before it could diverge again.
        patch.setattr(sweep, "train", lambda config, path: TrainResult(0, config.steps, None))
        assert "not started" in run(trials, trial=0)
    assert run(trials) == table
    assert run([{"seed": 1}]).count("finished") == 1
    assert run.trained == ["00"] * 4


def test_a_stopped_sweep_goes_on(run, monkeypatch):
    trials = [{"seed": 0}, {"seed": 1}]
    with monkeypatch.context() as patch:
        toy.stop_after(patch, 2)
        assert "unfinished" in run(trials)
    assert run.trained == ["00"]
    assert run(trials).count("unfinished") == 0
    assert run.trained == ["00", "00", "01"]
    steps = [x["step"] for x in read_metrics(run.workdir / "00") if "loss" in x]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        ([{"seed": 1}, {"model.head": 2}], "unknown config key model.head"),
        ([{"seed": 1}, {"modle.num_layers": 2}], r"unknown config key modle; did you mean model\?"),
        ([{"seed": 1}, {"steps.warmup": 2}], "unknown config key steps.warmup: steps has none"),
        ([{"seed": 1}, {"model.num_layers": "2"}], "model.num_layers must be int; got '2'"),
        ([{"seed": 1}, {"mesh.tensor": 3}], "does not fit 1 devices"),
        ([{"seed": 1}, {"data.train": "/nowhere.jsonl"}], "/nowhere.jsonl"),
        ([], "lists no trials"),
    ],
)
def test_nothing_runs_unless_all_can(run, trials, message):
    with pytest.raises(ConfigError, match=message):
        run(trials)
    assert run.trained == []


def test_a_trial_killed_in_its_last_save_has_not_finished(run):
    run([{"seed": 1}])
    checkpoint = run.workdir / "00" / "checkpoints" / "4"
    checkpoint.rename(checkpoint.with_name("4.orbax-checkpoint-tmp"))
    assert "unfinished" not in run([{"seed": 1}])
    assert run.trained == ["00", "00"]
    assert checkpoint.exists()


def test_a_loss_that_is_no_number_comes_last(run, values):
    for i, loss in enumerate(["nan", 2.0, "inf", 1.0, 0.5]):
        directory = run.workdir / f"{i:02d}"
        (directory / "checkpoints" / "4").mkdir(parents=True)
        (directory / METRICS_FILE).write_text(json.dumps({"step": 4, "eval_loss": loss}) + "\n")
    # What it was before it diverged is not the result of a trial.
    sweep._note_divergence(directory, Config.from_dict({**values, "seed": 4}), 6)
    assert order(run([{"seed": i} for i in range(5)])) == [3, 1, 0, 2, 4]
    assert run.trained == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "^--sweep: no file '.*trials.py'"),
        ("TRIALS = []", r"^--sweep: .*trials.py: defines no function get_trials\(\)"),
        ("def get_trials(n): ...", r"get_trials\(n\) was given nothing"),
        ("def get_trials(): ...", "must return a list of mappings; got None"),
        ("def get_trials(): return [('seed', 1)]", "must return a list of mappings; got"),
        ("def get_trials(): return [{'seed': s}]", r"trials.py:1: NameError: name 's'"),
    ],
)
def test_a_file_that_lists_no_trials(values, tmp_path, text, message):
    path = tmp_path / "trials.py"
    if text:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        sweep.run_sweep(values, str(path), tmp_path, None)
