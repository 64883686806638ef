"""Tables and the picture of the study of extrapolation."""

import pathlib
import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments import reporting
from experiments.extrapolation.stories import most_frequent_answer
from experiments.retrieval.report import (
    accuracy_at,
    by_length,
    by_setting,
    evaluated,
    lengths_of,
    load,
    table,
    variant,
)


def merge(out: pathlib.Path) -> str:
    """Merges the parts in `out` into study.json; returns tables and draws accuracy.png."""
    records = load(out)
    tables = [table(records)]
    if evaluated(records):
        _plot(records, out / "accuracy.png")
        tables += [by_length(records), *_by_task(records)]
    return "\n\n".join(tables)


def _by_task(records: Sequence[dict]) -> list[str]:
    """Returns a Markdown table of the mean accuracy in each task of BABILong, if there is one."""
    groups = [group for group in evaluated(records) if group[0]["setting"] == "babilong"]
    if not groups:
        return []
    tasks = groups[0][0]["cases"]
    rows = [
        (variant(group[0]), length, *(_mean(group, length, task) for task in tasks))
        for group in groups
        for length in lengths_of([group])
    ]
    guesses = (f"{most_frequent_answer(task):.3f}" for task in tasks)
    rows.append(("most frequent answer", "any", *guesses))
    return [reporting.markdown(("variant", "tokens", *(f"qa{task}" for task in tasks)), rows)]


def _mean(group: Sequence[dict], length: int, task: int) -> str:
    found = [record["evaluation"].get(str(length), {}).get(str(task)) for record in group]
    return "–" if None in found else f"{statistics.mean(found):.3f}"


def _plot(records: Sequence[dict], path: pathlib.Path) -> None:
    """Plots accuracy against length: a panel for each setting, a line for each variant.

    Lines are means over seeds, and bands go from the lowest to the highest.
    """
    settings = by_setting(evaluated(records))
    figure = Figure(figsize=(5 * len(settings), 4), layout="constrained")
    for axes, groups in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings):
        for group in groups:
            x, spread = [], []
            for length in lengths_of([group]):
                found = [accuracy_at(record, length) for record in group]
                if there := [value for value in found if value is not None]:
                    x.append(length)
                    spread.append((min(there), statistics.mean(there), max(there)))
            low, mean, high = zip(*spread)
            axes.plot(x, mean, marker="o", label=variant(group[0]))
            axes.fill_between(x, low, high, alpha=0.15)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths_of(groups), lengths_of(groups))
        axes.set(title=groups[0][0]["setting"], ylim=(0, 1.02), xlabel="tokens", ylabel="accuracy")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
