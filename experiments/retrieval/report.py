"""Tables and pictures of the retrieval study."""

import itertools
import json
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch, Rectangle

from experiments import reporting
from lucid_jax.config import ConfigError

_SHARES = (0.5, 0.9, 0.99)
# How the names of variants end.
_POSITIONS = {"rope": "", "none": ", NoPE", "path": ", PaTH"}
# Panels in a row of the picture of curves.
_COLUMNS = 3
# The styles of cells without an accuracy.
_EMPTY: dict[str, dict[str, Any]] = {
    "so many do not fit": {"facecolor": "lightgrey", "edgecolor": "grey", "hatch": "///"},
    "not evaluated": {"facecolor": "white", "edgecolor": "lightgrey"},
}


def variant(record: dict) -> str:
    """Returns attention, temperature and positions in words."""
    attention = record["attention"] if "," not in record["attention"] else "hybrid"
    temperature = record["temperature"]
    return (
        attention
        + ("" if temperature == 1 else f", temperature {temperature}")
        + _POSITIONS[record["positions"]]
    )


def first_at(record: dict, share: float, name: str) -> float | None:
    """Returns `step` or `seconds` of the first point of the curve with an accuracy, if any."""
    curve = record["curve"]
    return next((x for x, a in zip(curve[name], curve["accuracy"]) if a >= share), None)


def best_rates(records: Sequence[dict]) -> list[list[dict]]:
    """Returns the seeds of each setting and variant at its best learning rate.

    The best rate has the highest mean accuracy at the end, then the fewest steps to 99%.
    """

    def merit(group):
        steps = [first_at(r, 0.99, "step") or float("inf") for r in group]
        accuracy = statistics.mean(r["curve"]["accuracy"][-1] for r in group)
        return round(accuracy, 2), -statistics.mean(steps)

    best = []
    for case in _grouped(records, lambda r: (r["setting"], variant(r))):
        best.append(max(_grouped(case, lambda r: r["learning_rate"]), key=merit))
    return best


def _grouped(items: Iterable, key: Callable) -> list[list]:
    return [list(group) for _, group in itertools.groupby(sorted(items, key=key), key)]


def _spread(values: Sequence[float | None], form: str = ".0f", none: str = "never") -> str:
    """Returns median and range, and how many values there are if some are missing."""
    there = sorted(v for v in values if v is not None)
    if not there:
        return none
    low, median, high = (f"{x:{form}}" for x in (there[0], statistics.median(there), there[-1]))
    text = median if low == high else f"{median} ({low}–{high})"
    return text + ("" if len(there) == len(values) else f", {len(there)} of {len(values)}")


def table(records: Sequence[dict]) -> str:
    """Returns a Markdown table of each setting and variant at its best rate."""
    rows = []
    for group in best_rates(records):
        record = group[0]
        stopped = "" if record["finished"] else f", stopped at step {record['curve']['step'][-1]}"
        reached = [_spread([first_at(r, share, "step") for r in group]) for share in _SHARES]
        seconds = _spread([first_at(r, _SHARES[-1], "seconds") for r in group], ".1f")
        accuracy = _spread([r["curve"]["accuracy"][-1] for r in group], ".3f")
        rows.append(
            (
                f"`{record['setting']}`", variant(record) + stopped,
                f"{record['learning_rate']:g}", len(group), *reached, seconds, accuracy,
            )
        )  # fmt: skip
    header = (
        "setting", "variant", "rate", "seeds", "steps to 50%", "90%", "99%", "s to 99%",
        "accuracy at the end",
    )  # fmt: skip
    return reporting.markdown(header, rows)


def by_length(records: Sequence[dict]) -> str:
    """Returns Markdown tables of accuracy by length in the cases of the curves."""
    tables = []
    # Settings differ in their lengths.
    for groups in by_setting(evaluated(records)):
        setting, lengths = groups[0][0]["setting"], lengths_of(groups)
        rows = []
        for group in groups:
            found = ([accuracy_at(r, n) for r in group] for n in lengths)
            spreads = (_spread(x, ".3f", "–") for x in found)
            rows.append((f"`{setting}`", variant(group[0]), *spreads))
        tables.append(reporting.markdown(("setting", "variant", *map(str, lengths)), rows))
    return "\n\n".join(tables)


def accuracy_at(record: dict, length: int) -> float | None:
    """Returns the mean accuracy in the cases of the curve at a length, if they were evaluated."""
    found = [record["evaluation"].get(str(length), {}).get(str(case)) for case in record["cases"]]
    return None if None in found else statistics.mean(found)


def load(out: pathlib.Path) -> list[dict]:
    """Merges the parts in `out` into study.json, and returns its records."""
    parts = sorted(out.glob("study_*.json")) or sorted(out.glob("study.json"))
    if not parts:
        raise ConfigError(f"{out} has no study_*.json to report")
    loaded = [json.loads(path.read_text()) for path in parts]
    records = [r for part in loaded for r in part["records"] if r["curve"]["step"]]
    environment = loaded[0]["environment"]
    reporting.write_json(out / "study.json", environment=environment, records=records)
    return records


def merge(out: pathlib.Path) -> str:
    """Merges the parts in `out` into study.json; returns tables and draws pictures."""
    records = load(out)
    _plot_curves(records, out / "accuracy.png")
    if not evaluated(records):
        return table(records)
    _plot_grid(records, out / "needles_and_length.png")
    return f"{table(records)}\n\n{by_length(records)}"


def lengths_of(groups: Sequence[list[dict]]) -> list[int]:
    """Returns the lengths at which groups were evaluated."""
    return sorted({int(length) for g in groups for length in g[0]["evaluation"]})


def evaluated(records: Sequence[dict]) -> list[list[dict]]:
    """Returns the best rates of the runs that were not stopped before their evaluation."""
    return best_rates([r for r in records if "evaluation" in r])


def by_setting(groups: Sequence[list[dict]]) -> list[list[list[dict]]]:
    """Returns the groups of each setting."""
    return _grouped(groups, lambda group: group[0]["setting"])


def _plot_curves(records: Sequence[dict], path: pathlib.Path) -> None:
    """Plots accuracy with the most needles against steps, with a line for each seed."""
    settings = by_setting(best_rates(records))
    columns = min(len(settings), _COLUMNS)
    rows = -(-len(settings) // columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(settings) :]:
        axes.remove()
    for axes, groups in zip(grid.flat, settings):
        for color, group in enumerate(groups):
            for i, record in enumerate(group):
                label = f"{variant(record)}, rate {record['learning_rate']:g}"
                points = record["curve"]["step"], record["curve"]["accuracy"]
                axes.plot(*points, color=f"C{color}", alpha=0.8, label=None if i else label)
        axes.set(title=groups[0][0]["setting"], ylim=(0, 1.02))
        axes.set(xlabel="step", ylabel="accuracy, most needles")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def _plot_grid(records: Sequence[dict], path: pathlib.Path) -> None:
    """Plots mean accuracy over seeds by needles and length, with a row of panels a setting."""
    settings = by_setting(evaluated(records))
    columns = max(map(len, settings))
    figure = Figure(figsize=(3.4 * columns, 3.6 * len(settings)), layout="constrained")
    grid = figure.subplots(len(settings), columns, squeeze=False)
    for row, groups in zip(grid, settings):
        for axes in row[len(groups) :]:
            axes.remove()
        for axes, group in zip(row, groups):
            image = _draw_grid(axes, group)
        figure.colorbar(image, ax=list(row[: len(groups)]), label="accuracy")
    legend = [Patch(label=name, **style) for name, style in _EMPTY.items()]
    figure.legend(handles=legend, loc="outside lower right", ncols=2, fontsize="small")
    figure.savefig(path, dpi=110)


def _draw_grid(axes, group: list[dict]) -> AxesImage:
    lengths = lengths_of([group])
    needles = sorted({int(n) for x in group[0]["evaluation"].values() for n in x})
    mean = np.full((len(needles), len(lengths)), np.nan)
    for (y, n), (x, length) in itertools.product(enumerate(needles), enumerate(lengths)):
        found = [r["evaluation"][str(length)].get(str(n)) for r in group]
        if None not in found:
            mean[y, x] = statistics.mean(found)
            color = "white" if mean[y, x] < 0.6 else "black"
            style = {"ha": "center", "va": "center", "fontsize": 7, "color": color}
            axes.text(x, y, f"{mean[y, x]:.2f}", **style)
        else:
            # The most needles of a length are those that fit.
            fits = n <= max(map(int, group[0]["evaluation"][str(length)]))
            empty = _EMPTY["not evaluated" if fits else "so many do not fit"]
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **empty))
    image = axes.imshow(mean, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    axes.set_xticks(range(len(lengths)), lengths, fontsize=7, rotation=45)
    axes.set_yticks(range(len(needles)), needles, fontsize=7)
    axes.set(xlabel="tokens", ylabel="needles")
    axes.set_title(f"{group[0]['setting']}\n{variant(group[0])}", fontsize=8)
    return image
