"""Each experiment's command runs at a toy size, and writes its results."""

import contextlib
import io
import json

import jax
import numpy as np
import pytest
import toy

from experiments import apart, kernels, measuring, parameters, tpu_check
from experiments.attention_noise import run as attention_noise
from experiments.conditioning import definitions
from experiments.conditioning import run as conditioning
from experiments.decode import benchmark as decode
from experiments.learnability import run as learnability
from experiments.model_step import benchmark as model_step
from experiments.mosaic_gpu import benchmark as mosaic_gpu
from experiments.path import benchmark as path
from experiments.scored_model import config as scored_config
from experiments.scored_model import samples
from experiments.sequence_scaling import measure, simulate, two_gpus
from experiments.tpu_roofline import roofline
from experiments.triton_precondition import accuracy, packed, tune
from experiments.triton_precondition import benchmark as triton_benchmark
from experiments.xla_precondition import benchmark as xla_benchmark
from experiments.xla_precondition import tune as xla_tune
from lucid_jax.config import Config
from lucid_jax.data import check_data, load_tokenizer
from lucid_jax.ops.precondition import triton as pallas_triton
from lucid_jax.ops.precondition import xla

pytestmark = pytest.mark.usefixtures("compilation_cache")
SHAPE = kernels.Shape(1, 200, 4, 2, 16)
BACKENDS = kernels.Backends("xla", "xla")
# Module, flags, results and a piece of the output.
COMMANDS = {
    "roofline": (roofline, [], ["roofline.json"], "| v5p | 1×131072, 16/16, 128 |"),
    "simulate": (
        simulate, ["--platforms=v5p", "--lengths=32768", "--devices=1,2,8"],
        ["simulation.json", "efficiency.png"], "| v5p | 128K, 16 |",
    ),
    "xla_precondition": (
        xla_benchmark, ["--lengths=64,128", "--seconds=0"],
        ["benchmark.json", "benchmark.png"], "| 128 | forward+backward |",
    ),
    "xla_tune": (xla_tune, ["--lengths=128", "--seconds=0"], ["tuning.json"], "| 64 × 128 |"),
    "path": (
        path, ["--lengths=128", "--seconds=0"], ["benchmark.json"], "| softmax | 128 |",
    ),
    "decode": (decode, ["--small", "--seconds=0"], ["benchmark.json"], "| 2 × 128 | xla |"),
    "learnability": (
        learnability, ["--seeds=2", "--first=300", "--second=100", "--every=100", "--only=LUCID"],
        ["learnability.json", "learnability.png"], "| LUCID |",
    ),
    "conditioning": (
        conditioning, ["--lengths=256", "--seeds=2"],
        ["random.json", "random.png"], "| mean cosine 0.9 | 256 |",
    ),
    "definitions": (
        definitions, ["--lengths=32,64,128", "--seeds=1"],
        ["definitions.json", "definitions.png"], "| whole kernel matrix |",
    ),
}  # fmt: skip


def read(directory, *names):
    """Returns the JSON results, and checks that the pictures were drawn."""
    for name in names[1:]:
        assert (directory / name).read_bytes().startswith(b"\x89PNG")
    return json.loads((directory / names[0]).read_text())


@pytest.mark.parametrize(
    "name", [x if x == "roofline" else pytest.param(x, marks=pytest.mark.slow) for x in COMMANDS]
)
def test_a_command_prints_a_table_and_writes_results(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(xla_tune, "SETTINGS", [(64, 128)])
    module, flags, names, text = COMMANDS[name]
    module.main([*flags, f"--out={tmp_path}"])
    assert text in capsys.readouterr().out
    result = read(tmp_path, *names)
    assert result["command"].startswith(f"python -m {module.__name__}")
    if name not in ("roofline", "simulate"):
        assert result["environment"]["versions"]["jax"]


@pytest.mark.parametrize("wrong", [1.1, np.nan])
def test_a_wrong_result_is_refused(wrong):
    exact = {"out": np.ones(3)}
    assert measuring.judge("op", {"out": np.full(3, 1.001)}, exact, 0.01) == pytest.approx(1e-3)
    with pytest.raises(measuring.GateError, match="op: out has relative error"):
        measuring.judge("op", {"out": np.full(3, wrong)}, exact, 0.01)


@pytest.mark.slow
def test_a_wrong_solve_is_not_timed(monkeypatch):
    solve = xla._solve
    monkeypatch.setattr(xla, "_solve", lambda *a: solve(*a) * (1 + 1e-4))
    monkeypatch.setattr(measuring, "interleaved", lambda *a, **k: pytest.fail("timed"))
    jax.clear_caches()
    with pytest.raises(measuring.GateError, match="has relative error"):
        xla_benchmark.benchmark(64, 0)
    jax.clear_caches()


# Commands that need devices, on CPUs.


@pytest.mark.parametrize(
    "module", [accuracy, measure, mosaic_gpu, packed, triton_benchmark, two_gpus, tune]
)
def test_a_command_without_its_gpus_says_so(module, capsys):
    with pytest.raises(SystemExit):
        module.main([])
    assert "the devices are 8 × cpu" in capsys.readouterr().err


def measure_here(name, runs, *flags):
    """Does what `apart.measure_apart` does, in this process."""
    module = {x.__spec__.name: x for x in (model_step, mosaic_gpu)}[name]
    for run in runs:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            module.main([f"--run={json.dumps(run)}", *flags])
        yield json.loads(printed.getvalue().splitlines()[-1])


@pytest.fixture
def small(monkeypatch):
    """Makes the commands' programs few and small, and lets them run on CPUs."""
    runs = [
        model_step.Run(f"{x}_1b:smoke", 64, 2, documents, 2, "dots", 1)
        for documents in (0, 20)
        for x in ("softmax", "lucid")
    ]
    ops = "precondition", "softmax_attention"
    mosaic_cases = tuple((op, SHAPE, mean) for op in ops for mean in (None, 50))
    benchmarks = [(SHAPE, "lucid_attention", "forward+backward")]
    for module, values in (
        (measuring, {"require_gpus": lambda *a: None}),
        # Programs that take an accelerator 50 ms would take a CPU seconds.
        (kernels.Shape, {"repeats": lambda shape, passes: 2}),
        (two_gpus, {"SHAPE": kernels.Shape(1, 128, 4, 1, 16), "CHECKED": 64}),
        (two_gpus, {"PROGRAMS": two_gpus.PROGRAMS[:1]}),
        (triton_benchmark, {"Backends": lambda *a: BACKENDS, "BENCHMARKS": benchmarks}),
        (triton_benchmark, {"dense_solve": lambda shape: None}),
        (packed, {"CASES": ((SHAPE, 50),), "KERNELS": "xla"}),
        (mosaic_gpu, {"CASES": mosaic_cases, "IMPLEMENTATIONS": ("xla",) * 3}),
        (mosaic_gpu, {"MOST_DOCUMENTS": 0}),
        (accuracy, {"SHAPES": ((100, 16),), "COSINES": (0.7,)}),
        (tpu_check, {"BACKENDS": BACKENDS, "BENCHMARKS": benchmarks}),
        (tpu_check, {"provenance": lambda *a: {}}),
        (tpu_check, {"conformance": lambda: dict.fromkeys(("tests", "failures", "errors"), 0)}),
        (tpu_check.subprocess, {"check_output": lambda *a, **k: "tpu"}),
        (model_step, {"runs": lambda devices: runs}),
        (apart, {"measure_apart": measure_here, "report_and_wait": lambda: None}),
        (apart, {"share_gpus": lambda: None}),
        (tune, {"SHAPES": (kernels.Shape(1, 100, 1, 1, 16),), "ROWS": (64,), "ORDERS": {}}),
        (tune, {"SIZES": {"stages": (2, 3)}}),
        (pallas_triton, {"INTERPRET": True}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "flags", "file", "text"),
    [
        (triton_benchmark, ["--seconds=0"], "benchmark.json", f"| {SHAPE} | `lucid_attention` |"),
        (packed, ["--seconds=0"], "packed.json", f"| {SHAPE} | 50 ("),
        (mosaic_gpu, ["--seconds=0"], "benchmark.json", f"n` | {SHAPE} | 50 | forward+backward |"),
        (accuracy, [], "accuracy.json", "| 100 | 16 | 0.7 |"),
        (two_gpus, ["--widths=16", "--seconds=0"], "two_gpus.json", "| forward | 16 |"),
        (model_step, [], "benchmark.json", "| `lucid_1b:smoke` |"),
        (tune, ["--rounds=1"], "tuning.json", "| 1×100, 1/1, 16 | all | 64 rows"),
    ],
    ids=[
        "triton_precondition",
        "packed",
        "mosaic_gpu",
        "accuracy",
        "two_gpus",
        "model_step",
        "tune",
    ],
)
def test_a_command_of_gpus(module, flags, file, text, small, tmp_path, capsys):
    module.main([*flags, f"--out={tmp_path}"])
    assert text in capsys.readouterr().out
    records = read(tmp_path, file)["records"]
    assert records
    assert not any("error" in x for x in records)


@pytest.mark.slow
def test_a_check_of_a_tpu(small, tmp_path, capsys):
    tpu_check.main(["--seconds=0", f"--out={tmp_path / 'check.json'}"])
    assert "0 tests, 0 failures, 0 errors" in capsys.readouterr().out
    [record] = read(tmp_path, "check.json")["benchmarks"]
    assert record["over_softmax"] > 0


@pytest.mark.slow
def test_commands_on_trained_models(tmp_path, capsys):
    runs = {kind: tmp_path / kind for kind in ("softmax", "lucid")}
    for kind, directory in runs.items():
        toy.save_random(directory, toy.toy_config("", model={"attention": kind}))
    copy, text = tmp_path / "copy", tmp_path / "text.txt"
    parameters.main([f"--input={runs['lucid']}", f"--output={copy}"])
    text.write_text("lower triangle keys " * 10)
    source = [f"--checkpoint={copy}", f"--text={text}", f"--out={tmp_path}"]
    conditioning.main(["--lengths=100", *source])
    assert "| copy, layer 2 | 100 |" in capsys.readouterr().out
    assert len(read(tmp_path, "trained.json", "trained.png")["records"]) == 2

    task = ["--length=72", "--digits=2", "--alphabet=3", "--needles=6", "--queries=4", "--rows=2"]
    models = [f"--{kind}={directory}" for kind, directory in runs.items()]
    attention_noise.main([*models, *task, f"--out={tmp_path}"])
    assert capsys.readouterr().out.count("| lucid |") == 2
    softmax, lucid = read(tmp_path, "attention_noise.json", "attention_noise.png")["records"]
    assert not softmax["accuracy_without_inverse"]
    assert list(lucid["accuracy_without_inverse"]) == ["0", "1"]


@pytest.mark.slow
def test_samples_are_what_the_scored_models_configuration_reads(tmp_path):
    path = tmp_path / "new" / "train.jsonl"
    samples.main([f"--output={path}", "--count=40"])
    assert len(path.read_text().splitlines()) == 40
    values = scored_config.get_config()
    values.data.update(train=str(path), eval=str(path), holdout=0.25)
    config = Config.from_dict(values.to_dict())
    check_data(config, load_tokenizer(config.data.tokenizer))
