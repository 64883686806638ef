"""Scores by task and length as a picture."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib import axes, figure

from lucid_jax.evaluate.report import GroupReport

# RULER's sweeps over the number of needles, by the letter in their tasks' names.
_SWEPT = {"k": "keys", "v": "values", "q": "questions"}


def draw_heat_map(reports: Sequence[GroupReport], path: pathlib.Path) -> None:
    """Draws the published scores: each sweep as needles by length, other tasks by length."""
    panels: dict[str, list[GroupReport]] = {}
    for report in reports:
        panels.setdefault(_place(report.task)[0], []).append(report)
    # A figure of its own: no global pyplot state, no display needed.
    with matplotlib.rc_context({"figure.constrained_layout.use": True}):
        sizes = [len({report.task for report in panel}) for panel in panels.values()]
        width = 4 + 0.9 * len({report.length for report in reports})
        chart = figure.Figure(figsize=(width, 1 + 0.45 * sum(sizes) + 0.8 * len(panels)))
        parts = chart.subplots(len(panels), 1, squeeze=False, height_ratios=sizes)[:, 0]
        for part, (title, panel) in zip(parts, panels.items()):
            _draw_panel(part, title, panel)
        chart.savefig(path, dpi=120)


def _place(task: str) -> tuple[str, str]:
    """The panel of a task, and the name of its row there."""
    if match := re.fullmatch(r"ruler_niah_([kvq])(\d+)(\[.*\])?", task):
        return f"ruler_niah{match[3] or ''}: {_SWEPT[match[1]]}", match[2]
    return "", task


def _draw_panel(part: axes.Axes, title: str, panel: Sequence[GroupReport]) -> None:
    rows = list(dict.fromkeys(_place(report.task)[1] for report in panel))
    lengths = sorted({report.length for report in panel})
    grid = np.full((len(rows), len(lengths)), np.nan)
    for report in panel:
        if report.score:
            place = rows.index(_place(report.task)[1]), lengths.index(report.length)
            grid[place] = report.score.mean
            part.text(
                place[1], place[0], f"{100 * report.score.mean:.0f}", ha="center", va="center",
                color="black" if report.score.mean > 0.5 else "white",
            )  # fmt: skip
    part.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    part.set_xticks(range(len(lengths)), map(str, lengths))
    part.set_yticks(range(len(rows)), rows)
    part.set_xlabel("tokens")
    part.set_title(title)
