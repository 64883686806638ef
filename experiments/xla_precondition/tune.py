"""Sweeps the tile sizes of the blockwise XLA ops on this device.

  python -m experiments.xla_precondition.tune

Each setting is checked, gradients included, before both passes are timed. Takes about 10 minutes
on 2 CPU cores; writes tuning.json.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Mapping, Sequence
from unittest import mock

from experiments import measuring, reporting
from experiments.xla_precondition import benchmark
from lucid_jax.ops.attention import xla as attention_xla
from lucid_jax.ops.numerics import round_up
from lucid_jax.ops.precondition.xla import Tiles

# Rows of a block and columns of a panel.
SETTINGS = [
    (rows, columns)
    for rows, columns in itertools.product((64, 128, 256), (128, 256, 512, 1024, 2048))
    if columns >= rows
]
# Every panel that is not longer than a length divides it.
LENGTHS = (1024, 4096, 16384)


@contextlib.contextmanager
def precondition_tiles(rows: int, columns: int):
    """Makes `precondition` use these tiles where it is traced in this context."""

    def choose(length: int) -> Tiles:
        r = min(rows, max(16, 1 << (length - 1).bit_length()))
        return Tiles(r, min(columns, round_up(length, r)))

    with mock.patch.object(Tiles, "for_sequence", choose):
        yield


@contextlib.contextmanager
def attention_tiles(rows: int, columns: int):
    """Makes `softmax_attention` use these tiles where it is traced in this context."""
    with mock.patch.multiple(attention_xla, _ROWS=rows, panel_width=lambda: columns):
        yield


OPS = ((benchmark.PRECONDITION, precondition_tiles), (benchmark.SOFTMAX, attention_tiles))


def sweep(contestant, tiles, length: int, seconds: float) -> list[dict]:
    """Checks, then times every setting at one length; returns the records."""
    arrays = benchmark.draw(length)
    exact = benchmark.exact_results(contestant, arrays)
    runs, errors = {}, {}
    for setting in SETTINGS:
        if setting[1] > length:
            continue  # Cut to the length, this panel would repeat a shorter one.
        with tiles(*setting):
            programs = benchmark.Programs(contestant, arrays)
        errors[setting] = programs.check(exact)
        runs[setting] = lambda programs=programs: programs.run("forward+backward")
    times = measuring.interleaved(runs, seconds)
    return [
        {
            "op": contestant.name,
            "length": length,
            "rows": rows,
            "columns": columns,
            "relative_error": errors[rows, columns],
            # What else runs on the machine only ever adds to a time.
            "min_s": min(times[rows, columns]),
        }
        for rows, columns in runs
    ]


def table(records: Sequence[Mapping]) -> str:
    """Returns Markdown tables of both ops: time over the best at each length.

    The time of a panel cut to a short length stands for every longer panel at that length.
    """
    tables = []
    for op in dict.fromkeys(x["op"] for x in records):
        times = {
            (x["rows"], x["columns"], x["length"]): x["min_s"] for x in records if x["op"] == op
        }
        lengths = sorted({length for *_, length in times})
        best = {s: min(t for (*_, length), t in times.items() if length == s) for s in lengths}
        rows = []
        for r, c in SETTINGS:
            slowdowns = [times[r, min(c, s), s] / best[s] for s in lengths]
            rows.append((f"{r} × {c}", *slowdowns, statistics.geometric_mean(slowdowns)))
        cells = [(name, *(f"{x:.2f}" for x in row)) for name, *row in rows]
        tables.append(reporting.markdown((op, *(f"S = {s}" for s in lengths), "mean"), cells))
    return "\n\n".join(tables)


def main(argv: Sequence[str] | None = None) -> None:
    """Sweeps both ops, prints the tables and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__)
    parser.add_argument("--lengths", type=reporting.integers, default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=20, help="of timing, an op and length")
    flags = parser.parse_args(argv)
    environment = measuring.environment()
    records = []
    for length in flags.lengths:
        for contestant, tiles in OPS:
            records += sweep(contestant, tiles, length, flags.seconds)
    print(table(records))
    result = {
        "command": reporting.command_line(parser, argv),
        "environment": environment,
        "shape": {"batch": 1, "heads": benchmark.HEADS, "head_dim": benchmark.HEAD_DIM},
        "pass": "forward+backward",
        "records": records,
    }
    reporting.write_json(flags.out / "tuning.json", result)


if __name__ == "__main__":
    main()
