"""Which matrix has a condition number of 1e7 at 65,536 rows? Candidates, dense in float64.

  python -m experiments.conditioning.definitions

The paper says that κ grows to about 1e7 there, not of which matrix. Each candidate is measured
where a dense matrix is sane, and a power law through the longer half of the lengths is drawn out
to 65,536: an extrapolation, no measurement. Writes definitions.json and definitions.png.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments import measuring
from experiments.conditioning import keys
from experiments.conditioning.run import COLORS, RESULTS, dense, lengths

LENGTHS = (256, 512, 1024, 2048)
FAR = 65_536


def _kernel(k: np.ndarray) -> np.ndarray:
    root = math.sqrt(k.shape[-1])
    return np.exp(k @ k.T / root - root)


def _normal(k: np.ndarray) -> np.ndarray:
    return k * math.sqrt(k.shape[-1]) / np.linalg.norm(k, axis=-1, keepdims=True)


# What κ is of, from keys [S,D]. To subtract √D scales a whole matrix and leaves its κ alone,
# but not where the diagonal is set to 1.
DEFINITIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "A": dense,
    "whole kernel matrix": lambda k: _kernel(_normal(k)),
    "A, raw keys": lambda k: np.tril(_kernel(k), -1) + np.eye(len(k)),
    "lower triangle, raw keys": lambda k: np.tril(_kernel(k)),
    "whole kernel matrix, raw keys": _kernel,
}


def condition(matrix: np.ndarray) -> float:
    """κ, by singular values; at most 1e16, which means singular to float64."""
    singular = np.linalg.svd(matrix, compute_uv=False)
    return float(f"{singular[0] / max(singular[-1], 1e-16 * singular[0]):.5g}")


def conditions(k: np.ndarray) -> dict[str, list[float]]:
    """κ of every definition for every head of keys `[1,S,K,D]`, in float64."""
    heads = np.moveaxis(k[0], 1, 0)
    return {name: [condition(f(head)) for head in heads] for name, f in DEFINITIONS.items()}


def extrapolate(x: Sequence[int], y: Sequence[float]) -> tuple[float, float]:
    """The exponent of a power law through the longer half of the lengths, and its value at FAR."""
    half = len(x) // 2
    slope, offset = np.polyfit(np.log(x[half:]), np.log(y[half:]), 1)
    return float(slope), float(np.exp(offset + slope * np.log(FAR)))


def summarise(records: Sequence[dict]) -> list[dict]:
    """For each set of keys and definition: medians over heads, the exponent, the value at FAR."""
    rows = []
    for keys_name in dict.fromkeys(x["keys"] for x in records):
        mine = [x for x in records if x["keys"] == keys_name]
        x = [record["length"] for record in mine]
        for name in DEFINITIONS:
            y = [float(np.median(record["condition"][name])) for record in mine]
            slope, far = extrapolate(x, y)
            rows.append(
                {"keys": keys_name, "definition": name, "lengths": x, "medians": y,
                 "exponent": float(f"{slope:.3g}"), "extrapolated": float(f"{far:.3g}")}
            )  # fmt: skip
    return rows


def table(rows: Sequence[Mapping]) -> str:
    """Markdown."""
    x = rows[0]["lengths"]
    lines = [
        "| keys | κ of | " + " | ".join(f"S = {n}" for n in x) + f" | exponent | at {FAR}? |",
        "|---|---|" + "---|" * (len(x) + 2),
    ]
    for row in rows:
        cells = [f"{y:.2g}" for y in row["medians"]]
        cells += [f"{row['exponent']:.2f}", f"{row['extrapolated']:.0e}"]
        lines.append(f"| {row['keys']} | {row['definition']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[Mapping], path: pathlib.Path) -> None:
    """A panel for each definition: medians, and the power laws."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    panels = figure.subplots(1, len(DEFINITIONS), sharey=True)
    for panel, name in zip(panels, DEFINITIONS):
        panel.set_prop_cycle(color=COLORS)
        for row in (x for x in rows if x["definition"] == name):
            x, y = row["lengths"], row["medians"]
            (line,) = panel.loglog(x, y, "o-", ms=4, base=2, label=row["keys"])
            panel.plot([x[-1], FAR], [y[-1], row["extrapolated"]], ":", color=line.get_color())
        panel.axhline(1e7, color="gray", ls="--", lw=1)
        panel.set_yscale("log", base=10)
        panel.set_ylim(1, 1e12)
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("S")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("κ, dotted: extrapolated")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every definition, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=lengths, default=LENGTHS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--checkpoint", type=pathlib.Path, action="append", default=[])
    parser.add_argument("--text", type=pathlib.Path, help="what a checkpoint's keys are made of")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    flags = parser.parse_args(argv)
    if bool(flags.checkpoint) != bool(flags.text):
        parser.error("--checkpoint and --text go together")
    if len(flags.lengths) < 3:
        parser.error(f"--lengths needs at least 3 for a power law; got {len(flags.lengths)}")
    environment = measuring.environment()
    sets = {length: keys.random_sets(length, flags.seeds) for length in flags.lengths}
    if flags.checkpoint:
        trained = keys.trained_sets(flags.checkpoint, flags.text, flags.lengths)
        sets = {length: sets[length] | trained[length] for length in flags.lengths}
    records = []
    for length, named in sets.items():
        for name, k in named.items():
            records.append({"keys": name, "length": length, "condition": conditions(k)})
        print(f"S = {length} done", flush=True)
    rows = summarise(records)
    print(f"\n{table(rows)}")
    flags.out.mkdir(parents=True, exist_ok=True)
    sources = [f"--checkpoint={x}" for x in flags.checkpoint]
    sources += [f"--text={flags.text}"] if flags.text else []
    result = {
        "command": " ".join(
            [
                "python -m experiments.conditioning.definitions --lengths="
                + ",".join(map(str, flags.lengths)),
                f"--seeds={flags.seeds}",
                *sources,
            ]
        ),
        "environment": environment,
        "extrapolated_to": FAR,
        "summary": rows,
        "records": records,
    }
    (flags.out / "definitions.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, flags.out / "definitions.png")


if __name__ == "__main__":
    main()
