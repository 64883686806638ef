"""Sweeps the tile sizes of the blockwise XLA ops on this device.

  python -m experiments.xla_precondition.tune

Each setting is checked, gradients included, before it is timed (forward+backward).
Takes about 10 minutes on 2 CPU cores; writes tuning.json.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from unittest import mock

from experiments import measuring
from experiments.xla_precondition import measure
from lucid_jax.ops.attention import xla as attention_xla
from lucid_jax.ops.blocks import round_up
from lucid_jax.ops.precondition.xla import Tiles

# Rows of a block and columns of a panel.
SETTINGS = [
    (rows, columns)
    for rows, columns in itertools.product((64, 128, 256), (128, 256, 512, 1024, 2048))
    if columns >= rows
]
# Multiples of every panel that is not longer than they are.
LENGTHS = (1024, 4096, 16384)
RESULTS = pathlib.Path(__file__).parent / "results"


@contextlib.contextmanager
def precondition_tiles(rows: int, columns: int):
    """`precondition` traced inside uses these tiles."""

    def choose(length: int) -> Tiles:
        r = min(rows, max(16, 1 << (length - 1).bit_length()))
        return Tiles(r, min(columns, round_up(length, r)))

    with mock.patch.object(Tiles, "choose", choose):
        yield


@contextlib.contextmanager
def attention_tiles(rows: int, columns: int):
    """`softmax_attention` traced inside uses these tiles."""
    with mock.patch.multiple(attention_xla, _ROWS=rows, panel_width=lambda: columns):
        yield


OPS = ((measure.PRECONDITION, precondition_tiles), (measure.SOFTMAX, attention_tiles))


def sweep(contestant, tiles, length: int, seconds: float) -> list[dict]:
    """Checks, then times every setting at one length."""
    arrays = measure.draw(length)
    gate = measure.Gate(contestant, arrays)
    runs, errors = {}, {}
    for setting in SETTINGS:
        if setting[1] > length:
            continue  # Cut down to the length, it is a setting already there.
        with tiles(*setting):
            programs = measure.Programs.compile(contestant, arrays)
        errors[setting] = gate.check(f"{contestant.name}, tiles {setting}", programs)
        runs[setting] = lambda programs=programs: programs.run("forward+backward")
    times = measuring.interleaved(runs, seconds)
    return [
        {
            "op": contestant.name,
            "length": length,
            "rows": rows,
            "columns": columns,
            "relative_error": errors[rows, columns],
            **measuring.summary(times[rows, columns]),
        }
        for rows, columns in runs
    ]


def slowdowns(records: Sequence[Mapping]) -> dict[tuple[int, int], dict[int, float]]:
    """Time over the best at that length, by setting and length, of one op.

    Times are minima: what else runs on the machine only ever adds to them. A panel
    cut down to a short length stands for every longer panel there.
    """
    times = {(x["rows"], x["columns"], x["length"]): x["min_s"] for x in records}
    present = sorted({x["length"] for x in records})
    best = {s: min(t for (*_, length), t in times.items() if length == s) for s in present}
    return {(r, c): {s: times[r, min(c, s), s] / best[s] for s in present} for r, c in SETTINGS}


def report(records: Sequence[Mapping]) -> tuple[str, dict[str, dict]]:
    """A table of slowdowns, and the best single setting of each op."""
    lines, chosen = [], {}
    for name in dict.fromkeys(x["op"] for x in records):
        table = slowdowns([x for x in records if x["op"] == name])
        means = {setting: statistics.geometric_mean(x.values()) for setting, x in table.items()}
        best = min(means, key=means.__getitem__)
        chosen[name] = {"rows": best[0], "columns": best[1], "mean_slowdown": means[best]}
        lines.append(f"{name}: time over the best at each length, forward+backward")
        for (rows, columns), row in table.items():
            cells = "  ".join(f"S={s}: {x:.2f}" for s, x in row.items())
            mark = "  <- chosen" if (rows, columns) == best else ""
            mean = means[rows, columns]
            lines.append(f"  {rows:4d} x {columns:4d}   {cells}   mean: {mean:.3f}{mark}")
    return "\n".join(lines), chosen


def main() -> None:
    """Sweeps both ops, prints the tables and writes the evidence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=measure.lengths, default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=20, help="of timing, an op and length")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    flags = parser.parse_args()
    environment = measuring.environment()
    records = []
    for length in flags.lengths:
        for contestant, tiles in OPS:
            records += sweep(contestant, tiles, length, flags.seconds)
    text, chosen = report(records)
    print(text)
    flags.out.mkdir(parents=True, exist_ok=True)
    result = {
        "command": "python -m experiments.xla_precondition.tune --lengths="
        + ",".join(map(str, flags.lengths)),
        "environment": environment,
        "shape": {"batch": 1, "heads": measure.HEADS, "head_dim": measure.HEAD_DIM},
        "pass": "forward+backward",
        "chosen": chosen,
        "records": records,
    }
    (flags.out / "tuning.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
