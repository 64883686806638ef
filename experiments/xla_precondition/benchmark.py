"""Time and memory of the blockwise XLA op against length, beside its peers.

  python -m experiments.xla_precondition.benchmark

Side by side in one process: `precondition` blockwise, the dense solve, and blockwise
softmax attention on the same heads. Every program is checked before any is timed.
Takes about 6 minutes on 2 CPU cores; writes benchmark.json and benchmark.png.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments import measuring
from experiments.xla_precondition import measure

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
RESULTS = pathlib.Path(__file__).parent / "results"
CONTESTANTS = (measure.PRECONDITION, measure.DENSE, measure.SOFTMAX)
PASSES = ("forward", "forward+backward")


def benchmark(length: int, seconds: float) -> list[dict]:
    """Checks, then times every contestant at one length; one record for each pass."""
    arrays = measure.draw(length)
    present = [c for c in CONTESTANTS if c.longest is None or length <= c.longest]
    gates = {op: measure.Gate(c, arrays) for op, c in {c.op: c for c in present}.items()}
    programs, errors = {}, {}
    for contestant in present:
        compiled = measure.Programs.compile(contestant, arrays)
        errors[contestant.name] = gates[contestant.op].check(contestant.name, compiled)
        programs[contestant.name] = compiled
    records = []
    for name in PASSES:
        runs = {c: lambda p=p, name=name: p.run(name) for c, p in programs.items()}
        times = measuring.interleaved(runs, seconds)
        records += [
            {
                "op": op,
                "length": length,
                "pass": name,
                "relative_error": errors[op],
                "temp_bytes": programs[op].temp_bytes(name),
                **measuring.summary(times[op]),
            }
            for op in programs
        ]
    return records


def table(records: Sequence[dict]) -> str:
    """Markdown: medians, ratios within the run, and memory."""
    by_key = {(x["op"], x["length"], x["pass"]): x for x in records}
    rows = [
        "| S | pass | blockwise | dense | softmax | blockwise / softmax | dense / blockwise"
        " | temporaries: blockwise | dense | softmax |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for length in dict.fromkeys(x["length"] for x in records):
        for name in PASSES:
            found = [by_key.get((c.name, length, name)) for c in CONTESTANTS]
            ms = [1e3 * x["median_s"] if x else math.nan for x in found]
            mib = [x["temp_bytes"] / 2**20 if x else math.nan for x in found]
            ratios = ms[0] / ms[2], ms[1] / ms[0]
            cells = [f"{x:,.1f} ms" for x in ms]
            cells += [f"{x:.2f}" for x in ratios]
            cells += [f"{x:,.1f} MiB" for x in mib]
            cells = ["–" if cell.startswith("nan") else cell for cell in cells]
            rows.append(f"| {length} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def plot(records: Sequence[dict], path: pathlib.Path) -> None:
    """Time and temporaries of forward+backward against S."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, field, label in zip(
        panels, ("median_s", "temp_bytes"), ("seconds (median)", "bytes of temporaries")
    ):
        for contestant in CONTESTANTS:
            points = [
                (x["length"], x[field])
                for x in records
                if x["op"] == contestant.name and x["pass"] == PASSES[1]
            ]
            axes.loglog(*zip(*points), marker="o", ms=4, base=2, label=contestant.name)
        axes.set_xlabel("S")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log", base=10)
    panels[0].legend(frameon=False)
    panels[0].set_title("forward and backward")
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Benchmarks every length, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=measure.lengths, default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=15, help="of timing, a pass and length")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    flags = parser.parse_args(argv)
    environment = measuring.environment()
    records = [x for length in flags.lengths for x in benchmark(length, flags.seconds)]
    print(table(records))
    flags.out.mkdir(parents=True, exist_ok=True)
    result = {
        "command": "python -m experiments.xla_precondition.benchmark --lengths="
        + ",".join(map(str, flags.lengths)),
        "environment": environment,
        "shape": {"batch": 1, "heads": measure.HEADS, "head_dim": measure.HEAD_DIM},
        "dtype": "float32",
        "records": records,
    }
    (flags.out / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(records, flags.out / "benchmark.png")


if __name__ == "__main__":
    main()
