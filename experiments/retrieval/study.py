"""Softmax against LUCID on generated retrieval: the same rows, steps, parameters and rates.

  python -m experiments.retrieval.study --part=0/2 --seconds=480 --out=DIR
  python -m experiments.retrieval.study --report --out=DIR

Every variant is trained at each learning rate with each seed on each setting, then evaluated by
needles and length, beyond what it was trained on too. `--part=i/n` takes every n-th run, for
one GPU of several. The models that `SAVED` names leave work directories in DIR/models, for
`run.py --mode=eval`. Writes study_<part>.json after every run; the report merges the parts
into study.json, prints tables and draws.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.retrieval import report
from experiments.retrieval.runs import (
    Run,
    Stage,
    accuracy,
    evaluation_rows,
    execute,
    needle_counts,
    save_model,
    shape_of,
    write,
)
from experiments.retrieval.task import Retrieval

RESULTS = pathlib.Path(__file__).parent / "results"
RATES = (3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2)
# Attention and temperature; the hybrid has LUCID in every fourth layer.
VARIANTS = {
    "softmax": ("softmax", 1.0),
    "lucid": ("lucid", 1.0),
    "softmax, temperature 0.5": ("softmax", 0.5),
    "hybrid": ("softmax,softmax,softmax,lucid", 1.0),
}
_EVAL_LENGTHS = (512, 1024, 2048, 4096, 8192)
_EVAL_NEEDLES = 64
_EVAL_TOKENS = 2**17


# Placeholder
SAVED = {("2of10", 1e-3, 0)}


def runs() -> list[Run]:
    """All of them, those that matter most first."""
    stage = Stage(Retrieval(256, 2, 10, 32), 128, 2000)
    return [
        Run("2of10", attention, (stage,), learning_rate=rate, temperature=temperature, seed=seed)
        for seed in SEEDS
        for rate in RATES
        for attention, temperature in VARIANTS.values()
    ]


def evaluation_task(trained: Retrieval, length: int) -> Retrieval:
    """The same keys in longer rows, with more needles where there is room."""
    free = dataclasses.replace(trained, length=length, needles=1)
    return dataclasses.replace(free, needles=min(_EVAL_NEEDLES, free.most_needles))


@functools.cache
def _evaluator(shape: Run, length: int) -> tuple[list[int], Callable[[Any], jax.Array]]:
    """Needles, and accuracies by them in rows of a length, a function of the parameters."""
    task = evaluation_task(shape.stages[-1].task, length)
    config = shape.config(Stage(task, 1, shape.steps))
    rows = evaluation_rows(task, max(8, _EVAL_TOKENS // length))

    @jax.jit
    def evaluate(params, rows):
        return jax.lax.map(lambda one: accuracy(config, task, params, *one), rows)

    return needle_counts(task), lambda params: evaluate(params, rows)


def evaluate(run: Run, params: Any) -> dict[str, dict[str, float]]:
    """Accuracy by length and needles."""
    trained = run.stages[-1].task
    found = {}
    for length in sorted({trained.length, *_EVAL_LENGTHS}):
        counts, evaluator = _evaluator(shape_of(run), length)
        found[str(length)] = dict(zip(map(str, counts), map(float, evaluator(params))))
    return found


def _part(index: int, parts: int, seconds: float, out: pathlib.Path) -> None:
    start = time.monotonic()
    records = []
    for run, state, record in execute(runs()[index::parts], seconds):
        record["evaluation"] = evaluate(run, state.params)
        records.append(record)
        write(out / f"study_{index}.json", records)
        if (run.name, run.learning_rate, run.seed) in SAVED:
            save_model(out / "models" / run.attention, run, state)
        print(f"[{time.monotonic() - start:5.0f} s] {report.line(record)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--part")
    what.add_argument("--report", action="store_true")
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.report:
        print(report.merge(options.out))
    else:
        index, parts = map(int, options.part.split("/"))
        _part(index, parts, options.seconds, options.out)


if __name__ == "__main__":
    main()
