"""Time and memory of the blockwise XLA solve against length.

  python -m experiments.xla_precondition.benchmark

One process compares `precondition` blockwise, the dense solve, and blockwise softmax attention on
the same heads. Every program is checked before any is timed. Takes about 6 minutes on 2 CPU cores;
writes benchmark.json and benchmark.png.
"""

from __future__ import annotations

import math
import pathlib
import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments import measuring, reporting
from experiments.xla_precondition import measure

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
CONTESTANTS = (measure.PRECONDITION, measure.DENSE, measure.SOFTMAX)


def benchmark(length: int, seconds: float) -> list[dict]:
    """Checks, then times every contestant at one length; returns a record for each pass."""
    arrays = measure.draw(length)
    present = [c for c in CONTESTANTS if c.longest is None or length <= c.longest]
    exact = {
        c.op: measure.exact_results(c, arrays) for c in (measure.PRECONDITION, measure.SOFTMAX)
    }
    programs, errors = {}, {}
    for contestant in present:
        programs[contestant.name] = measure.Programs(contestant, arrays)
        errors[contestant.name] = programs[contestant.name].check(exact[contestant.op])
    records = []
    for name in measure.PASSES:
        runs = {c: lambda p=p, name=name: p.run(name) for c, p in programs.items()}
        times = measuring.interleaved(runs, seconds)
        records += [
            {
                "op": op,
                "length": length,
                "pass": name,
                "relative_error": errors[op],
                "temp_bytes": programs[op].temp_bytes(name),
                "median_s": statistics.median(times[op]),
            }
            for op in programs
        ]
    return records


def table(records: Sequence[dict]) -> str:
    """Returns a Markdown table of medians, ratios within the run, and memory."""
    by_key = {(x["op"], x["length"], x["pass"]): x for x in records}
    header = (
        "S", "pass", "blockwise", "dense", "softmax", "blockwise / softmax", "dense / blockwise",
        "temporaries: blockwise", "dense", "softmax",
    )  # fmt: skip
    rows = []
    for length in dict.fromkeys(x["length"] for x in records):
        for name in measure.PASSES:
            found = [by_key.get((c.name, length, name)) for c in CONTESTANTS]
            ms = [1e3 * x["median_s"] if x else math.nan for x in found]
            mib = [x["temp_bytes"] / 2**20 if x else math.nan for x in found]
            cells = [f"{x:,.1f} ms" for x in ms]
            cells += [f"{ms[0] / ms[2]:.2f}", f"{ms[1] / ms[0]:.2f}"]
            cells += [f"{x:,.1f} MiB" for x in mib]
            cells = ["–" if cell.startswith("nan") else cell for cell in cells]
            rows.append((length, name, *cells))
    return reporting.markdown(header, rows)


def plot(records: Sequence[dict], path: pathlib.Path) -> None:
    """Plots time and temporaries of both passes together against S."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = {"median_s": "seconds (median)", "temp_bytes": "bytes of temporaries"}
    for axes, (field, label) in zip(panels, labels.items()):
        for contestant in CONTESTANTS:
            points = [
                (x["length"], x[field])
                for x in records
                if x["op"] == contestant.name and x["pass"] == "forward+backward"
            ]
            axes.loglog(*zip(*points), marker="o", ms=4, base=2, label=contestant.name)
        axes.set(xlabel="S", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log", base=10)
    panels[0].legend(frameon=False)
    panels[0].set_title("forward and backward")
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Benchmarks every length, prints the table and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__)
    parser.add_argument("--lengths", type=reporting.integers, default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=15, help="of timing, a pass and length")
    flags = parser.parse_args(argv)
    environment = measuring.environment()
    records = [x for length in flags.lengths for x in benchmark(length, flags.seconds)]
    print(table(records))
    result = {
        "command": reporting.command_line(parser, argv),
        "environment": environment,
        "shape": {"batch": 1, "heads": measure.HEADS, "head_dim": measure.HEAD_DIM},
        "dtype": "float32",
        "records": records,
    }
    reporting.write_json(flags.out / "benchmark.json", result)
    plot(records, flags.out / "benchmark.png")


if __name__ == "__main__":
    main()
