"""Tables and pictures of the retrieval study."""

from __future__ import annotations

import itertools
import json
import pathlib
import statistics
from collections.abc import Sequence

from experiments.retrieval.runs import first_at
from lucid_jax.config import ConfigError

_SHARES = (0.5, 0.9, 0.99)
# Of curves beside each other.
_COLUMNS = 3


def needles_trained(record: dict) -> int:
    """The most needles of the last stage."""
    return record["run"]["stages"][-1]["task"]["needles"]


def variant(record: dict) -> str:
    """Attention and temperature in words."""
    run = record["run"]
    attention = run["attention"] if "," not in run["attention"] else "hybrid"
    return attention + ("" if run["temperature"] == 1 else f", temperature {run['temperature']}")


def steps_to(record: dict, share: float) -> int | None:
    """Steps to an accuracy with the most needles."""
    point = first_at(record, share, needles_trained(record))
    return point["step"] if point else None


def final_accuracy(record: dict) -> float:
    """At the end of training, with the most needles."""
    return record["curve"][-1]["accuracy"][str(needles_trained(record))]


def line(record: dict) -> str:
    """A run in one line for the terminal."""
    run, last = record["run"], record["curve"][-1]
    end = "" if record["finished"] else ", stopped by the clock"
    reached = {share: steps_to(record, share) for share in _SHARES}
    accuracies = " ".join(f"{n}:{x:.3f}" for n, x in last["accuracy"].items())
    return (
        f"{run['name']:20} {variant(record):24} lr {run['learning_rate']:.0e} seed {run['seed']}"
        f" step {last['step']}, {last['seconds']:.0f} s, loss"
        f" {last['loss']:.3f}, accuracy {accuracies}, steps to {reached}{end}"
    )


def best_rates(records: Sequence[dict]) -> list[list[dict]]:
    """The seeds of each setting and variant at its best learning rate.

    The best has the highest mean accuracy at the end, then the fewest steps to 99%.
    """
    key = lambda r: (r["run"]["name"], variant(r), r["run"]["learning_rate"])  # noqa: E731
    groups = [list(g) for _, g in itertools.groupby(sorted(records, key=key), key)]

    def merit(group):
        steps = [steps_to(r, 0.99) or float("inf") for r in group]
        return round(statistics.mean(map(final_accuracy, group)), 2), -statistics.mean(steps)

    best: dict[tuple, list[dict]] = {}
    for group in groups:
        where = key(group[0])[:2]
        if where not in best or merit(group) > merit(best[where]):
            best[where] = group
    return list(best.values())


def _spread(values: Sequence[float | None], form: str = "{:.0f}") -> str:
    """Median and range; how many there are where some are missing."""
    there = sorted(v for v in values if v is not None)
    if not there:
        return "never"
    text = form.format(statistics.median(there))
    if len(there) > 1:
        text += f" ({form.format(there[0])}–{form.format(there[-1])})"
    return text + ("" if len(there) == len(values) else f", {len(there)} of {len(values)} seeds")


def table(records: Sequence[dict]) -> str:
    """Markdown: each setting and variant at its best rate, median and range over seeds."""
    rows = [
        "| setting | variant | rate | seeds | steps to 50% | 90% | 99% | s to 99% | accuracy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for group in best_rates(records):
        run, most = group[0]["run"], needles_trained(group[0])
        reached = [_spread([steps_to(r, share) for r in group]) for share in _SHARES]
        points = [first_at(r, _SHARES[-1], most) for r in group]
        seconds = _spread([p["seconds"] if p else None for p in points], "{:.1f}")
        last = group[0]["curve"][-1]["step"]
        stopped = "" if group[0]["finished"] else f", stopped at step {last}"
        rows.append(
            f"| {run['name']} | {variant(group[0])}{stopped} | {run['learning_rate']:g}"
            f" | {len(group)}"
            f" | {' | '.join(reached)} | {seconds}"
            f" | {_spread(list(map(final_accuracy, group)), '{:.3f}')} |"
        )
    return "\n".join(rows)


def by_length(records: Sequence[dict]) -> str:
    """Markdown: accuracy by length with the most needles of the training, at the best rates."""
    tables = []
    # Settings differ in their lengths.
    for _, groups in _settings(_evaluated(records)):
        lengths = _lengths(groups)
        rows = [
            f"| setting | variant | needles | {' | '.join(map(str, lengths))} |",
            "|---" * (len(lengths) + 3) + "|",
        ]
        for group in groups:
            run, needles = group[0]["run"], needles_trained(group[0])
            cells = [_spread([_asked(r, n, needles) for r in group], "{:.3f}") for n in lengths]
            rows.append(
                f"| {run['name']} | {variant(group[0])} | {needles} | {' | '.join(cells)} |"
            )
        tables.append("\n".join(rows))
    return "\n\n".join(tables)


def _lengths(groups: Sequence[list[dict]]) -> list[int]:
    return sorted({int(length) for g in groups for length in g[0]["evaluation"]})


def _asked(record: dict, length: int, needles: int) -> float | None:
    """Accuracy of the evaluation, where there is one with so many needles."""
    return record["evaluation"].get(str(length), {}).get(str(needles))


def merge(out: pathlib.Path) -> str:
    """One file of the parts in `out`; the tables, and pictures beside it."""
    parts = sorted(out.glob("study_*.json"))
    if not parts:
        raise ConfigError(f"{out} has no study_*.json to report")
    loaded = [json.loads(path.read_text()) for path in parts]
    records = [r for part in loaded for r in part["records"] if r["curve"]]
    merged = {"environment": loaded[0]["environment"], "records": records}
    (out / "study.json").write_text(json.dumps(merged))
    _plot_curves(records, out / "accuracy.png")
    if not _evaluated(records):
        return table(records)
    _plot_grid(records, out / "needles_and_length.png")
    return f"{table(records)}\n\n{by_length(records)}"


def _evaluated(records: Sequence[dict]) -> list[list[dict]]:
    """The best rates of those whose time was not up before their evaluation."""
    return best_rates([r for r in records if "evaluation" in r])


def _settings(groups: Sequence[list[dict]]) -> list[tuple[str, list[list[dict]]]]:
    by_name = itertools.groupby(groups, lambda g: g[0]["run"]["name"])
    return [(name, list(g)) for name, g in by_name]


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _plot_curves(records: Sequence[dict], path: pathlib.Path) -> None:
    """Accuracy with the most needles by steps: a line a seed."""
    plt = _pyplot()
    settings = _settings(best_rates(records))
    columns = min(len(settings), _COLUMNS)
    rows = -(-len(settings) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(5 * columns, 4 * rows), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(settings) :]:
        axes.remove()
    for axes, (name, groups) in zip(grid.flat, settings):
        for color, group in enumerate(groups):
            for i, record in enumerate(group):
                most = str(needles_trained(record))
                points = [(c["step"], c["accuracy"].get(most)) for c in record["curve"]]
                label = f"{variant(record)}, rate {record['run']['learning_rate']:g}"
                axes.plot(*zip(*points), color=f"C{color}", alpha=0.8, label=None if i else label)
        axes.set(title=name, xlabel="step", ylabel="accuracy, most needles", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _plot_grid(records: Sequence[dict], path: pathlib.Path) -> None:
    """Mean accuracy over seeds, by needles and length: a row of pictures a setting."""
    plt = _pyplot()
    settings = _settings(_evaluated(records))
    columns = max(len(groups) for _, groups in settings)
    figure, grid = plt.subplots(
        len(settings),
        columns,
        figsize=(3.4 * columns, 3.6 * len(settings)),
        layout="constrained",
        squeeze=False,
    )
    for row, (_, groups) in zip(grid, settings):
        for axes in row[len(groups) :]:
            axes.remove()
        for axes, group in zip(row, groups):
            _draw_grid(axes, group)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_grid(axes, group: list[dict]) -> None:
    lengths = _lengths([group])
    needles = sorted({int(n) for x in group[0]["evaluation"].values() for n in x})
    mean = [
        [
            statistics.mean(r["evaluation"][str(length)].get(str(n), float("nan")) for r in group)
            for length in lengths
        ]
        for n in needles
    ]
    axes.imshow(mean, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    for y, row in enumerate(mean):
        for x, value in enumerate(row):
            if value == value:
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7,
                          color="white" if value < 0.6 else "black")  # fmt: skip
    axes.set_xticks(range(len(lengths)), lengths, fontsize=7, rotation=45)
    axes.set_yticks(range(len(needles)), needles, fontsize=7)
    axes.set(xlabel="tokens", ylabel="needles")
    axes.set_title(f"{group[0]['run']['name']}\n{variant(group[0])}", fontsize=8)
