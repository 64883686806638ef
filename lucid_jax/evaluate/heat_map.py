"""Draws scores by task and length as a heat map."""

import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import axes, figure, patches

from lucid_jax.evaluate.report import GroupReport

# RULER's sweeps over the number of needles, by the letter in their tasks' names.
_SWEPT = {"k": "keys", "v": "values", "q": "questions"}
# The legend of cells without a score: no sample fits the length, or none was run yet.
_CELLS: dict[str, dict[str, Any]] = {
    "no sample fits": {"facecolor": "lightgrey", "edgecolor": "grey", "hatch": "///"},
    "not run": {"facecolor": "white", "edgecolor": "lightgrey"},
}


def draw_heat_map(title: str, reports: Sequence[GroupReport]) -> figure.Figure:
    """Draws the published scores: a panel of needles by length for each sweep, one for the rest.

    `title` names the model and its checkpoint.
    """
    panels: dict[str, list[GroupReport]] = {}
    for report in reports:
        panels.setdefault(_panel_and_label(report.task)[0], []).append(report)
    # `Figure` itself needs no display and, unlike pyplot, no global state.
    with matplotlib.rc_context({"figure.constrained_layout.use": True}):
        sizes = [len({report.task for report in panel}) for panel in panels.values()]
        width = 5 + 0.9 * len({report.length for report in reports})
        height = 2 + 0.45 * sum(sizes) + 0.8 * len(panels)
        chart = figure.Figure(figsize=(width, height))
        plots = chart.subplots(len(panels), 1, squeeze=False, height_ratios=sizes)[:, 0]
        used: set[str] = set()
        for plot, (name, panel) in zip(plots, panels.items()):
            used |= _draw_panel(plot, name, panel)
        chart.suptitle(title)
        bar = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 100), "viridis")
        chart.colorbar(bar, ax=list(plots), label="score, percent")
        if used:
            legend = [patches.Patch(label=name, **_CELLS[name]) for name in _CELLS if name in used]
            chart.legend(handles=legend, loc="outside lower center", ncols=len(legend))
    return chart


def _panel_and_label(task: str) -> tuple[str, str]:
    """Returns the title of a task's panel and the task's label on the vertical axis."""
    if match := re.fullmatch(r"ruler_niah_([kvq])(\d+)(\[.*\])?", task):
        return f"ruler_niah{match[3] or ''}: {_SWEPT[match[1]]}", match[2]
    return "", task


def _draw_panel(plot: axes.Axes, title: str, panel: Sequence[GroupReport]) -> set[str]:
    """Draws a panel; returns the keys of `_CELLS` that it has."""
    labels = list(dict.fromkeys(_panel_and_label(report.task)[1] for report in panel))
    lengths = sorted({report.length for report in panel})
    cells = {(_panel_and_label(x.task)[1], x.length): x for x in panel}
    grid = np.full((len(labels), len(lengths)), np.nan)
    used = set()
    for (y, label), (x, length) in (
        (row, column) for row in enumerate(labels) for column in enumerate(lengths)
    ):
        report = cells.get((label, length))
        if report and report.score:
            grid[y, x] = 100 * report.score.mean
            color = "black" if report.score.mean > 0.5 else "white"
            plot.text(x, y, f"{grid[y, x]:.0f}", ha="center", va="center", color=color)
        else:
            kind = "no sample fits" if report and report.left_out else "not run"
            plot.add_patch(patches.Rectangle((x - 0.5, y - 0.5), 1, 1, **_CELLS[kind]))
            used.add(kind)
    plot.imshow(grid, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    plot.set_xticks(range(len(lengths)), map(str, lengths))
    plot.set_yticks(range(len(labels)), labels)
    plot.set_xlabel("tokens")
    plot.set_title(title)
    return used
