"""Each experiment's command runs at a toy size, writes its results, and times nothing wrong."""

import json

import jax
import jax.numpy as jnp
import pytest
import toy

from experiments import kernels, measuring, tpu_check
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
SHAPE = kernels.Shape(1, 200, 4, 2, 16)


def results(directory, *names):
    """Returns a JSON result, and checks that the pictures were drawn."""
    for name in names[1:]:
        assert (directory / name).read_bytes().startswith(b"\x89PNG")
    return json.loads((directory / names[0]).read_text())


def never_time(monkeypatch):
    monkeypatch.setattr(measuring, "interleaved", lambda *a, **k: pytest.fail("timed"))


def break_solve(monkeypatch, factor):
    solve = xla._solve
    monkeypatch.setattr(xla, "_solve", lambda *a: solve(*a) * factor)
    jax.clear_caches()


def test_the_roofline_names_what_binds(tmp_path, capsys):
    roofline.main([f"--out={tmp_path}"])
    assert capsys.readouterr().out.count("| v5p | 1×") == len(roofline.SHAPES)
    result = results(tmp_path, "roofline.json")
    assert result["command"] == f"python -m experiments.tpu_roofline.roofline --out={tmp_path}"
    for record in result["records"]:
        terms = record["forward"]["ms"]
        assert record["forward"]["bound"] == max(terms, key=terms.get)
    # The tiles that the kernels take are the best of those listed.
    assert all(x["ms"]["1024×512"] == min(x["ms"].values()) for x in result["ms_by_tile"])


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the error names missing GPUs")
def test_commands_for_gpus_name_the_devices(capsys):
    for module in (decode, two_gpus):
        with pytest.raises(SystemExit):
            module.main([])
    error = capsys.readouterr().err
    assert "needs 1 GPU; the devices are 8 × cpu" in error
    assert "needs 2 GPUs; the devices are 8 × cpu" in error


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "tpu", reason="the error names a missing TPU")
def test_the_tpu_check_needs_a_tpu(capsys):
    with pytest.raises(SystemExit):
        tpu_check.main([])
    assert "it needs a TPU; the default backend is cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_the_xla_benchmark(tmp_path, capsys, monkeypatch):
    xla_benchmark.main(["--lengths=64,128", "--seconds=0", f"--out={tmp_path}"])
    assert capsys.readouterr().out.count("| 128 |") == 2
    records = results(tmp_path, "benchmark.json", "benchmark.png")["records"]
    assert {x["op"] for x in records} == {c.name for c in xla_benchmark.CONTESTANTS}
    assert all(x["median_s"] > 0 and x["temp_bytes"] > 0 for x in records)
    break_solve(monkeypatch, 1 + 1e-4)
    never_time(monkeypatch)
    with pytest.raises(measuring.GateError, match="nothing was timed at this length"):
        xla_benchmark.benchmark(64, seconds=0)


@pytest.mark.slow
def test_kernels_beside_a_library(monkeypatch):
    # Programs that take an accelerator 50 ms would take a CPU seconds.
    monkeypatch.setattr(kernels.Shape, "repeats", lambda shape, passes: 3)
    backends = kernels.Backends("xla", "xla")
    record = kernels.prepare(backends, SHAPE, "lucid_attention", "forward+backward")(0)
    assert record["gate_error"] <= kernels.TOLERANCE
    assert record["over_softmax"] > 0
    assert str(SHAPE) in kernels.table([record], "xla")
    break_solve(monkeypatch, 1.1)
    with pytest.raises(measuring.GateError, match="precondition at 1×200"):
        kernels.prepare(backends, SHAPE, "precondition", "forward")


@pytest.mark.slow
def test_decode_steps(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decode, "SMALL_SIZES", ((2, 64),))
    decode.main(["--small", "--seconds=0", f"--out={tmp_path}"])
    assert "| 2 × 64 | xla |" in capsys.readouterr().out
    [record] = results(tmp_path, "benchmark.json")["records"]
    lucid, softmax = (record["steps"]["xla"][kind] for kind in ("lucid", "softmax"))
    # LUCID reads one more float32 number for each key.
    assert lucid["bytes_read"] - softmax["bytes_read"] == 2 * 64 * 2 * 2 * 4
    never_time(monkeypatch)
    monkeypatch.setattr(decode, "TOLERANCE", 1e-6)
    with pytest.raises(measuring.GateError, match="a softmax step of xla: o has relative error"):
        decode.main(["--small", f"--out={tmp_path}"])


@pytest.mark.slow
def test_training_steps():
    record = model_step.measure(model_step.Run("lucid_1b:smoke", 64, 2, "dots", 1))
    softmax = {
        **record,
        "config": "softmax_1b",
        "tokens_per_second": 2 * record["tokens_per_second"],
    }
    assert "| 2 × 64 | dots | `lucid_1b:smoke` |" in model_step.table([softmax, record])
    assert model_step.table([softmax, record]).endswith("| 100.0% |")


@pytest.mark.slow
def test_a_sequence_on_two_devices(monkeypatch, capsys):
    shape = kernels.Shape(1, 128, 4, 1, 16)
    monkeypatch.setattr(two_gpus, "PROGRAMS", two_gpus.PROGRAMS[:1])
    records = two_gpus.benchmark(shape, 64, (16,), seconds=0)
    assert capsys.readouterr().out.count("error") == 2
    assert [x["rules"] for x in records] == [False, True]
    assert two_gpus.table(records).count("`precondition` | forward | 16 |") == 1
    exact = two_gpus.exact
    monkeypatch.setattr(two_gpus, "exact", lambda *a: {k: 1.1 * x for k, x in exact(*a).items()})
    never_time(monkeypatch)
    with pytest.raises(measuring.GateError, match="stripes of 16, without rules"):
        two_gpus.benchmark(shape, 64, (16,), seconds=0)


def test_two_gpus_are_timed_without_the_rules_too():
    measured = "NVIDIA H200", jnp.bfloat16, 8192, 1, 2**17, 64
    with two_gpus.rules(False):
        assert pallas_triton.column_parts(2, 8192) == 1
        assert pallas_triton.inverse_rows(*measured) is None
    with two_gpus.rules(True):
        assert pallas_triton.column_parts(2, 8192) == 16
        assert pallas_triton.inverse_rows(*measured)


@pytest.mark.slow
def test_the_simulation(tmp_path, capsys):
    simulate.main(["--platforms=v5p", "--lengths=32768", "--devices=1,2,8", f"--out={tmp_path}"])
    assert capsys.readouterr().out.count("| v5p | 128K, 16 |") == 4
    result = results(tmp_path, "simulation.json", "efficiency.png")
    assert result["prediction"].endswith("nothing here was measured")
    striped = next(x for x in result["grid"] if x["layout"] == "striped")
    one, two, eight = striped["efficiency"]
    assert one == pytest.approx(1)
    assert eight < two < 1


@pytest.mark.slow
def test_learnability(tmp_path, capsys, monkeypatch):
    names = [str(learnability.VARIANTS[i]) for i in (0, -1)]
    only = [f"--only={name}" for name in names]
    steps = ["--seeds=2", "--first=300", "--second=100", "--every=100"]
    learnability.main([*steps, *only, f"--out={tmp_path}"])
    assert f"| {names[1]} | – |" in capsys.readouterr().out
    lucid, alone = results(tmp_path, "learnability.json", "learnability.png")["runs"]
    # Both phases learn: the first from a mean square of 28, the second from what it left.
    assert [len(x) for x in lucid["loss"]] == [4, 4]
    assert all(x[2] < 8 and x[3] < x[2] for x in lucid["loss"])
    assert [len(x) for x in alone["loss"]] == [1, 1]
    break_solve(monkeypatch, 1 + 1e-6)
    with pytest.raises(measuring.GateError, match="LUCID: the layer by token differs"):
        learnability.main([f"--out={tmp_path}"])


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Work directories of a random softmax model and a random LUCID model."""
    directories = {}
    for attention in ("softmax", "lucid"):
        directories[attention] = tmp_path_factory.mktemp("runs") / attention
        model = {
            "vocab_size": 258, "num_layers": 2, "embed_dim": 32, "mlp_dim": 32, "num_heads": 4,
            "num_kv_heads": 2, "head_dim": 8, "init_std": 0.5, "attention": attention,
        }  # fmt: skip
        toy.save_random(directories[attention], Config.from_dict({"model": model}))
    return directories


@pytest.mark.slow
def test_conditioning(tmp_path, workdirs, capsys):
    conditioning.main(["--lengths=256", "--seeds=2", f"--out={tmp_path}"])
    text = tmp_path / "text.txt"
    text.write_text("lower triangle keys " * 10)
    source = [f"--checkpoint={workdirs['lucid']}", f"--text={text}"]
    conditioning.main(["--lengths=100", *source, f"--out={tmp_path}"])
    assert "| lucid, layer 2 | 100 |" in capsys.readouterr().out
    for name, sets in (("random", 4), ("trained", 2)):
        records = results(tmp_path, f"{name}.json", f"{name}.png")["records"]
        assert len(records) == sets
        for x in records:
            assert len(x["norm"]) == 2
            assert max(x["inverse_norm"]) <= 2
            assert max(x["float32_error"]) < 1e-5 < max(x["bfloat16_error"]) < 0.1
    with pytest.raises(ValueError, match="has 202 tokens, fewer than 300"):
        conditioning.main(["--lengths=300", *source, f"--out={tmp_path}"])
    definitions.main(["--lengths=32,64,128", "--seeds=1", f"--out={tmp_path}"])
    assert capsys.readouterr().out.count("| whole kernel matrix |") == 4
    records = results(tmp_path, "definitions.json", "definitions.png")["records"]
    assert len(records) == 4 * len(definitions.DEFINITIONS)


@pytest.mark.slow
def test_attention_noise(tmp_path, workdirs, capsys):
    flags = ["--length=72", "--digits=2", "--alphabet=3", "--needles=6", "--queries=4", "--rows=2"]
    models = [f"--{kind}={directory}" for kind, directory in workdirs.items()]
    attention_noise.main([*models, *flags, f"--out={tmp_path}"])
    assert capsys.readouterr().out.count("| lucid |") == 2
    softmax, lucid = results(tmp_path, "attention_noise.json", "attention_noise.png")["records"]
    assert softmax["heads"]["effective_value"] == pytest.approx(softmax["heads"]["value"], abs=1e-4)
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
def test_candidates_are_few_and_of_every_kind(shape):
    sizes = shape.batch, shape.length, shape.kv_heads, shape.head_dim
    used = Schedule.choose("NVIDIA H200", jnp.dtype(jnp.bfloat16), *sizes)
    records = [c.record() for c in tune.candidates(shape, used)]
    assert 20 <= len(records) <= 32
    assert len({str(x) for x in records}) == len(records)
    for kernel in tune.KERNELS:
        mine = [x for x in records if x["kernel"] == kernel]
        assert mine[0] == tune.Candidate(kernel, used).record()
        halves = (False, True) if kernel in tune.HALVES else (False,)
        kinds = {(rows, fused) for rows in tune.ROWS for fused in halves}
        # 128 rows of two sums of 128 numbers, and two blocks prepared, would spill.
        spill = {(128, True)} if shape == tune.Shape(1, 8192, 1, 1, 128) else set()
        assert kinds - {(x["tiles"]["rows"], x["fused"]) for x in mine} <= spill


def test_a_sweep_replaces_the_records_of_its_shapes(tmp_path, capsys, monkeypatch):
    def prepare_all(shapes):
        return {s: dict.fromkeys(tune.candidates(s, tune.schedule_in_use(s)), int) for s in shapes}

    monkeypatch.setattr(tune, "prepare_all", prepare_all)
    monkeypatch.setattr(pallas_triton, "INTERPRET", True)

    def sweep(index) -> dict[str, list[dict]]:
        tune.main([f"--shape={index}", "--rounds=1", f"--out={tmp_path}"])
        result = results(tmp_path, "tuning.json")
        shapes = {x["shape"] for x in result["records"]}
        assert {x["shape"] for x in result["environments"]} == shapes
        return {s: [x for x in result["records"] if x["shape"] == s] for s in shapes}

    first, second = map(str, tune.SHAPES[:2])
    alone = sweep(0)
    assert [x["kernel"] for x in alone[first] if x["in_use"]] == list(tune.KERNELS)
    added = sweep(1)
    assert added == {first: alone[first], second: added[second]}
    assert f"| {second} | all | 64 rows" in capsys.readouterr().out
    again = sweep(0)
    assert again[second] == added[second]
    assert again[first] != alone[first]


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
