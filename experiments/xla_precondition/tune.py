"""Sweeps the tile sizes of the blockwise XLA ops on this device.

  python -m experiments.xla_precondition.tune

Each setting is checked, gradients included, before both passes are timed. Takes about 10 minutes
on 2 CPU cores; writes tuning.json.
"""

import functools
import itertools
import statistics
from collections.abc import Mapping, Sequence
from unittest import mock

from experiments import measuring, reporting
from experiments.kernels import Shape
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


def precondition_tiles(rows: int, columns: int):
    """Makes `precondition` use these tiles where it is traced in this context."""

    def choose(length: int) -> Tiles:
        r = min(rows, max(16, 1 << (length - 1).bit_length()))
        return Tiles(r, min(columns, round_up(length, r)))

    return mock.patch.object(Tiles, "for_sequence", choose)


def attention_tiles(rows: int, columns: int):
    """Makes `softmax_attention` use these tiles where it is traced in this context."""
    return mock.patch.multiple(attention_xla, _ROWS=rows, panel_width=lambda: columns)


OPS = ((benchmark.PRECONDITION, precondition_tiles), (benchmark.SOFTMAX, attention_tiles))


def sweep(contestant: benchmark.Contestant, tiles, length: int, seconds: float) -> list[dict]:
    """Checks, then times every setting at one length; returns the records."""
    arrays = Shape(1, length, benchmark.HEADS, benchmark.HEADS, benchmark.HEAD_DIM).draw()
    exact = benchmark.exact_results(contestant, arrays)
    runs, errors = {}, {}
    # Cut to the length, a longer panel would repeat a shorter one.
    for setting in (x for x in SETTINGS if x[1] <= length):
        with tiles(*setting):
            programs = benchmark.compile_passes(contestant, arrays)
        errors[setting] = benchmark.check(contestant, programs, exact)
        runs[setting] = functools.partial(benchmark.run, programs["forward+backward"])
    times = measuring.interleaved(runs, seconds)
    return [
        {
            "op": contestant.name,
            "length": length,
            "rows": setting[0],
            "columns": setting[1],
            "relative_error": errors[setting],
            # What else runs on the machine only ever adds to a time.
            "min_s": min(times[setting]),
        }
        for setting in runs
    ]


def table(records: Sequence[Mapping]) -> str:
    """Returns Markdown tables of both ops: time over the best at each length."""
    tables = []
    for op in dict.fromkeys(x["op"] for x in records):
        times = {
            (x["rows"], x["columns"], x["length"]): x["min_s"] for x in records if x["op"] == op
        }
        lengths = sorted({length for *_, length in times})
        best = {s: min(t for (*_, length), t in times.items() if length == s) for s in lengths}
        rows = []
        for r, c in SETTINGS:
            # A panel cut to a short length stands for every longer panel at that length.
            slowdowns = [times[r, min(c, s), s] / best[s] for s in lengths]
            slowdowns.append(statistics.geometric_mean(slowdowns))
            rows.append((f"{r} × {c}", *(f"{x:.2f}" for x in slowdowns)))
        tables.append(reporting.markdown((op, *(f"S = {s}" for s in lengths), "mean"), rows))
    return "\n\n".join(tables)


def main(argv: Sequence[str] | None = None) -> None:
    """Sweeps both ops, prints the tables and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    parser.add_argument("--lengths", type=reporting.integers, default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=20, help="of timing, an op and length")
    flags = parser.parse_args(argv)
    header = measuring.provenance(flags)
    records = []
    for length, (contestant, tiles) in itertools.product(flags.lengths, OPS):
        records += sweep(contestant, tiles, length, flags.seconds)
    print(table(records))
    shape = {"batch": 1, "heads": benchmark.HEADS, "head_dim": benchmark.HEAD_DIM}
    header |= {"shape": shape, "pass": "forward+backward"}
    reporting.write_json(flags.out / "tuning.json", **header, records=records)


if __name__ == "__main__":
    main()
