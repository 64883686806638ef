"""Scores of several requests come together in one table and one picture."""

import json

from lucid_jax.evaluate.heat_map import draw_heat_map
from lucid_jax.evaluate.report import GroupReport, Score
from lucid_jax.evaluate.score_files import write_scores


def _report(task, length, mean=None, left_out=0):
    scores = {} if mean is None else {"recall": Score(mean, 0.0, 1.0)}
    return GroupReport(task, length, "recall", scores, 1, 1, left_out, "it is long", 0, 0)


def test_requests_add_to_the_scores_of_a_model(tmp_path):
    def write(model, step, *reports):
        table = write_scores(tmp_path, "Scores", {"model": model, "step": step}, reports, 4096)
        values = json.loads((tmp_path / "scores.json").read_text())
        assert (tmp_path / "scores.md").read_text() == table
        assert values["model"] == model
        found = {(x["task"], x["length"]): x["scores"]["recall"]["mean"] for x in values["tasks"]}
        assert all(f"{100 * mean:.1f}" in table for mean in found.values())
        return found

    assert write("a", 4, _report("x", 64, 0.5)) == {("x", 64): 0.5}
    both = {("x", 64): 0.5, ("y", 128): 0.25}
    assert write("a", 4, _report("y", 128, 0.25)) == both
    assert write("a", 4, _report("x", 64, 0.75)) == {**both, ("x", 64): 0.75}
    # Another model begins anew, and the first one's scores are kept and taken up again.
    assert write("b", 8, _report("x", 64, 0.125)) == {("x", 64): 0.125}
    for ending in ("json", "md", "png"):
        assert (tmp_path / f"scores-step-4.{ending}").exists()
    assert write("a", 4, _report("z", 64, 1.0)) == {**both, ("x", 64): 0.75, ("z", 64): 1.0}
    assert "12.5" in (tmp_path / "scores-step-8.md").read_text()


def test_a_heat_map_explains_itself():
    reports = [_report("x", 64, 0.5), _report("x", 128, left_out=1), _report("y", 64, 0.25)]
    chart = draw_heat_map("run at step 4", reports)
    plot, bar = chart.axes
    assert chart.get_suptitle() == "run at step 4"
    assert bar.get_ylabel() == "score, percent"
    assert [text.get_text() for text in plot.texts] == ["50", "25"]
    # x at 128 has no sample that fits; y at 128 was not asked for.
    assert [(cell.get_xy(), cell.get_hatch()) for cell in plot.patches] == [
        ((0.5, -0.5), "///"), ((0.5, 0.5), None),
    ]  # fmt: skip
    (legend,) = chart.legends
    assert [text.get_text() for text in legend.get_texts()] == ["no sample fits", "not run"]
    assert not draw_heat_map("", reports[:1]).legends
