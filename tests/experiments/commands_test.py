"""Each experiment's command runs at a toy size, writes its results, and times nothing wrong."""

import json

import jax
import jax.numpy as jnp
import pytest
import toy

from experiments import kernels, measuring
from experiments.attention_noise import run as attention_noise
from experiments.conditioning import definitions
from experiments.conditioning import run as conditioning
from experiments.decode import benchmark as decode
from experiments.learnability import run as learnability
from experiments.model_step import benchmark as model_step
from experiments.scored_model import config as scored_config
from experiments.scored_model import samples
from experiments.sequence_scaling import simulate, two_gpus
from experiments.tpu_roofline import roofline
from experiments.triton_precondition import tune
from experiments.xla_precondition import benchmark as xla_benchmark
from lucid_jax.config import Config
from lucid_jax.data import check_data, load_tokenizer
from lucid_jax.ops.precondition import triton as pallas_triton
from lucid_jax.ops.precondition import xla
from lucid_jax.ops.precondition.triton_schedule import Schedule

pytestmark = pytest.mark.usefixtures("compilation_cache")
SHAPE, OTHER = kernels.Shape(1, 200, 4, 2, 16), kernels.Shape(1, 300, 4, 2, 16)
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
    "decode": (
        decode, ["--small", "--seconds=0"], ["benchmark.json"], "| 2 × 128 | xla |",
    ),
    "learnability": (
        learnability,
        ["--seeds=2", "--first=300", "--second=100", "--every=100", "--only=LUCID",
         "--only=softmax, temperature 1, second phase alone"],
        ["learnability.json", "learnability.png"],
        "| softmax, temperature 1, second phase alone | – |",
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
def test_a_command_prints_a_table_and_writes_results(name, tmp_path, capsys):
    module, flags, names, text = COMMANDS[name]
    module.main([*flags, f"--out={tmp_path}"])
    assert text in capsys.readouterr().out
    result = read(tmp_path, *names)
    assert result["command"].startswith(f"python -m {module.__name__}")
    if name not in ("roofline", "simulate"):
        assert result["environment"]["versions"]["jax"]
    if name == "learnability":
        # Both phases learn: the first from a mean square of 28, the second from what it left.
        assert all(x[2] < 8 and x[3] < x[2] for x in result["runs"][0]["loss"])
    if name == "conditioning":
        for x in result["records"]:
            assert max(x["inverse_norm"]) <= 2
            assert max(x["float32_error"]) < 1e-5 < max(x["bfloat16_error"]) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "factor", "message"),
    [
        (lambda out: xla_benchmark.benchmark(64, 0), 1 + 1e-4, "nothing was timed at this length"),
        (lambda out: kernels.prepare(BACKENDS, OTHER, "precondition", "forward"), 1.1, "at 1×300"),
        (lambda out: learnability.main([out]), 1 + 1e-6, "the layer by token differs"),
    ],
    ids=["xla", "kernels", "learnability"],
)
def test_a_wrong_solve_is_refused(run, factor, message, monkeypatch, tmp_path):
    solve = xla._solve
    monkeypatch.setattr(xla, "_solve", lambda *a: solve(*a) * factor)
    monkeypatch.setattr(measuring, "interleaved", lambda *a, **k: pytest.fail("timed"))
    jax.clear_caches()
    with pytest.raises(measuring.GateError, match=message):
        run(f"--out={tmp_path}")
    jax.clear_caches()


@pytest.mark.slow
def test_kernels_beside_a_library(monkeypatch):
    # Programs that take an accelerator 50 ms would take a CPU seconds.
    monkeypatch.setattr(kernels.Shape, "repeats", lambda shape, passes: 3)
    record = kernels.prepare(BACKENDS, SHAPE, "lucid_attention", "forward+backward")(0)
    assert record["gate_error"] <= kernels.TOLERANCE
    assert record["over_softmax"] > 0
    assert str(SHAPE) in kernels.table([record], "xla")


@pytest.mark.slow
def test_training_steps():
    record = model_step.measure(model_step.Run("lucid_1b:smoke", 64, 2, "dots", 1))
    rate = 2 * record["tokens_per_second"]
    softmax = {**record, "config": "softmax_1b", "tokens_per_second": rate}
    table = model_step.table([softmax, record])
    assert "| 2 × 64 | dots | `lucid_1b:smoke` |" in table
    assert table.endswith("| 100.0% |")


@pytest.mark.slow
def test_a_sequence_on_two_devices(monkeypatch):
    shape = kernels.Shape(1, 128, 4, 1, 16)
    monkeypatch.setattr(two_gpus, "PROGRAMS", two_gpus.PROGRAMS[:1])
    records = two_gpus.benchmark(shape, 64, (16,), seconds=0)
    assert [x["rules"] for x in records] == [False, True]
    assert two_gpus.table(records).count("`precondition` | forward | 16 |") == 1
    exact = two_gpus.exact
    monkeypatch.setattr(two_gpus, "exact", lambda *a: {k: 1.1 * x for k, x in exact(*a).items()})
    with pytest.raises(measuring.GateError, match="stripes of 16, without rules"):
        two_gpus.benchmark(shape, 64, (16,), seconds=0)


def test_two_gpus_are_timed_without_the_rules_too():
    measured = "NVIDIA H200", jnp.bfloat16, 8192, 1, 2**17, 64
    with two_gpus.rules(False):
        assert pallas_triton.column_parts(2, 8192) == 1
        assert pallas_triton.inverse_rows(*measured) is None
    assert pallas_triton.column_parts(2, 8192) == 16
    assert pallas_triton.inverse_rows(*measured)


@pytest.mark.slow
def test_commands_on_trained_models(tmp_path, capsys):
    runs = {kind: tmp_path / kind for kind in ("softmax", "lucid")}
    for kind, directory in runs.items():
        model = {
            "vocab_size": 258, "num_layers": 2, "embed_dim": 32, "mlp_dim": 32, "num_heads": 4,
            "num_kv_heads": 2, "head_dim": 8, "init_std": 0.5, "attention": kind,
        }  # fmt: skip
        toy.save_random(directory, Config.from_dict({"model": model}))
    text = tmp_path / "text.txt"
    text.write_text("lower triangle keys " * 10)
    source = [f"--checkpoint={runs['lucid']}", f"--text={text}", f"--out={tmp_path}"]
    conditioning.main(["--lengths=100", *source])
    assert "| lucid, layer 2 | 100 |" in capsys.readouterr().out
    assert len(read(tmp_path, "trained.json", "trained.png")["records"]) == 2
    with pytest.raises(ValueError, match="has 202 tokens, fewer than 300"):
        conditioning.main(["--lengths=300", *source])

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
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert texts == [samples.document(i) for i in range(40)]
    values = scored_config.get_config()
    values.data.update(train=str(path), eval=str(path), holdout=0.25)
    config = Config.from_dict(values.to_dict())
    check_data(config, load_tokenizer(config.data.tokenizer))


# The tuner of the Triton kernels.


@pytest.mark.parametrize("shape", tune.SHAPES, ids=str)
def test_candidates_are_few_and_differ(shape):
    sizes = shape.batch, shape.length, shape.kv_heads, shape.head_dim
    used = Schedule.choose("NVIDIA H200", jnp.dtype(jnp.bfloat16), *sizes)
    records = [c.record() for c in tune.candidates(shape, used)]
    assert 20 <= len(records) <= 32
    assert len({str(x) for x in records}) == len(records)
    for kernel in tune.KERNELS:
        mine = [x for x in records if x["kernel"] == kernel]
        assert mine[0] == tune.Candidate(kernel, used).record()
        assert {x["tiles"]["rows"] for x in mine} == set(tune.ROWS)
        assert len({x["fused"] for x in mine}) == (2 if kernel in tune.HALVES else 1)


def test_a_sweep_keeps_the_records_of_other_shapes(tmp_path, capsys, monkeypatch):
    def prepare_all(shapes):
        used = tune.schedule_in_use
        return {s: dict.fromkeys(tune.candidates(s, used(s)), int) for s in shapes}

    monkeypatch.setattr(tune, "prepare_all", prepare_all)
    monkeypatch.setattr(pallas_triton, "INTERPRET", True)
    first, second = map(str, tune.SHAPES[:2])
    counts = []
    for index, shapes in ((0, [first]), (1, [first, second]), (0, [second, first])):
        tune.main([f"--shape={index}", "--rounds=1", f"--out={tmp_path}"])
        result = read(tmp_path, "tuning.json")
        assert [x["shape"] for x in result["environments"]] == shapes
        counts.append([x["shape"] for x in result["records"]].count(first))
    assert len(set(counts)) == 1
    assert f"| {second} | all | 64 rows" in capsys.readouterr().out


@pytest.mark.slow
def test_candidates_run_and_a_wrong_one_is_not_timed(monkeypatch):
    gradient = pallas_triton.key_gradient

    def wrong(*arrays, tiles, **options):
        return gradient(*arrays, tiles=tiles, **options) * (1.1 if tiles.stages == 3 else 1)

    monkeypatch.setattr(pallas_triton, "key_gradient", wrong)
    monkeypatch.setattr(pallas_triton, "INTERPRET", True)
    monkeypatch.setattr(kernels.Shape, "repeats", lambda shape, passes: 1)
    monkeypatch.setattr(tune, "ROWS", (64,))
    monkeypatch.setattr(tune, "SIZES", {"stages": (2, 3)})
    monkeypatch.setattr(tune, "ORDERS", {})
    shape = kernels.Shape(1, 100, 1, 1, 16)
    [runs] = tune.prepare_all([shape]).values()
    records = tune.measure(shape, runs, rounds=1)
    assert {(x["kernel"], x["fused"]) for x in records} >= {(k, True) for k in tune.HALVES}
    for candidate, record in zip(runs, records):
        if candidate.schedule.gradient.stages == 3:
            assert "gradient of k has relative error" in record["error"]
        else:
            assert record["over_in_use"] > 0
