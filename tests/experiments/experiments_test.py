"""Benchmarks measure what is right, and refuse to time what is wrong."""

import ast
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from experiments import kernels, measuring, tpu_check
from experiments.decode import benchmark as decode_benchmark
from experiments.sequence_scaling import two_gpus
from experiments.tpu_roofline import roofline
from experiments.triton_precondition import tune
from experiments.xla_precondition import benchmark
from lucid_jax.ops.decode.partial_softmax import PartialSoftmax
from lucid_jax.ops.precondition import triton as pallas_triton
from lucid_jax.ops.precondition import xla
from lucid_jax.ops.precondition.triton_schedule import Schedule

pytestmark = pytest.mark.usefixtures("compilation_cache")


def test_benchmark_writes_a_table_its_data_and_a_picture(tmp_path, capsys):
    benchmark.main(["--lengths=64,128", "--seconds=0", f"--out={tmp_path}"])
    assert capsys.readouterr().out.count("| 128 |") == 2
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert {x["op"] for x in result["records"]} == {c.name for c in benchmark.CONTESTANTS}
    assert all(x["median_s"] > 0 and x["temp_bytes"] > 0 for x in result["records"])
    assert result["environment"]["versions"]["jax"]
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_op_is_not_timed(monkeypatch):
    solve = xla._solve
    monkeypatch.setattr(xla, "_solve", lambda *a: solve(*a) * (1 + 1e-4))
    monkeypatch.setattr(measuring, "interleaved", lambda *a, **k: pytest.fail("timed"))
    with pytest.raises(measuring.GateError, match="nothing was timed at this length"):
        benchmark.benchmark(64, seconds=0)


SHAPE = kernels.Shape(1, 200, 4, 2, 16)


@pytest.mark.parametrize(
    ("name", "passes"), [("precondition", "forward"), ("lucid_attention", "forward+backward")]
)
def test_kernels_are_timed_beside_the_library(name, passes, monkeypatch):
    # As many as an accelerator takes 50 ms for take a CPU seconds.
    monkeypatch.setattr(kernels.Shape, "repeats", lambda shape, passes: 3)
    backends = kernels.Backends("xla", "xla")
    record = kernels.prepare(backends, SHAPE, name, passes)(0)
    assert record["gate_error"] <= kernels.TOLERANCE
    assert record["over_softmax"] > 0
    assert str(SHAPE) in kernels.table([record], "xla")


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    solve = xla._solve
    monkeypatch.setattr(xla, "_solve", lambda *a: solve(*a) * 1.1)
    with pytest.raises(measuring.GateError, match="precondition at 1×200"):
        kernels.prepare(kernels.Backends("xla", "xla"), SHAPE, "precondition", "forward")


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="the error names a missing TPU")
def test_the_tpu_check_needs_a_tpu(capsys):
    with pytest.raises(SystemExit):
        tpu_check.main([])
    assert "it needs a TPU; the default backend is cpu" in capsys.readouterr().err


def test_the_roofline_names_what_binds(tmp_path, capsys):
    roofline.main([f"--out={tmp_path}"])
    assert capsys.readouterr().out.count("| v5p |") == len(roofline.SHAPES)
    result = json.loads((tmp_path / "roofline.json").read_text())
    assert result["prediction"].endswith("nothing here was measured")
    for record in result["records"]:
        forward = record["forward"]
        terms = forward["ms"]
        assert forward["bound"] == max(terms, key=terms.get)
        assert forward["total_ms"] >= max(terms.values())
    # The tiles that the kernels take are the best of those listed.
    for name, times in result["ms_by_tile"].items():
        assert times["1024×512"] == min(times.values()), name


def test_decode_steps_are_timed_side_by_side(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decode_benchmark, "SMALL_SIZES", ((2, 64),))
    decode_benchmark.main(["--small", "--seconds=0", f"--out={tmp_path}"])
    assert "| 2 × 64 | xla |" in capsys.readouterr().out
    result = json.loads((tmp_path / "benchmark.json").read_text())
    [record] = result["records"]
    steps = record["steps"]["xla"]
    lucid, softmax = steps["lucid"], steps["softmax"]
    # Beside the same parameters and rows, a float32 number for each key.
    assert lucid["bytes_read"] - softmax["bytes_read"] == 2 * 64 * 2 * 2 * 4
    ratio = lucid["step_ms"] / softmax["step_ms"]
    assert steps["overhead_percent"] == pytest.approx(100 * (ratio - 1))
    assert lucid["gb_per_second"] > 0


def test_a_wrong_decode_step_is_not_timed(tmp_path, monkeypatch):
    with_row = PartialSoftmax.with_row

    def wrong(self, new, scale):
        o, y = with_row(self, new, scale)
        return o, y * 1.1

    monkeypatch.setattr(PartialSoftmax, "with_row", wrong)
    monkeypatch.setattr(measuring, "interleaved", lambda *a, **k: pytest.fail("timed"))
    with pytest.raises(measuring.GateError, match="a lucid step of xla: y has relative error"):
        decode_benchmark.main(["--small", f"--out={tmp_path}"])


def test_rows_on_two_devices_are_judged_and_timed(monkeypatch, capsys):
    shape = kernels.Shape(1, 128, 4, 1, 16)
    monkeypatch.setattr(two_gpus, "PROGRAMS", two_gpus.PROGRAMS[:1])
    records = two_gpus.benchmark(shape, 64, (16,), seconds=0)
    assert capsys.readouterr().out.count("error") == 2
    assert [x["rules"] for x in records] == [False, True]
    assert two_gpus.table(records).count("`precondition` | forward | 16 |") == 1

    exact = two_gpus.exact
    monkeypatch.setattr(two_gpus, "exact", lambda *a: {k: 1.1 * x for k, x in exact(*a).items()})
    monkeypatch.setattr(measuring, "interleaved", lambda *a, **k: pytest.fail("timed"))
    with pytest.raises(measuring.GateError, match="stripes of 16, without rules"):
        two_gpus.benchmark(shape, 64, (16,), seconds=0)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the error names missing GPUs")
def test_rows_on_two_gpus_need_two_gpus(capsys):
    with pytest.raises(SystemExit):
        two_gpus.main([])
    assert "needs 2 GPUs; the devices are" in capsys.readouterr().err


def test_two_gpus_are_timed_without_the_rules_too():
    with two_gpus.rules(False):
        assert pallas_triton.column_parts(2, 8192) == 1
        assert (
            pallas_triton.rows_of_inverses("NVIDIA H200", jnp.bfloat16, 8192, 1, 2**17, 64) is None
        )
    with two_gpus.rules(True):
        assert pallas_triton.column_parts(2, 8192) == 16


def test_every_command_that_is_documented_runs():
    root = pathlib.Path(measuring.__file__).parents[1]
    commands = 0
    for path in root.glob("experiments/**/*.py"):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        tree = ast.parse(path.read_text())
        if f"python -m {module}" in (ast.get_docstring(tree) or ""):
            commands += 1
            assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    main()", module
    assert commands > 10


def test_no_program_always_comes_after_the_same_one():
    calls = []
    runs = {name: functools.partial(calls.append, name) for name in "abc"}
    times = measuring.interleaved(runs, 0, fewest=8, most=8)
    assert {name: len(x) for name, x in times.items()} == dict.fromkeys("abc", 8)
    rounds = [tuple(calls[i : i + 3]) for i in range(3, len(calls), 3)]
    assert all(set(x) == set("abc") for x in rounds)
    assert len(set(rounds)) > 2


@pytest.mark.parametrize("shape", tune.SHAPES, ids=str)
def test_candidates_are_few_and_of_every_kind(shape):
    sizes = shape.batch, shape.length, shape.kv_heads, shape.head_dim
    used = Schedule.choose("NVIDIA H200", jnp.dtype(jnp.bfloat16), *sizes)
    found = tune.candidates(shape, used)
    records = [c.record() for c in found]
    assert 20 <= len(found) <= 32
    assert len({str(x) for x in records}) == len(records)
    for kernel in tune.KERNELS:
        of = [x for x in records if x["kernel"] == kernel]
        assert of[0] == tune.Candidate(kernel, used).record()
        halves = (False, True) if kernel in tune.HALVES else (False,)
        kinds = {(rows, fused) for rows in tune.ROWS for fused in halves}
        # 128 rows of two sums of 128 numbers, and two blocks prepared, would spill.
        spill = {(128, True)} if shape == tune.Shape(1, 8192, 1, 1, 128) else set()
        assert kinds - {(x["tiles"]["rows"], x["fused"]) for x in of} <= spill


def test_tiles_that_spill_are_no_candidates():
    wide = tune.Tiles(128, 128, warps=4, stages=3, lookahead=0)
    assert tune.registers("solve", wide, False, 128) > tune.MOST_REGISTERS
    assert tune.registers("gradient", wide, False, 64) <= tune.MOST_REGISTERS


def test_a_sweep_replaces_the_records_of_its_shapes(tmp_path, capsys, monkeypatch):
    def prepare_all(shapes):
        return {s: dict.fromkeys(tune.candidates(s, tune.in_use(s)), int) for s in shapes}

    monkeypatch.setattr(tune, "prepare_all", prepare_all)
    monkeypatch.setattr(pallas_triton, "INTERPRET", True)

    def sweep(*flags) -> dict[str, list[dict]]:
        tune.main([*flags, "--rounds=1", f"--out={tmp_path}"])
        result = json.loads((tmp_path / "tuning.json").read_text())
        shapes = {x["shape"] for x in result["records"]}
        assert set(result["environments"]) == shapes
        return {s: [x for x in result["records"] if x["shape"] == s] for s in shapes}

    first, second = map(str, tune.SHAPES[:2])
    alone = sweep("--shape=0")
    assert set(alone) == {first}
    in_use = [x["kernel"] for x in alone[first] if x["in_use"]]
    assert in_use == list(tune.KERNELS)
    added = sweep("--shape=1")
    assert added == {first: alone[first], second: added[second]}
    assert capsys.readouterr().out.count(f"| {second} | all | 64 rows") == 2
    again = sweep("--shape=0")
    assert again == {first: again[first], second: added[second]}
    assert len(again[first]) == len(alone[first])
    assert again[first] != alone[first]


def test_a_killed_sweep_leaves_what_it_has_measured(tmp_path, monkeypatch):
    def fail():
        raise KeyboardInterrupt

    def prepare_all(shapes):
        runs = zip(shapes, (int, fail))
        return {s: dict.fromkeys(tune.candidates(s, tune.in_use(s)), run) for s, run in runs}

    monkeypatch.setattr(tune, "prepare_all", prepare_all)
    monkeypatch.setattr(pallas_triton, "INTERPRET", True)
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--shape=0", "--shape=1", f"--out={tmp_path}"])
    records = json.loads((tmp_path / "tuning.json").read_text())["records"]
    assert {x["shape"] for x in records} == {str(tune.SHAPES[0])}


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
            assert "median_ms" not in record
        else:
            assert record["median_ms"] > 0
            assert record["over_in_use"] > 0


def test_the_table_has_the_fastest_and_sums_of_schedules():
    def record(kernel, rows, ms, in_use=False, fused=False):
        tiles = {
            "rows": rows,
            "columns": 64,
            "warps": 4,
            "stages": 3,
            "lookahead": 1,
            "head_group": 0,
        }
        return {
            "shape": "S", "kernel": kernel, "tiles": tiles, "fused": fused, "in_use": in_use,
            "median_ms": ms, "over_in_use": ms / 2,
        }  # fmt: skip

    records = [record(kernel, 64, 2.0, in_use=True) for kernel in tune.KERNELS]
    records += [record("solve", 128, 1.0), record("gradient", 128, 1.5)]
    records += [record("transposed", 64, 3.0, fused=True), record("gradient", 64, 0.5, fused=True)]
    records.append({**record("solve", 64, 0.0), "error": "spilled"})
    del records[-1]["median_ms"]
    lines = tune.table(records).splitlines()[2:]
    assert [line.split(" | ")[1:2] + line.split(" | ")[-2:] for line in lines] == [
        ["solve", "1.000", "0.500 |"],
        ["transposed", "2.000", "1.000 |"],
        ["gradient", "1.500", "0.750 |"],
        # 2 + 2 + 2 + 1.5 and 2 + 2 + 3 + 0.5 of 8; with 128 rows parts are missing.
        ["all", "7.500", "0.938 |"],
        ["all", "7.500", "0.938 |"],
    ]
