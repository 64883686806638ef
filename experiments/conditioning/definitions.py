"""The condition of `A` beside that of matrices like it, dense in float64.

  python -m experiments.conditioning.definitions

Each matrix is measured where a dense one is cheap. A power law through the longer half of the
lengths is extrapolated to 65,536, which is no measurement. Writes definitions.json and
definitions.png.
"""

import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments import measuring, reporting
from experiments.conditioning import keys
from experiments.conditioning.run import COLORS, dense, kernel, normalised

LENGTHS = (256, 512, 1024, 2048)
FAR = 65_536
# Matrices from keys [S,D]. Subtracting √D scales a whole matrix and leaves its κ unchanged, but
# not where the diagonal is set to 1.
DEFINITIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "A": dense,
    "whole kernel matrix": lambda k: kernel(normalised(k)),
    "A, raw keys": lambda k: np.tril(kernel(k), -1) + np.eye(len(k)),
    "lower triangle, raw keys": lambda k: np.tril(kernel(k)),
    "whole kernel matrix, raw keys": kernel,
}


def condition(matrix: np.ndarray) -> float:
    """Returns κ by singular values; at most 1e16, which means singular to float64."""
    singular = np.linalg.svd(matrix, compute_uv=False)
    return float(singular[0] / max(singular[-1], 1e-16 * singular[0]))


def conditions(k: np.ndarray) -> dict[str, float]:
    """Returns κ of every definition, the median over the heads of keys `[1,S,K,D]`."""
    heads = np.moveaxis(k[0], 1, 0)
    return {
        name: float(np.median([condition(matrix(head)) for head in heads]))
        for name, matrix in DEFINITIONS.items()
    }


def extrapolate(x: Sequence[int], y: Sequence[float]) -> tuple[float, float]:
    """Fits a power law through the longer half; returns its exponent and its value at FAR."""
    half = len(x) // 2
    slope, offset = np.polyfit(np.log(x[half:]), np.log(y[half:]), 1)
    return float(slope), float(np.exp(offset + slope * np.log(FAR)))


def measure(sets: keys.KeySets) -> list[dict]:
    """Returns a record of each set of keys and definition."""
    found = {}
    for length, named in sets.items():
        found[length] = {name: conditions(k) for name, k in named.items()}
        print(f"S = {length} done", flush=True)
    lengths = list(found)
    records = []
    for name, definition in itertools.product(found[lengths[0]], DEFINITIONS):
        medians = [found[length][name][definition] for length in lengths]
        exponent, far = extrapolate(lengths, medians)
        record = {"keys": name, "definition": definition, "lengths": lengths, "medians": medians}
        records.append(record | {"exponent": exponent, "extrapolated": far})
    return records


def table(records: Sequence[Mapping]) -> str:
    """Returns a Markdown table."""
    rows = []
    for x in records:
        cells = [*(f"{y:.2g}" for y in x["medians"]), f"{x['exponent']:.2f}"]
        rows.append((x["keys"], x["definition"], *cells, f"{x['extrapolated']:.0e}"))
    lengths = (f"S = {n}" for n in records[0]["lengths"])
    return reporting.markdown(("keys", "κ of", *lengths, "exponent", f"at {FAR}?"), rows)


def plot(records: Sequence[Mapping], path: pathlib.Path) -> None:
    """Plots medians and power laws, one panel for each definition."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    panels = figure.subplots(1, len(DEFINITIONS), sharey=True)
    for panel, name in zip(panels, DEFINITIONS):
        panel.set_prop_cycle(color=COLORS)
        for record in (x for x in records if x["definition"] == name):
            x, y = record["lengths"], record["medians"]
            (line,) = panel.loglog(x, y, "o-", ms=4, base=2, label=record["keys"])
            panel.plot([x[-1], FAR], [y[-1], record["extrapolated"]], ":", color=line.get_color())
        panel.set_yscale("log", base=10)
        panel.set(xlabel="S", ylim=(1, 1e12))
        panel.set_title(name, fontsize=9)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("κ, dotted: extrapolated")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every definition, prints the table and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    keys.add_flags(parser, LENGTHS)
    flags = parser.parse_args(argv)
    if len(flags.lengths) < 3:
        parser.error(f"--lengths needs at least 3 for a power law; got {len(flags.lengths)}")
    header = measuring.provenance(flags)
    sets = keys.random_sets(flags.lengths, flags.seeds)
    for length, named in (keys.from_flags(parser, flags) or {}).items():
        sets[length] |= named
    records = measure(sets)
    print(f"\n{table(records)}")
    path = flags.out / "definitions.json"
    reporting.write_json(path, **header, extrapolated_to=FAR, records=records)
    plot(records, flags.out / "definitions.png")


if __name__ == "__main__":
    main()
