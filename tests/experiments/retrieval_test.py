"""The study of generated retrieval stops by the clock, goes on, and reports."""

import itertools
import json
import types

import pytest

from experiments.retrieval import runs, study
from experiments.retrieval.runs import Group, Stage
from experiments.retrieval.task import Retrieval

pytestmark = pytest.mark.usefixtures("compilation_cache")


def toy_group(*_):
    """Returns two stages of two steps, two rates, two seeds."""
    few, more = Retrieval(27, 2, 3, 4, 4, repeated=0.5), Retrieval(73, 2, 3, 4, 4)
    stages = Stage(few, 4, 2), Stage(more, 4, 2)
    model = (
        ("num_layers", 1), ("embed_dim", 16), ("mlp_dim", 32), ("num_heads", 2),
        ("num_kv_heads", 1), ("head_dim", 8), ("compute_dtype", "float32"),
    )  # fmt: skip
    return Group("toy", "lucid", stages, (1e-3, 1e-2), (0, 1), model=model, chunk=2)


@pytest.mark.slow
def test_a_study_stops_goes_on_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "make_group", toy_group)
    monkeypatch.setattr(study, "_EVAL_TOKENS", 96)
    monkeypatch.setattr(study, "_EVAL_FACTORS", (1, 2))
    command = ["--setting=4of4", "--variant=lucid", f"--out={tmp_path}"]
    part = tmp_path / "study_4of4-lucid.json"
    with monkeypatch.context() as patch:
        # The time is up after the first chunk.
        clock = itertools.chain([0], itertools.repeat(1e9))
        fake = types.SimpleNamespace(monotonic=lambda: next(clock), perf_counter=lambda: 0.0)
        patch.setattr(runs, "time", fake)
        study.main(command)
    stopped = json.loads(part.read_text())["records"]
    assert [(r["finished"], r["curve"]["step"]) for r in stopped] == [(False, [2])] * 4
    assert "| lucid, stopped at step 2 |" in capsys.readouterr().out

    study.main(command)
    assert not (tmp_path / "unfinished_4of4-lucid").exists()
    assert (tmp_path / "models/4of4-lucid/checkpoints/4").exists()
    for record in json.loads(part.read_text())["records"]:
        assert record["curve"]["step"] == [2, 4]
        assert set(record["evaluation"]["146"]) == {"1", "2", "4", "8", "9"}
    study.main(["--report", f"--out={tmp_path}"])
    part.unlink()
    study.main(["--report", f"--out={tmp_path}"])  # From study.json.
    assert capsys.readouterr().out.count("| `toy` | lucid | 0.0") == 5
    for name in ("accuracy.png", "needles_and_length.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
