"""The command line: mistakes are one line, modes do what --help says, configurations run."""

import dataclasses
import importlib
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
from unittest import mock

import jax
import pytest
import toy

import run
from lucid_jax.config import Config, ConfigError
from lucid_jax.evaluate.checkpoint import evaluate_checkpoint
from lucid_jax.parallel.mesh import make_layout
from lucid_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("compilation_cache")

TINY = "--config=configs/tiny.py"
GENERATE = (TINY, "--mode=generate")
MISTAKES = {
    "unknown key": (
        [TINY, "--config.model.num_layer=3"],
        "unknown config key model.num_layer; did you mean model.num_layers?",
    ),
    "unknown section": ([TINY, "--config.modle.num_layers=3"], "unknown config key modle"),
    "section of a section": ([TINY, "--config.model.a.b=3"], "unknown config key model.a"),
    "no config file, and an override": (
        ["--config=configs/nope.py", "--config.steps=3"],
        "--config: no file 'configs/nope.py'",
    ),
    "no config file, after a space": (
        ["--config", "configs/nope.py"],
        "--config: no file 'configs/nope.py'",
    ),
    "an argument for a file that takes none": (
        [TINY + ":small"],
        "configs/tiny.py: get_config() was given 'small': too many positional arguments",
    ),
    "an argument that the file does not know": (
        ["--config=configs/softmax_1b.py:smok"],
        "configs/softmax_1b.py: the text after the colon must be one of full, smoke; got 'smok'",
    ),
    "no get_config": (
        ["--config=tests/toy.py"],
        "--config: tests/toy.py: defines no function get_config()",
    ),
    "empty source": ([TINY, "--config.data.train=text:{tmp}"], "no visible files below the folder"),
    "no best": (
        [TINY, "--mode=eval", "--checkpoint=best", "--workdir={tmp}/none"],
        "no checkpoint with an evaluation loss in",
    ),
    "nothing to start from": (
        [TINY, "--config.checkpoint.init_from={tmp}/none"],
        "no checkpoint in",
    ),
    "no such sweep": ([TINY, "--mode=sweep", "--sweep=nope.py"], "--sweep: no file 'nope.py'"),
    "wrong type": ([TINY, "--config.steps=many"], "--config.steps=many"),
    "no config file": (["--config=configs/nope.py"], "configs/nope.py"),
    "no config": ([], "--config"),
    "no data file": ([TINY, "--config.data.train=/nowhere/x.jsonl"], "/nowhere/x.jsonl"),
    "vocabulary": (
        [TINY, "--config.model.vocab_size=100"],
        "has 258 tokens, more than model.vocab_size=100",
    ),
    "mesh": ([TINY, "--config.mesh.fsdp=3"], "does not fit 1 devices"),
    "heads": ([TINY, "--config.model.num_heads=5"], "must be a multiple of model.num_kv_heads"),
    "profile": ([TINY, "--profile=5"], "--profile must be FIRST:LAST"),
    "no checkpoint": ([TINY, "--mode=eval", "--workdir={tmp}/none"], "no checkpoint in"),
    "no such task": (
        [TINY, "--mode=eval", "--tasks=ruler_vtt", "--lengths=2048"],
        "--tasks: no task 'ruler_vtt'; the closest is 'ruler_vt'",
    ),
    "no length": ([TINY, "--mode=eval", "--tasks=ruler_vt"], "--tasks=ruler_vt needs --lengths"),
    "not a length": (
        [TINY, "--mode=eval", "--tasks=ruler_vt", "--lengths=2048,4k"],
        "--lengths must be positive integers; got '4k'",
    ),
    "no samples": ([TINY, "--mode=eval", "--tasks=ruler_vt", "--samples=0"], "--samples=0"),
    "no such source": (
        [TINY, "--mode=eval", "--tasks=ruler_vt", "--lengths=2048", "--sources=essay=x/"],
        "--sources: a source is NAME=PATH with a name of essays, squad, hotpotqa, books",
    ),
    "lengths of the loss": (
        [TINY, "--mode=eval", "--lengths=2048"],
        "--lengths is for tasks other than loss; got --tasks=loss",
    ),
    "tasks while training": (
        [TINY, "--tasks=ruler_vt"],
        "--tasks is for --mode=eval; got --mode=train",
    ),
    "no checkpoint for tasks": (
        [TINY, "--mode=eval", "--tasks=ruler_vt", "--lengths=9", "--workdir={tmp}/none"],
        "no checkpoint in",
    ),
    "no sweep": ([TINY, "--mode=sweep"], "--mode=sweep needs --sweep=FILE"),
    "no cluster": ([TINY, "--distributed=auto"], "--distributed=auto finds no cluster here"),
    "not one of the processes": (
        [TINY, "--distributed=localhost:1234,2,2"],
        "HOST:PORT,INDEX,COUNT with INDEX from 0 and less than COUNT; got 'localhost:1234,2,2'",
    ),
    "no such slice": (
        [TINY, "--mode=compile", "--topology=nonsense"],
        "pip install 'jax[tpu]'"
        if importlib.util.find_spec("libtpu") is None
        else "'nonsense' is none",
    ),
    "stray argument": ([TINY, "train"], "unexpected argument 'train'"),
    "flags of another mode": (
        [TINY, "--sweep=configs/sweeps/tiny_attention.py", "--trial=1"],
        "--sweep is for --mode=sweep; got --mode=train",
    ),
    "profile of an evaluation": (
        [TINY, "--mode=eval", "--profile=1:2"],
        "--profile is for --mode=train; got --mode=eval",
    ),
    "a prompt of a training": (
        [TINY, "--prompt=def"],
        "--prompt is for --mode=generate; got --mode=train",
    ),
    "a checkpoint of a training": (
        [TINY, "--checkpoint=best"],
        "--checkpoint is for --mode=eval or --mode=generate; got --mode=train",
    ),
    "two prompts": (
        [*GENERATE, "--prompt=a", "--prompt_file=b"],
        "--prompt and --prompt_file are both given",
    ),
    "no prompt file": (
        [*GENERATE, "--prompt_file=/nowhere/x.txt"],
        "--prompt_file=/nowhere/x.txt cannot be read: [Errno 2] No such file",
    ),
    "empty prompt": ([*GENERATE, "--prompt="], "the prompt is empty"),
    "long prompt": (
        [*GENERATE, "--prompt=abc", "--max_new_tokens=300"],
        "a prompt of 4 tokens and --max_new_tokens=300 are more than the run's sequences have:"
        " --config.data.sequence_length=256",
    ),
    "no temperature to sample at": (
        [*GENERATE, "--prompt=a", "--top_k=3"],
        "a temperature above 0",
    ),
    "nothing to generate with": (
        [*GENERATE, "--prompt=a", "--workdir={tmp}/none"],
        "no checkpoint in",
    ),
    "a work directory below a file": (
        [TINY, "--workdir=configs/tiny.py/run"],
        "no work directory can be at 'configs/tiny.py/run': configs/tiny.py is a file",
    ),
    "a sweep in a bucket": (
        [TINY, "--mode=sweep", "--sweep=configs/sweeps/tiny_attention.py", "--workdir=gs://b/run"],
        "a work directory must be in the file system: mount the bucket; got 'gs://b/run'",
    ),
}
# Runs run.py on each of several command lines in a fork of its own, as importing what it
# needs takes longer than its answer; prints their exit codes and standard errors.
ASK = """
import json, os, runpy, sys, tempfile
import lucid_jax.inference.complete, lucid_jax.evaluate.checkpoint, lucid_jax.evaluate.run_tasks
import lucid_jax.training.sweep, lucid_jax.training.loop
said = []
for arguments in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            os.dup2(err.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.argv = ["run.py", *arguments]
            try:
                runpy.run_path("run.py", run_name="__main__")
            except SystemExit as exit:
                # Past the threads that libraries wait for, which a fork does not have.
                sys.stderr.flush()
                os._exit(exit.code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        err.seek(0)
        said.append((code, err.read()))
print(json.dumps(said))
"""
SIZED = (
    "lucid_1b", "softmax_1b", "lucid_1b_32k", "lucid_1b_128k", "lucid_1b_1m", "tinyllama_lucid",
)  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What run.py says to every mistake: exit code and standard error."""
    directory = tmp_path_factory.mktemp("mistakes")
    commands = []
    for arguments, _ in MISTAKES.values():
        commands.append([a.format(tmp=directory) for a in arguments])
        if not any("workdir" in a for a in arguments):
            commands[-1].append(f"--workdir={directory}/run")
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=toy.ROOT,
        env=toy.environment(),
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=True,
    )
    assert not (directory / "run" / "metrics.jsonl").exists(), "something was trained"
    return dict(zip(MISTAKES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(answers, mistake):
    code, err = answers[mistake]
    assert "Traceback" not in err
    # absl adds a line about --help to its own.
    line, *usage = err.splitlines()
    assert MISTAKES[mistake][1] in line
    assert line.startswith(("error: ", "FATAL Flags parsing error: "))
    assert len(usage) == line.startswith("FATAL")
    assert code == (1 if usage else 2)


def test_help_shows_every_mode():
    out = subprocess.run(
        [sys.executable, "run.py", "--help"], cwd=toy.ROOT, capture_output=True, text=True,
        check=False,
    ).stdout  # fmt: skip
    for word in (
        "<train|eval|generate|sweep|compile>",
        "--config=configs/tiny.py",
        "--mode=eval",
        "--profile",
    ):
        assert word in out


@pytest.mark.parametrize(
    ("config", "sweep", "directory"),
    [
        ("configs/lucid_1b.py", None, "runs/lucid_1b"),
        ("configs/lucid_1b.py:smoke", None, "runs/lucid_1b-smoke"),
        ("configs/lucid_1b.py:smoke", "a/b.py", "runs/lucid_1b-smoke-b"),
    ],
)
def test_runs_of_their_own_have_directories_of_their_own(config, sweep, directory):
    assert run._default_workdir(config, sweep) == directory


def test_compile_says_what_a_step_takes_and_trains_nothing(tmp_path):
    arguments = ("--mode=compile", f"--workdir={tmp_path}/run")
    out = toy.finish(toy.start("--config=configs/lucid_1b.py:smoke", *arguments))
    for said in ("160,608 parameters", "temporaries", "it fits", "model FLOPs", "collectives"):
        assert said in out
    assert not (tmp_path / "run").exists()


def get_config(name: str, *arguments: str):
    return importlib.import_module(f"configs.{name}").get_config(*arguments)


def test_train_and_evaluate_from_the_command_line(tmp_path):
    arguments = ("--config=configs/lucid_1b.py:smoke", f"--workdir={tmp_path}/run")
    out = toy.finish(toy.start(*arguments, "--profile=1:2"))
    assert "finished at step 4 of 4" in out
    assert "--mode=eval" in out
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    # The latest is what evaluations in this process ask for, below.
    out = toy.finish(toy.start(*arguments, "--mode=eval", "--checkpoint=best"))
    report = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert (report["step"], report["checkpoint"]) == (4, "best")
    assert f"loss {report['loss']:.4f}" in out
    assert [bucket[:2] for bucket in report["buckets"]] == [[0, 64], [64, 128]]
    tasks = ("--mode=eval", "--tasks=ruler_niah_single_1", "--lengths=600", "--samples=3")
    out = toy.finish(toy.start(*arguments, *tasks))
    assert "# Scores at step 4" in out
    assert "| ruler_niah_single_1 | 600 |" in out
    found = json.loads((tmp_path / "run" / "tasks" / "scores.json").read_text())
    assert found["environment"] == report["environment"]
    (scores,) = found["tasks"]
    assert scores["samples"] == 3
    ask = (*arguments, "--mode=generate", "--max_new_tokens=20")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("def solve(", encoding="utf-8")
    greedy = toy.finish(toy.start(*ask, f"--prompt_file={prompt}"))
    assert len(greedy) > 1
    # Nearly cold samples are the most likely tokens.
    sampled = subprocess.run(
        [sys.executable, "run.py", *ask, "--temperature=1e-4", "--top_k=100", "--top_p=0.99"],
        cwd=toy.ROOT, env=toy.environment(), input="def solve(", capture_output=True, text=True,
        check=True,
    ).stdout  # fmt: skip
    assert sampled == greedy


# lucid_1b runs from the command line above; those that are longer have the code of that at 32K.
@pytest.mark.parametrize("name", ["softmax_1b", "lucid_1b_32k"])
def test_smoke(name, tmp_path, monkeypatch):
    toy.use_devices(monkeypatch, 1)
    config = Config.from_dict(get_config(name, "smoke").to_dict())
    result = train(config, tmp_path)
    assert result.finished
    assert result.report is not None


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", SIZED)
def test_smoke_fits_the_devices_of_any_host(name, devices):
    config = Config.from_dict(get_config(name, "smoke").to_dict())
    assert make_layout(config, jax.devices()[:devices]).mesh.size == devices


@pytest.mark.parametrize("name", SIZED)
def test_full_size_fits_the_devices_that_its_docstring_names(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    shared = importlib.import_module("configs.lucid_1b").__doc__ if name == "softmax_1b" else ""
    cases = [(int(re.search(r"It is set for (\d+)\s+devices", text)[1]), "")]
    cases += re.findall(r"^ +(\d+) devices?: (--config\S+)$", text + shared, re.MULTILINE)
    assert len(cases) >= 4
    for count, override in cases:
        config = get_config(name)
        if override:
            key, value = override.removeprefix("--config.").split("=")
            config.update_from_flattened_dict({key: int(value)})
        kind = {"platform": "cpu", "device_kind": "cpu", "process_index": 0, "slice_index": 0}
        devices = [mock.Mock(id=i, **kind) for i in range(int(count))]
        assert make_layout(Config.from_dict(config.to_dict()), devices).mesh.size == int(count)


LENGTHS = (2048, 2048, 32_768, 131_072, 1_048_576, 2048)


@pytest.mark.parametrize(("name", "length"), [*zip(SIZED, LENGTHS)])
def test_full_size(name, length):
    values = get_config(name)
    values.mesh.context = 1
    config = Config.from_dict(values.to_dict())
    assert config.data.sequence_length == length
    assert toy.model_of(config).num_params == 1_100_048_384
    assert config.model.layer_kinds[0] == ("softmax" if name == "softmax_1b" else "lucid")


def test_every_configuration_is_tested():
    names = {path.stem for path in (toy.ROOT / "configs").glob("*.py")}
    assert names == {*SIZED, "tiny", "common"}


def test_evaluation_equals_that_of_training(tmp_path, monkeypatch, caplog):
    toy.use_devices(monkeypatch, 1)
    config = toy.toy_config(toy.write_corpus(tmp_path / "corpus"), steps=4, telemetry=False)
    workdir = tmp_path / "run"
    trained = train(config, workdir).report
    assert trained is not None
    table = evaluate_checkpoint(config, workdir, "latest")
    report = json.loads((workdir / "eval.json").read_text())
    assert report["loss"] == pytest.approx(trained.loss, rel=1e-6)
    assert report["tokens"] == trained.tokens
    assert report["environment"]["device"] == jax.devices()[0].device_kind
    assert report["environment"]["versions"]["jax"] == jax.__version__
    # The buckets are a partition of the tokens.
    assert sum(tokens for _, _, tokens, _ in trained.buckets) == trained.tokens
    nats = sum(tokens * loss for _, _, tokens, loss in trained.buckets)
    assert nats / trained.tokens == pytest.approx(trained.loss)
    assert f"{pathlib.Path(workdir)}" in table
    # The step of one run, into the directory of another that is not there yet.
    evaluate_checkpoint(config, tmp_path / "new", str(workdir / "checkpoints" / "4"))
    assert json.loads((tmp_path / "new" / "eval.json").read_text())["loss"] == report["loss"]
    # Where the training data is not at hand.
    data = dataclasses.replace(config.data, train="/nowhere/x.jsonl")
    evaluate_checkpoint(dataclasses.replace(config, data=data), workdir, "latest")
    assert json.loads((workdir / "eval.json").read_text()) == report

    # What the parameters were not trained for.
    model = dataclasses.replace(config.model, attention="softmax", remat="full")
    other = dataclasses.replace(config, model=model)
    change = "model.attention was 'softmax,lucid', is now 'softmax'"
    step = str(workdir / "checkpoints" / "4")
    message = f"holds another model: {change}; to evaluate .* --checkpoint={step}$"
    with pytest.raises(ConfigError, match=message):
        evaluate_checkpoint(other, workdir, "latest")
    evaluate_checkpoint(other, workdir, step)
    assert f"{step} is of another model: {change}" in caplog.text
    assert json.loads((workdir / "eval.json").read_text())["loss"] != report["loss"]
