"""The command line: errors are one line, modes do what --help says, configurations run."""

import dataclasses
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import types
from unittest import mock

import jax
import pytest
import toy

from lucid_jax.config import Config, ConfigError
from lucid_jax.evaluate.checkpoint import evaluate_checkpoint
from lucid_jax.parallel.mesh import make_layout
from lucid_jax.runtime import command_line
from lucid_jax.training.loop import train
from lucid_jax.training.writer import read_metrics

pytestmark = pytest.mark.usefixtures("compilation_cache")

TINY = "--config=configs/tiny.py"
SMOKE = "--config=configs/lucid_1b.py:smoke"
GENERATE = (TINY, "--mode=generate")
MISTAKES = {
    "unknown key": (
        [TINY, "--config.model.num_layer=3"],
        "unknown config key model.num_layer; did you mean model.num_layers?",
    ),
    "unknown section": (
        [TINY, "--config.modle.num_layers=3"],
        "a --config override names an unknown section: 'modle'. Did you mean \"model\" instead",
    ),
    "section of a section": (
        [TINY, "--config.model.a.b=3"],
        "a --config override names an unknown section: 'a'",
    ),
    "unknown flag": ([TINY, "--prompts=a"], "Unknown command line flag 'prompts'"),
    "no config file, and an override": (
        ["--config=configs/nope.py", "--config.steps=3"],
        "--config=configs/nope.py: no file 'configs/nope.py'",
    ),
    "no config file, after a space": (
        ["--config", "configs/nope.py"],
        "--config=configs/nope.py: no file 'configs/nope.py'",
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
        "--config=tests/toy.py: tests/toy.py: defines no function get_config()",
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
    "implementation": (
        [SMOKE, "--config.model.implementation=mosaic_tpu"],
        "implementation='mosaic_tpu' cannot run this call: it needs a TPU",
    ),
    "half a step": ([TINY, "--config.steps=1.5"], "--config.steps=1.5"),
    "a work directory that cannot be written": (
        [SMOKE, "--workdir=/proc/run"],
        "cannot write to the work directory /proc/run: No such file or directory",
    ),
    "seed": ([TINY, "--config.seed=-1"], "config.seed must be in [0, 2^32); got -1"),
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
        "--sources: a source must be NAME=PATH, NAME one of essays, squad, hotpotqa, books",
    ),
    "lengths for the loss": (
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
    "index of no process": (
        [TINY, "--distributed=localhost:1234,2,2"],
        "HOST:PORT,INDEX,COUNT with INDEX from 0 and less than COUNT; got 'localhost:1234,2,2'",
    ),
    "no such slice": (
        [TINY, "--mode=compile", "--topology=nonsense"],
        "pip install 'jax[tpu]'"
        if importlib.util.find_spec("libtpu") is None
        else "'nonsense' is not known to libtpu",
    ),
    "stray argument": ([TINY, "train"], "unexpected argument 'train'"),
    "flags of another mode": (
        [TINY, "--sweep=configs/sweeps/tiny_attention.py", "--trial=1"],
        "--sweep is for --mode=sweep; got --mode=train",
    ),
    "profile while evaluating": (
        [TINY, "--mode=eval", "--profile=1:2"],
        "--profile is for --mode=train; got --mode=eval",
    ),
    "prompt while training": (
        [TINY, "--prompt=def"],
        "--prompt is for --mode=generate; got --mode=train",
    ),
    "checkpoint while training": (
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
    "sampling without a temperature": (
        [*GENERATE, "--prompt=a", "--top_k=3"],
        "a temperature above 0",
    ),
    "samples without a temperature": (
        [*GENERATE, "--prompt=a", "--num_samples=2"],
        "--num_samples=2 needs a temperature above 0",
    ),
    "seed below zero": (
        [*GENERATE, "--prompt=a", "--seed=-1"],
        "seed must be in [0, 2³²); got -1",
    ),
    "no checkpoint to generate with": (
        [*GENERATE, "--prompt=a", "--workdir={tmp}/none"],
        "no checkpoint in",
    ),
    "work directory below a file": (
        [TINY, "--workdir=configs/tiny.py/run"],
        "no work directory can be at 'configs/tiny.py/run': configs/tiny.py is a file",
    ),
    "work directory in a bucket": (
        [TINY, "--mode=sweep", "--sweep=configs/sweeps/tiny_attention.py", "--workdir=gs://b/run"],
        "a work directory must be in the file system: mount the bucket; got 'gs://b/run'",
    ),
}
# Runs run.py in a fork for every line of JSON on standard input, because imports take longer than
# most answers; prints exit code, standard output and standard error.
SERVER = """
import json, os, runpy, sys, tempfile
import lucid_jax.inference.complete, lucid_jax.evaluate.checkpoint, lucid_jax.evaluate.run_tasks
import lucid_jax.training.sweep, lucid_jax.training.loop, lucid_jax.training.compile
for line in sys.stdin:
    arguments, text = json.loads(line)
    files = [tempfile.TemporaryFile("w+") for _ in range(3)]
    files[0].write(text)
    files[0].seek(0)
    child = os.fork()
    if not child:
        for number, file in enumerate(files):
            os.dup2(file.fileno(), number)
        sys.stdin = open(0, closefd=False)
        sys.argv = ["run.py", *arguments]
        try:
            runpy.run_path("run.py", run_name="__main__")
        except SystemExit as exit:
            code = exit.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        # Libraries would wait for threads, which a fork does not have.
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for file in files:
        file.seek(0)
    print(json.dumps([code, files[1].read(), files[2].read()]), flush=True)
"""
SIZED = (
    "lucid_1b", "softmax_1b", "lucid_1b_32k", "lucid_1b_128k", "lucid_1b_1m", "tinyllama_lucid",
)  # fmt: skip


@pytest.fixture(scope="module")
def ask():
    """A function that runs run.py and returns exit code, standard output and error."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=toy.ROOT,
        env=toy.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(*arguments, text=""):
        print(json.dumps([arguments, text]), file=server.stdin, flush=True)
        code, out, err = json.loads(server.stdout.readline())
        return types.SimpleNamespace(code=code, out=out, err=err)

    yield ask
    server.kill()
    server.communicate()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(ask, tmp_path, mistake):
    arguments, message = MISTAKES[mistake]
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    if not any("workdir" in a for a in arguments):
        arguments.append(f"--workdir={tmp_path}/run")
    answer = ask(*arguments)
    assert "Traceback" not in answer.err
    line = answer.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert answer.code == 2
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_help_shows_every_mode(ask):
    out = ask("--help").out
    for text in (
        "<train|eval|generate|sweep|compile>",
        "--config=configs/tiny.py",
        "--mode=eval",
        "--profile",
    ):
        assert text in out


@pytest.mark.parametrize(
    ("config", "sweep", "directory"),
    [
        ("configs/lucid_1b.py", None, "runs/lucid_1b"),
        ("configs/lucid_1b.py:smoke", None, "runs/lucid_1b-smoke"),
        ("configs/lucid_1b.py:smoke", "a/b.py", "runs/lucid_1b-smoke-b"),
        ("runs/llama/config.py", None, "runs/llama"),
        ("../models/qwen/config.py:4096", "a/b.py", "runs/qwen-4096-b"),
        ("config.py", None, f"runs/{toy.ROOT.name}"),
    ],
)
def test_different_runs_have_different_default_directories(config, sweep, directory, monkeypatch):
    monkeypatch.chdir(toy.ROOT)
    assert command_line.default_workdir(config, sweep) == directory


@pytest.mark.slow
def test_compile_reports_the_needs_of_a_step_and_trains_nothing(ask, tmp_path):
    answer = ask(SMOKE, "--mode=compile", f"--workdir={tmp_path}/run")
    assert answer.code == 0
    for text in ("160,608 parameters", "temporaries", "it fits", "model FLOPs", "collectives"):
        assert text in answer.out
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def trained(ask, tmp_path_factory):
    """The arguments and the work directory of a run trained from the command line."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    arguments = (SMOKE, f"--workdir={workdir}")
    answer = ask(*arguments, "--profile=1:2")
    assert answer.code == 0, answer.err
    assert "finished at step 4 of 4" in answer.out
    assert re.search(r"compiling the training step.*\ncompiled in 0:\d\d:\d\d\n", answer.err)
    assert f"evaluate: python run.py {' '.join(arguments)} --mode=eval\n" in answer.out
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    return arguments, workdir


def test_ctrl_c_ends_with_a_newline(ask, tmp_path):
    (tmp_path / "stopped.py").write_text("def get_config():\n    raise KeyboardInterrupt\n")
    answer = ask(f"--config={tmp_path}/stopped.py", "--mode=generate", "--prompt=a")
    assert (answer.code, answer.out) == (130, "\n")
    assert "Traceback" not in answer.err


def test_train_evaluate_and_generate_from_the_command_line(ask, trained):
    arguments, workdir = trained
    answer = ask(*arguments, "--mode=eval", "--checkpoint=best")
    assert answer.code == 0, answer.err
    report = json.loads((workdir / "eval.json").read_text())
    assert (report["step"], report["checkpoint"]) == (4, "best")
    assert f"loss {report['loss']:.4f}" in answer.out
    assert report["loss"] == pytest.approx(read_metrics(workdir)[-1]["eval_loss"], rel=1e-6)
    assert [bucket[:2] for bucket in report["buckets"]] == [[0, 64], [64, 128]]
    generate = (*arguments, "--mode=generate", "--max_new_tokens=20")
    answer = ask(*generate, text="def solve(")
    assert answer.code == 0, answer.err
    assert len(answer.out) > 1


@pytest.mark.slow
def test_score_and_sample_from_the_command_line(ask, trained, tmp_path):
    arguments, workdir = trained
    tasks = ("--mode=eval", "--tasks=ruler_niah_single_1", "--lengths=600", "--samples=3")
    out = ask(*arguments, *tasks).out
    assert f"# Scores of {workdir.name} at step 4" in out
    assert "| ruler_niah_single_1 | 600 |" in out
    scores = json.loads((workdir / "tasks" / "scores.json").read_text())
    assert scores["environment"]["versions"]["jax"] == jax.__version__
    (task,) = scores["tasks"]
    assert task["samples"] == 3

    generate = (*arguments, "--mode=generate", "--max_new_tokens=20")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("def solve(", encoding="utf-8")
    greedy = ask(*generate, f"--prompt_file={prompt}").out
    assert len(greedy) > 1
    # At a temperature near zero, samples are the most likely tokens.
    sampling = ("--temperature=1e-4", "--top_k=100", "--top_p=0.99")
    assert ask(*generate, *sampling, text="def solve(").out == greedy
    sampling = ("--temperature=1", "--prompt=def solve(", "--num_samples=2", "--echo")
    two, again, other = (ask(*generate, *sampling, f"--seed={n}").out for n in (3, 3, 4))
    assert two == again != other
    one = ask(*generate, *sampling[:2], "--seed=3").out
    headings = [f"--- sample {n} of 2 ---\ndef solve(" for n in (1, 2)]
    assert two.startswith(f"{headings[0]}{one}{headings[1]}")
    assert two != f"{headings[0]}{one}{headings[1]}{one}"


def get_config(name: str, *arguments: str):
    return importlib.import_module(f"configs.{name}").get_config(*arguments)


# lucid_1b is trained above; the longer ones run the same code as lucid_1b_32k.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax_1b", "lucid_1b_32k"])
def test_the_smoke_size_trains(name, tmp_path, monkeypatch):
    toy.use_devices(monkeypatch, 1)
    config = Config.from_dict(get_config(name, "smoke").to_dict())
    result = train(config, tmp_path)
    assert result.finished
    assert result.report is not None


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", SIZED)
def test_the_smoke_size_fits_any_host(name, devices):
    config = Config.from_dict(get_config(name, "smoke").to_dict())
    assert make_layout(config, jax.devices()[:devices]).mesh.size == devices


@pytest.mark.parametrize("name", SIZED)
def test_the_full_size_fits_the_devices_in_its_docstring(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    shared = importlib.import_module("configs.lucid_1b").__doc__ if name == "softmax_1b" else ""
    cases = [(int(re.search(r"The file is set for (\d+)\s+devices", text)[1]), "")]
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
def test_the_full_size(name, length):
    values = get_config(name)
    values.mesh.context = 1
    config = Config.from_dict(values.to_dict())
    assert config.data.sequence_length == length
    assert toy.model_of(config).num_params == 1_100_048_384
    assert config.model.layer_kinds[0] == ("softmax" if name == "softmax_1b" else "lucid")


def test_every_configuration_file_is_tested():
    names = {path.stem for path in (toy.ROOT / "configs").glob("*.py")}
    assert names == {*SIZED, "tiny", "common"}


def test_evaluation_of_checkpoints_of_this_and_other_models(tmp_path, monkeypatch, caplog):
    toy.use_devices(monkeypatch, 1)
    config = toy.toy_config(toy.write_corpus(tmp_path / "corpus"))
    workdir = tmp_path / "run"
    toy.save_random(workdir, config)

    def evaluate(config, workdir, which):
        table = evaluate_checkpoint(config, workdir, which)
        return table, json.loads((workdir / "eval.json").read_text())

    table, report = evaluate(config, workdir, "latest")
    assert str(workdir) in table
    assert report["environment"]["device"] == jax.devices()[0].device_kind
    # The buckets are a partition of the tokens.
    assert sum(tokens for _, _, tokens, _ in report["buckets"]) == report["tokens"]
    nats = sum(tokens * loss for _, _, tokens, loss in report["buckets"])
    assert nats / report["tokens"] == pytest.approx(report["loss"])
    # A step of this run, evaluated into a work directory that does not exist yet.
    step = str(workdir / "checkpoints" / "4")
    assert evaluate(config, tmp_path / "new", step)[1]["loss"] == report["loss"]
    with pytest.raises(ConfigError, match="cannot write to the work directory /proc/run"):
        evaluate_checkpoint(config, "/proc/run", step)
    # The training data may be missing.
    data = dataclasses.replace(config.data, train="/nowhere/x.jsonl")
    assert evaluate(dataclasses.replace(config, data=data), workdir, "latest")[1] == report

    model = dataclasses.replace(config.model, attention="softmax", remat="full")
    other = dataclasses.replace(config, model=model)
    change = "model.attention was 'softmax,lucid', is now 'softmax'"
    message = f"holds another model: {change}; to use .* --checkpoint={step}$"
    with pytest.raises(ConfigError, match=message):
        evaluate_checkpoint(other, workdir, "latest")
    assert evaluate(other, workdir, step)[1]["loss"] != report["loss"]
    assert f"{step} is of another model: {change}" in caplog.text
