"""The benchmark measures what is right, and refuses to time what is wrong."""

import json

import pytest

from experiments import measuring
from experiments.xla_precondition import benchmark
from lucid_jax.ops.precondition import xla


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
