"""Benchmarks measure what is right, and refuse to time what is wrong."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments import kernels, measuring, tpu_check
from experiments.decode import benchmark as decode_benchmark
from experiments.sequence_scaling import two_gpus
from experiments.tpu_roofline import roofline
from experiments.xla_precondition import benchmark
from lucid_jax.ops.decode.sums import Sums
from lucid_jax.ops.precondition import pallas_triton, xla


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
    with_row = Sums.with_row

    def wrong(self, new, scale):
        o, y = with_row(self, new, scale)
        return o, y * 1.1

    monkeypatch.setattr(Sums, "with_row", wrong)
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
