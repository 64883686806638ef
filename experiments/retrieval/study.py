"""Softmax against LUCID on generated retrieval: the same rows, steps, parameters and rates.

  python -m experiments.retrieval.study --part=0/1 --seconds=480 --out=DIR
  python -m experiments.retrieval.study --report --out=DIR

Every form of the task is trained in two stages, few pairs in short rows, then many in longer
ones, each until it is solved or its steps are done; then models are evaluated by needles and
length, beyond what they were trained on too. Runs are in order of importance, and the clock
stops them; `--part=i/n` takes every n-th, for one GPU of several. The first seed of every form
and attention leaves a work directory in DIR/models, for `run.py --mode=eval`. Writes
study_<part>.json after every run; the report merges the parts into study.json, prints tables
and draws.
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

from experiments import parameters
from experiments.retrieval import report
from experiments.retrieval.runs import (
    Run,
    Stage,
    accuracy,
    evaluation_rows,
    execute,
    needle_counts,
    shape_of,
    write,
)
from experiments.retrieval.task import Retrieval

RESULTS = pathlib.Path(__file__).parent / "results"
# Digits of a key and values of a digit. Keys of two digits share half of them or nothing.
FORMS = {"1of36": (1, 36), "2of6": (2, 6)}
# Attention and temperature; the hybrid has LUCID in every fourth layer.
PAIR = (("softmax", 1.0), ("lucid", 1.0))
OTHERS = (("softmax", 0.5), ("softmax,softmax,softmax,lucid", 1.0))
RATES = (3e-3, 1e-3)
SEEDS = (0, 1, 2)
_EVAL_LENGTHS = (512, 1024)
_EVAL_NEEDLES = 64
_EVAL_TOKENS = 2**16


def stages(digits: int, alphabet: int) -> tuple[Stage, Stage]:
    """4 pairs in 4 places, then 32 in 64."""

    def stage(needles: int, places: int, steps: int) -> Stage:
        # Questions and pairs are of one width.
        length = (needles + places) * (digits + 1)
        return Stage(Retrieval(length, digits, alphabet, needles, queries=needles), 128, steps)

    return stage(4, 4, 1500), stage(32, 64, 2500)


def runs() -> list[Run]:
    """All of them, those that matter most first."""
    rounds = [
        *((RATES[0], seed, PAIR) for seed in SEEDS),
        (RATES[0], SEEDS[0], OTHERS),
        *((rate, seed, PAIR) for rate in RATES[1:] for seed in SEEDS),
    ]
    return [
        # A constant rate after the warm-up: a stage may end early.
        Run(
            form, attention, stages(*keys), rate, temperature, seed,
            optim=(("final_ratio", 1.0),), stop_at=0.99,
        )
        for rate, seed, variants in rounds
        for form, keys in FORMS.items()
        for attention, temperature in variants
    ]  # fmt: skip


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
    saved: set[tuple[str, str]] = set()
    for run, state, record in execute(runs()[index::parts], seconds):
        if record["finished"]:
            record["evaluation"] = evaluate(run, state.params)
        records.append(record)
        write(out / f"study_{index}.json", records)
        which = run.name, run.attention
        if record["finished"] and which not in saved:
            saved.add(which)
            config = run.config(run.stages[-1])
            directory = out / "models" / "-".join(which)
            parameters.save(directory, config, int(state.step), state.params)
        if record["curve"]:
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
