"""Which settings of generated retrieval are learned, and how fast: a broad, cheap search.

  python -m experiments.retrieval.explore --part=0/2 --seconds=270 --out=DIR

Softmax and LUCID one after another on each setting, each run until it is right in 99 of 100
answers or its steps are done. `--part=i/n` takes every n-th run, for one GPU of several.
Writes explore_<part>.json after every run.
"""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Sequence

from experiments.retrieval import report
from experiments.retrieval.runs import Run, Stage, execute, write
from experiments.retrieval.task import Retrieval

RESULTS = pathlib.Path(__file__).parent / "results"
_STEPS = 2000
# digits, alphabet and length: one digit and dense keys is associative recall; the fewer values
# a digit has, the more of it keys share.
_KEYS = {
    "2of10": (2, 10, 256),
    "1of36": (1, 36, 256),
    "4of4": (4, 4, 512),
    "3of5": (3, 5, 512),
    "6of2": (6, 2, 512),
    "4of10": (4, 10, 512),
}


def _stage(keys: str, steps: int = _STEPS, rows: int = 128, needles: int = 32, **task) -> Stage:
    digits, alphabet, length = _KEYS[keys]
    return Stage(Retrieval(length, digits, alphabet, needles, **task), rows, steps)


def runs() -> list[Run]:
    """What is tried, the most telling first; every second one is LUCID's."""
    settings = [
        *((keys, (_stage(keys),), {}) for keys in _KEYS),
        ("2of10 lr3e-3", (_stage("2of10"),), {"learning_rate": 3e-3}),
        ("4of4 lr3e-3", (_stage("4of4"),), {"learning_rate": 3e-3}),
        ("2of10 answers only", (_stage("2of10", other_weight=0.0),), {}),
        ("2of10 every token", (_stage("2of10", other_weight=1.0),), {}),
        ("2of10 init 0.05", (_stage("2of10"),), {"model": (("init_std", 0.05),)}),
        ("2of10 lr3e-4", (_stage("2of10"),), {"learning_rate": 3e-4}),
        ("4of4 8 first", (_stage("4of4", 1000, needles=8), _stage("4of4", 1000)), {}),
        ("2of10 2 layers", (_stage("2of10"),), {"model": (("num_layers", 2),)}),
        ("4of10 lr3e-3", (_stage("4of10"),), {"learning_rate": 3e-3}),
        ("2of10 512 rows", (_stage("2of10", rows=512),), {}),
    ]
    return [
        # A constant rate after the warm-up: a run may end early.
        Run(name, attention, stages, stop_at=0.99, optim=(("final_ratio", 1.0),), **changes)
        for name, stages, changes in settings
        for attention in ("softmax", "lucid")
    ]


def explore(chosen: Sequence[Run], seconds: float, path: pathlib.Path) -> list[dict]:
    """Runs, prints and writes them."""
    start = time.monotonic()
    records = []
    for _, _, record in execute(chosen, seconds):
        records.append(record)
        write(path, records)
        print(f"[{time.monotonic() - start:5.0f} s] {report.line(record)}", flush=True)
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    part, parts = map(int, options.part.split("/"))
    explore(runs()[part::parts], options.seconds, options.out / f"explore_{part}.json")


if __name__ == "__main__":
    main()
