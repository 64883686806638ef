"""Draws scores by task and length as a heat map."""

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
    """Draws the published scores: a panel of needles by length for each sweep, one for the rest."""
    panels: dict[str, list[GroupReport]] = {}
    for report in reports:
        panels.setdefault(_panel_and_label(report.task)[0], []).append(report)
    # `Figure` itself needs no display and, unlike pyplot, no global state.
    with matplotlib.rc_context({"figure.constrained_layout.use": True}):
        sizes = [len({report.task for report in panel}) for panel in panels.values()]
        width = 4 + 0.9 * len({report.length for report in reports})
        chart = figure.Figure(figsize=(width, 1 + 0.45 * sum(sizes) + 0.8 * len(panels)))
        plots = chart.subplots(len(panels), 1, squeeze=False, height_ratios=sizes)[:, 0]
        for plot, (title, panel) in zip(plots, panels.items()):
            _draw_panel(plot, title, panel)
        chart.savefig(path, dpi=120)


def _panel_and_label(task: str) -> tuple[str, str]:
    """Returns the title of a task's panel and the task's label on the vertical axis."""
    if match := re.fullmatch(r"ruler_niah_([kvq])(\d+)(\[.*\])?", task):
        return f"ruler_niah{match[3] or ''}: {_SWEPT[match[1]]}", match[2]
    return "", task


def _draw_panel(plot: axes.Axes, title: str, panel: Sequence[GroupReport]) -> None:
    labels = list(dict.fromkeys(_panel_and_label(report.task)[1] for report in panel))
    lengths = sorted({report.length for report in panel})
    grid = np.full((len(labels), len(lengths)), np.nan)
    for report in panel:
        if report.score:
            y, x = labels.index(_panel_and_label(report.task)[1]), lengths.index(report.length)
            grid[y, x] = report.score.mean
            plot.text(
                x, y, f"{100 * report.score.mean:.0f}", ha="center", va="center",
                color="black" if report.score.mean > 0.5 else "white",
            )  # fmt: skip
    plot.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    plot.set_xticks(range(len(lengths)), map(str, lengths))
    plot.set_yticks(range(len(labels)), labels)
    plot.set_xlabel("tokens")
    plot.set_title(title)
