"""Training end to end: its files, and that interruptions do not change its result."""

import dataclasses
import pathlib
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import time

import jax
import numpy as np
import pytest
import toy
from tensorboardX.proto.event_pb2 import Event

from lucid_jax.checkpoint.manager import Checkpointer, checkpoint_directory
from lucid_jax.checkpoint.reader import CheckpointError, eval_losses, step_paths
from lucid_jax.checkpoint.restore import check_same_model, restore_params
from lucid_jax.config import CheckpointConfig, ConfigError, MeshConfig
from lucid_jax.runtime.preemption import Preemption
from lucid_jax.runtime.workdir import read_config
from lucid_jax.training.loop import train
from lucid_jax.training.reporter import NonFiniteError
from lucid_jax.training.step import Trainer
from lucid_jax.training.writer import read_metrics

pytestmark = [
    pytest.mark.usefixtures("compilation_cache"),
    # Orbax abandons its other reads when one meets a damaged file.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def one_device(monkeypatch):
    toy.use_devices(monkeypatch, 1)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """The configuration and work directory of an uninterrupted run of 20 steps on one device."""
    config = toy.toy_config(corpus)
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        toy.use_devices(monkeypatch, 1)
        result = train(config, workdir)
    assert (result.step, result.finished) == (20, True)
    assert result.report.loss == read_metrics(workdir)[-1]["eval_loss"]
    return config, workdir


@pytest.fixture(scope="module")
def stopped_run(undisturbed, tmp_path_factory):
    """The work directory of the same run, stopped after step 7."""
    config, _ = undisturbed
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        toy.use_devices(monkeypatch, 1)
        toy.stop_after(monkeypatch, 7)
        result = train(config, workdir)
    assert (result.step, result.finished, result.report) == (7, False, None)
    return workdir


@pytest.fixture
def stopped(stopped_run, tmp_path):
    """A copy of it that a test may resume."""
    return pathlib.Path(shutil.copytree(stopped_run, tmp_path / "stopped"))


def training_lines(workdir):
    return [line for line in toy.curve(workdir) if "loss" in line]


def evaluations(workdir):
    """Evaluation loss by step."""
    return {x["step"]: x["eval_loss"] for x in read_metrics(workdir) if "eval_loss" in x}


def assert_same_run(workdir, other, config):
    """Compares the final state bit by bit, and every line of the training metrics."""
    assert toy.newest_step(workdir) == config.steps
    toy.assert_same_bits(toy.saved_state(workdir, config), toy.saved_state(other, config))
    assert training_lines(workdir) == training_lines(other)


def events(workdir):
    """Tag, step and value of all TensorBoard scalars."""
    scalars = []
    for file in sorted((workdir / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            # Length and its checksum, the event and its checksum.
            size = struct.unpack_from("<Q", data)[0]
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            scalars += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return scalars


# Files of a run.


def test_a_run_learns_and_writes_its_files(undisturbed):
    config, workdir = undisturbed
    lines = read_metrics(workdir)
    training = [line for line in lines if "loss" in line]

    assert [line["step"] for line in training] == list(range(1, 21))
    assert training[-1]["loss"] < 0.7 * training[0]["loss"]
    for line in training:
        for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu"):
            assert line[name] > 0, name
        assert line["seconds_left"] >= 0
        # Only layer 1 is a LUCID layer.
        assert len(line["off_diagonal"]) == len(line["value_gain"]) == 1
        assert all(0 < x <= 1 for x in line["off_diagonal"])
        assert all(0 < x <= 2 for x in line["value_gain"])
    assert training[-1]["seconds_left"] == 0
    peak = config.optim.learning_rate
    assert max(line["learning_rate"] for line in training) == pytest.approx(peak)
    assert training[-1]["learning_rate"] == pytest.approx(0.1 * peak)

    evaluated = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [8, 16, 20]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    for line in evaluated:
        assert line["eval_perplexity"] == pytest.approx(np.exp(line["eval_loss"]))
        assert 0 < line["eval_unigram_loss"] < np.log(258)
    saved = eval_losses(step_paths(checkpoint_directory(workdir)))
    assert {int(path.name): loss for path, loss in saved.items()}.items() <= (
        evaluations(workdir).items()
    )
    assert {path.name for path in saved} >= {"16", "20"}

    png = (workdir / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB\x60\x82")
    assert read_config(workdir) == config
    scalars = events(workdir)
    assert {(step, tag) for tag, step, _ in scalars} >= {(20, "value_gain/00"), (20, "eval_loss")}
    losses = [value for tag, _, value in scalars if tag == "loss"]
    np.testing.assert_allclose(losses, [line["loss"] for line in training], rtol=1e-6)


@pytest.mark.slow
def test_a_report_averages_the_steps_since_the_last_one(undisturbed, tmp_path, one_device):
    config, workdir = undisturbed
    every_step = [line["loss"] for line in training_lines(workdir)]
    train(dataclasses.replace(config, log_every=3), tmp_path)
    # Evaluations and saves report too.
    ends = [3, 4, 6, 8, 9, 12, 15, 16, 18, 20]
    means = [np.mean(every_step[a:b]) for a, b in zip([0, *ends], ends)]
    lines = training_lines(tmp_path)
    assert [line["step"] for line in lines] == ends
    np.testing.assert_allclose([line["loss"] for line in lines], means, rtol=1e-6)


# Stopping and resuming.


def test_a_stopped_run_resumes_bit_exactly(undisturbed, stopped, one_device, monkeypatch):
    config, workdir = undisturbed
    assert toy.newest_step(stopped) == 7
    # Before an evaluation, then during two others, the last of which ends the run.
    for step, polls in ((8, 0), (16, 1), (20, 1)):
        toy.stop_after(monkeypatch, step, polls)
        result = train(config, stopped)
        assert (result.step, result.finished, result.report) == (step, False, None)
        assert toy.newest_step(stopped) == step
        assert evaluations(stopped) == {}
    # Asked to stop again at the start of the last evaluation, which is made up for.
    toy.stop_after(monkeypatch, 20)
    assert not train(config, stopped).finished
    toy.stop_after(monkeypatch, 0)
    result = train(config, stopped)
    assert result.finished
    assert evaluations(stopped) == {20: result.report.loss}
    assert result.report.loss == evaluations(workdir)[20]
    assert_same_run(stopped, workdir, config)


def test_a_finished_run_is_left_as_it_is(undisturbed, tmp_path, one_device):
    config, workdir = undisturbed
    copy = pathlib.Path(shutil.copytree(workdir, tmp_path / "run"))
    result = train(config, copy)
    assert (result.step, result.finished, result.report) == (20, True, None)
    assert_same_run(copy, workdir, config)
    assert toy.curve(copy) == toy.curve(workdir)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(undisturbed, stopped, one_device, caplog):
    config, workdir = undisturbed
    state = pathlib.Path(stopped) / "checkpoints" / "7" / "state"
    for path in [path for path in state.rglob("*") if path.parent.name == "d"]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    train(config, stopped)
    assert "Skipping damaged checkpoint" in caplog.text
    assert_same_run(stopped, workdir, config)
    assert toy.curve(stopped) == toy.curve(workdir)


@pytest.mark.slow
def test_a_run_takes_another_learning_rate_with_a_warning(corpus, stopped, one_device, caplog):
    config = toy.toy_config(
        corpus,
        steps=10,
        optim={"learning_rate": 1e-3},
        data={"train": f"{corpus}/", "eval": f"{corpus}/1.txt"},
    )
    assert train(config, stopped).finished
    assert f"data.train was {corpus!r}, is now '{corpus}/'" in caplog.text
    assert f"data.eval was {corpus!r}, is now '{corpus}/1.txt'" in caplog.text
    assert "changed since the checkpoint: optim.learning_rate was 0.01, is now 0.001" in caplog.text
    assert "changed since the checkpoint: steps was 20, is now 10" in caplog.text
    lines = training_lines(stopped)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[6]["learning_rate"] > 5e-3
    assert lines[9]["learning_rate"] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "lucid"}, "model.attention was 'softmax,lucid', is now 'lucid'"),
        ({"embed_dim": 64}, "model.embed_dim was 32, is now 64"),
        ({"rope_base": 5e5}, "model.rope_base was 10000.0, is now 500000.0"),
    ],
    ids=["kind", "shape", "rope"],
)
def test_a_run_refuses_another_model(corpus, stopped, one_device, changes, message):
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    message = f"{stopped} holds a run of another model: {message}; give .*--workdir.*--overwrite"
    with pytest.raises(ConfigError, match=message):
        train(toy.toy_config(corpus, model=changes), stopped)
    after = {path: path.stat().st_mtime_ns for path in stopped.rglob("*") if path.name != ".lock"}
    before.pop(stopped / ".lock")
    assert after == before
    # Options that leave the meaning of the parameters alone may change.
    check_same_model(
        toy.toy_config(corpus, seed=1, model={"remat": "full", "implementation": "xla"}),
        stopped,
        "bytes",
    )


def test_a_run_refuses_another_tokenizer(corpus, stopped, one_device, tmp_path):
    path = tmp_path / "tokenizer.json"
    toy.train_bpe(path, ["a b"], 258)
    message = f"data.tokenizer was 'bytes', is now '{path}', of .*--workdir.*--overwrite"
    with pytest.raises(ConfigError, match=message):
        train(toy.toy_config(corpus, data={"tokenizer": str(path)}), stopped)
    assert read_config(stopped).data.tokenizer == "bytes"


def test_overwriting_starts_anew_once_all_is_checked(corpus, stopped, one_device, monkeypatch):
    with pytest.raises(ConfigError, match="has 258 tokens, more than"):
        train(toy.toy_config(corpus, model={"vocab_size": 9}), stopped, overwrite=True)
    nowhere = toy.toy_config(corpus, checkpoint={"init_from": str(stopped.parent / "nowhere")})
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train(nowhere, stopped, overwrite=True)
    assert toy.newest_step(stopped) == 7
    toy.stop_after(monkeypatch, 2)
    train(toy.toy_config(corpus), stopped, overwrite=True)
    assert toy.newest_step(stopped) == 2
    assert [line["step"] for line in read_metrics(stopped)] == [1, 2]


def test_a_request_to_stop_before_the_first_step_compiles_nothing(
    corpus, tmp_path, one_device, monkeypatch
):
    monkeypatch.setattr(Preemption, "requested", lambda self, step: True)
    result = train(toy.toy_config(corpus), tmp_path / "run")
    assert (result.step, result.finished, toy.newest_step(tmp_path / "run")) == (0, False, 0)


# The command line, killed and terminated.


@pytest.fixture(scope="module")
def command_line(corpus, tmp_path_factory):
    """A configuration, its file, and the work directory of an uninterrupted run by run.py."""
    directory = tmp_path_factory.mktemp("command_line")
    config = toy.toy_config(corpus, eval_every=6, telemetry=False, checkpoint={"every": 3})
    path = toy.write_config(directory / "config.py", config)
    toy.finish(toy.start(f"--config={path}", f"--workdir={directory / 'run'}"))
    return config, path, directory / "run"


def kill(process, workdir, moment, rng):
    """Kills or terminates the process in a phase of the run; returns whether it was running."""

    def unfinished_saves():
        checkpoints = workdir / "checkpoints"
        names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
        return {name for name in names if "tmp" in name}

    if moment == "starting":
        time.sleep(rng.uniform(0.2, 2.5))
    elif moment in ("stepping", "terminating"):
        # Past another checkpoint, so that a run of many kills advances.
        saved = toy.newest_step(workdir)
        toy.until(process, lambda: toy.newest_step(workdir) > saved)
        time.sleep(rng.uniform(0, 0.02))
    else:
        # An earlier kill may have left some, which the run removes when it starts.
        old = unfinished_saves()
        toy.until(process, lambda: unfinished_saves() - old)
        time.sleep(rng.uniform(0, 0.01))
    struck = process.poll() is None
    process.send_signal(signal.SIGTERM if moment == "terminating" else signal.SIGKILL)
    process.communicate()
    return struck


def test_sigterm_saves_and_prints_how_to_resume(undisturbed, tmp_path, one_device):
    config, _ = undisturbed
    path = toy.write_config(tmp_path / "config.py", config)
    workdir = tmp_path / "run"
    arguments = (f"--config={path}", f"--workdir={workdir}", "--config.steps=20")
    process = toy.start(*arguments, "--overwrite")
    toy.until(process, lambda: len(read_metrics(workdir)) >= 4)
    with pytest.raises(ConfigError, match=f"{workdir} is in use by process {process.pid} on "):
        train(config, workdir)
    process.send_signal(signal.SIGTERM)
    out = toy.finish(process, code=75)
    step = toy.newest_step(workdir)
    assert 4 <= step < config.steps
    assert f"stopped at step {step} of 20" in out
    assert training_lines(workdir)[-1]["step"] == step
    resume = shlex.split(re.search(r"^resume: python (.*)$", out, re.MULTILINE)[1])
    assert resume == ["run.py", *arguments]


@pytest.mark.slow
def test_many_kills_change_nothing(command_line, tmp_path):
    moments = [
        "starting", "saving", "stepping", "starting", "saving", "terminating", "starting",
        "stepping", "saving", "stepping", "saving", "saving",
    ]  # fmt: skip
    config, path, undisturbed = command_line
    rng = random.Random(len(moments))
    workdir = tmp_path / "run"
    struck, steps = 0, []
    for moment in moments:
        process = toy.start(f"--config={path}", f"--workdir={workdir}")
        struck += kill(process, workdir, moment, rng)
        steps.append(toy.newest_step(workdir))
    toy.finish(toy.start(f"--config={path}", f"--workdir={workdir}"))
    # A kill after the end of the run would test nothing.
    assert struck >= 4, steps
    assert 0 < steps[3] < config.steps, steps
    assert_same_run(workdir, undisturbed, config)
    assert toy.curve(workdir) == toy.curve(undisturbed)
    assert not [p.name for p in (workdir / "checkpoints").iterdir() if not p.name.isdigit()]


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_costs_nothing(command_line, tmp_path):
    config, path, undisturbed = command_line
    arguments = (f"--config={path}", f"--workdir={tmp_path / 'run'}", "--config.telemetry=False")
    process = toy.start(*arguments)
    # A checkpoint has larger files.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    _, err = process.communicate()
    lines = [line for line in err.splitlines() if "cudart" not in line]
    assert process.returncode == 2, err
    assert "Traceback" not in err
    assert lines[-1].startswith(f"error: {tmp_path / 'run'}: File too large; ")
    toy.finish(toy.start(*arguments))
    assert_same_run(tmp_path / "run", undisturbed, config)


def test_a_second_signal_ends_the_process():
    # A shell may start background jobs with SIGINT ignored.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    with Preemption() as preemption:
        assert not preemption.requested(1)
        signal.raise_signal(signal.SIGINT)
        assert preemption.requested(2)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, inherited) is signal.default_int_handler


# Runs that diverge, are sharded, or start from another run.


def diverging(corpus, save_every):
    """A run that diverges at its second step, within a report."""
    optim = {"learning_rate": 1e38, "warmup": 0.0, "weight_decay": 0.0}
    checkpoint = {"every": save_every}
    return toy.toy_config(corpus, steps=9, log_every=3, optim=optim, checkpoint=checkpoint)


def test_a_diverging_run_stops_and_saves_nothing_unsound(corpus, tmp_path, one_device):
    config = diverging(corpus, save_every=1)
    workdir = tmp_path / "run"
    for _ in range(2):  # The second time from the checkpoint of step 1.
        message = r"^step 2: loss \S+, gradient norm \S+, learning rate \d.*nothing was saved"
        with pytest.raises(NonFiniteError, match=message) as error:
            train(config, workdir)
        assert "nan" in str(error.value) or "inf" in str(error.value)
        assert toy.newest_step(workdir) == 1
        for name, x in toy.saved_state(workdir, config).items():
            assert np.isfinite(x).all(), name
        assert [line["step"] for line in read_metrics(workdir)] == [1]


@pytest.mark.slow
def test_the_error_names_the_first_bad_step_of_a_report(corpus, tmp_path, one_device):
    config = diverging(corpus, save_every=8)
    with pytest.raises(NonFiniteError, match=r"^step 2: .*; the step before: loss 5\.\d+, grad"):
        train(config, tmp_path / "run")
    assert toy.newest_step(tmp_path / "run") == 0
    with pytest.raises(CheckpointError, match="no checkpoint"):
        restore_params(tmp_path / "run", toy.model_of(config).abstract_params)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["pack", "document"])
def test_context_parallel_runs_learn_the_same(corpus, tmp_path, monkeypatch, packing):
    """Metrics of evaluations and telemetry agree too; stripes of 20 pad sequences of 64."""
    # A larger eps, because Adam amplifies rounding noise when it divides by almost zero.
    config = toy.toy_config(corpus, optim={"eps": 1e-4}, data={"packing": packing})
    toy.use_devices(monkeypatch, 1)
    train(config, tmp_path / "one")
    toy.use_devices(monkeypatch, 3)
    shared = dataclasses.replace(config, mesh=MeshConfig(context=3, stripe=20))
    train(shared, tmp_path / "shared")
    toy.assert_close_curves(tmp_path / "shared", tmp_path / "one")


@pytest.fixture
def step_inputs(monkeypatch):
    """Collects the states that training steps start from."""
    states = []
    make_step = Trainer.make_step

    def spy(trainer):
        step = make_step(trainer)

        def spied(state, batch):
            states.append(toy.named(state))
            return step(state, batch)

        spied.trace = step.trace
        return spied

    monkeypatch.setattr(Trainer, "make_step", spy)
    return states


def test_a_run_starts_from_the_parameters_of_another(
    corpus, tmp_path, one_device, step_inputs, monkeypatch
):
    # A softmax model that has trained, for a model with LUCID layers.
    source = toy.toy_config(corpus, model={"attention": "softmax"})
    trainer = Trainer.build(source, toy.model_of(source))
    trained = jax.tree.map(lambda x: x + 1, trainer.init_state())
    with Checkpointer(checkpoint_directory(tmp_path / "source"), CheckpointConfig()) as saver:
        saver.save(1, trained, data_state={}, config=source.to_dict(), eval_loss=None)

    config = toy.toy_config(corpus, checkpoint={"init_from": str(tmp_path / "source")})
    toy.stop_after(monkeypatch, 2)
    train(config, tmp_path / "run")
    model = toy.model_of(config)
    expected = Trainer.build(config, model).init_state(trained.params)
    assert int(expected.step) == 0
    assert len(step_inputs) == 2
    toy.assert_same_bits(step_inputs[0], toy.named(expected))
    random_params = toy.named(model.init(config.seed))
    assert any((random_params[k] != x).any() for k, x in toy.named(trained.params).items())

    # From then on the run's own checkpoint takes precedence.
    toy.stop_after(monkeypatch, 3)
    train(config, tmp_path / "run")
    assert [int(state[".step"]) for state in step_inputs] == [0, 1, 2]
