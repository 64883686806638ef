"""Softmax against LUCID on generated retrieval: the same rows, steps, parameters and rates.

  python -m experiments.retrieval.study --setting=4of4 --variant=lucid --seconds=400 --out=DIR
  python -m experiments.retrieval.study --report --out=DIR

A command trains one variant on one setting with all rates and seeds side by side: first on
sequences that repeat, then on few pairs in short rows, then on more in longer ones. Models are
evaluated by needles and length, beyond what they were trained on too. Writes
study_<setting>-<variant>.json, and a work directory in DIR/models of the first seed at the best
rate, for `run.py --mode=eval`. The report merges what is there into study.json, prints tables and
draws.

A command that is run again goes on from where the clock stopped it, or from the last stage that it
had done when it was killed. Until it has finished its states are in
DIR/unfinished_<setting>-<variant>.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax

from experiments.retrieval import report
from experiments.retrieval.runs import (
    EVAL_SEED,
    Group,
    Stage,
    Training,
    accuracies,
    compiling,
    needle_counts,
    write,
)
from experiments.retrieval.task import Retrieval
from lucid_jax.checkpoint.manager import save_params
from lucid_jax.config import ConfigError

RESULTS = pathlib.Path(__file__).parent / "results"
RATES = (3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2)
# Attention and temperature; the hybrid has LUCID in every fourth layer.
VARIANTS = {
    "softmax": ("softmax", 1.0),
    "lucid": ("lucid", 1.0),
    "sharp": ("softmax", 0.5),
    "hybrid": ("softmax,softmax,softmax,lucid", 1.0),
}
# Lengths, as multiples of that of the training.
_EVAL_FACTORS = (1, 2, 4, 8)
_EVAL_NEEDLES = 256
_EVAL_TOKENS = 2**17


def _curriculum(
    digits: int, alphabet: int, last: Sequence[tuple[int, int, int, int]]
) -> tuple[Stage, ...]:
    """Sequences, then pairs; `last` has length, needles, questions and steps of every stage."""

    def stage(length: int, needles: int, queries: int, steps: int, repeated: float) -> Stage:
        return Stage(Retrieval(length, digits, alphabet, needles, queries, repeated), 64, steps)

    return stage(128, 4, 4, 800, 1.0), *(stage(*x, 0.25) for x in last)


class Setting(NamedTuple):
    """What all variants share; `model` are changes to `MODEL`."""

    stages: tuple[Stage, ...]
    rates: tuple[float, ...] = RATES
    model: tuple[tuple[str, Any], ...] = ()


_2OF6 = _curriculum(2, 6, [(64, 4, 4, 400), (128, 16, 16, 400), (256, 32, 32, 1200)])


def _lengthened(stage: Stage, length: int, steps: int) -> Stage:
    """The same pairs in longer rows, as many tokens a step."""
    task = dataclasses.replace(stage.task, length=length)
    return Stage(task, stage.rows * stage.task.length // length, steps)


# Digits of a key and values of a digit. Of two keys of four digits, most share one or more.
SETTINGS = {
    "2of6": Setting(_2OF6),
    "long": Setting((*_2OF6, *(_lengthened(_2OF6[-1], n, 400) for n in (512, 1024, 2048)))),
    # Associative recall: as many slots as pairs.
    "recall": Setting(
        _curriculum(1, 36, [(16, 4, 4, 400), (64, 16, 16, 400), (128, 32, 32, 1200)])
    ),
    "4of4": Setting(_curriculum(4, 4, [(64, 4, 4, 400), (192, 16, 16, 800), (512, 64, 32, 1600)])),
    # 0.1 million parameters, half an hour on two cores of a CPU.
    "small": Setting(
        _curriculum(1, 36, [(64, 4, 4, 400), (128, 16, 16, 400)]),
        rates=(3e-3,),
        model=(
            ("num_layers", 2), ("embed_dim", 64), ("mlp_dim", 192), ("num_heads", 1),
            ("num_kv_heads", 1), ("init_std", 0.1), ("compute_dtype", "float32"),
        ),
    ),
}  # fmt: skip
# Whether what a variant has not learnt wants more steps.
for _name in ("2of6", "small"):
    SETTINGS[f"{_name}-twice"] = SETTINGS[_name]._replace(
        stages=tuple(
            dataclasses.replace(stage, steps=2 * stage.steps) for stage in SETTINGS[_name].stages
        )
    )


def group(setting: str, variant: str, seeds: tuple[int, ...] = SEEDS) -> Group:
    """All rates and the seeds of a variant."""
    attention, temperature = VARIANTS[variant]
    stages, rates, model = SETTINGS[setting]
    return Group(setting, attention, stages, rates, seeds, temperature, model)


def evaluation_task(trained: Retrieval, length: int) -> Retrieval:
    """The same keys in longer rows, with more needles where there is room."""
    free = dataclasses.replace(trained, length=length, needles=1)
    return dataclasses.replace(free, needles=min(_EVAL_NEEDLES, free.most_needles))


Evaluations = list[tuple[Retrieval, Future[jax.stages.Compiled]]]


def evaluations(group: Group, params: Any) -> Evaluations:
    """What models are asked, and programs that are being compiled, for parameters `[N,…]`."""
    trained = group.stages[-1]
    tasks = [evaluation_task(trained.task, n * trained.task.length) for n in _EVAL_FACTORS]
    programs = []
    for task in tasks:
        config = group.config(dataclasses.replace(trained, task=task))
        rows = max(8, _EVAL_TOKENS // task.length)

        @jax.jit
        def of_all(params, key, task=task, config=config, rows=rows):
            # One after another: rows are many enough.
            return jax.lax.map(lambda one: accuracies(config, task, one, key, rows), params)

        programs.append(of_all.lower(params, jax.random.key(EVAL_SEED + 1)))
    return list(zip(tasks, compiling(programs)))


def evaluate(asked: Evaluations, params: Any) -> list[dict[str, dict[str, float]]]:
    """Accuracy of every model by length and needles."""
    tables = [
        (task, program.result()(params, jax.random.key(EVAL_SEED + 1)).tolist())
        for task, program in asked
    ]
    return [
        {
            str(task.length): dict(zip(map(str, needle_counts(task)), by_needles))
            for (task, _), by_needles in zip(tables, of_model)
        }
        for of_model in zip(*(table for _, table in tables))
    ]


def run(group: Group, name: str, seconds: float, out: pathlib.Path) -> None:
    """Trains, evaluates, saves and writes one group; without evaluation where the time is up."""
    start = time.monotonic()

    def log(text: str) -> None:
        print(f"[{time.monotonic() - start:5.0f} s] {text}", flush=True)

    unfinished = out / f"unfinished_{name}"
    training = Training(group, unfinished)
    asked = evaluations(group, training.states.params)
    records = training.run(start + seconds, log, [program for _, program in asked])
    if not any(record["curve"] for record in records):
        log("the time was up before the first steps")
        return
    path = out / f"study_{name}.json"
    write(path, records)
    finished = all(record["finished"] for record in records)
    if finished:
        for record, evaluation in zip(records, evaluate(asked, training.states.params)):
            record["evaluation"] = evaluation
        write(path, records)
    for record in records:
        log(report.line(record))
    ((best, *_),) = report.best_rates(records)
    where = records.index(best)
    state = jax.tree.map(lambda x: x[where], training.states)
    config = group.config(group.stages[-1], *group.models[where])
    save_params(out / "models" / name, config, int(state.step), state.params)
    if finished:
        shutil.rmtree(unfinished)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS)
    parser.add_argument("--variant", choices=VARIANTS)
    parser.add_argument("--seeds", type=_integers, default=SEEDS, help="comma-separated")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--seconds", type=float, default=400, help="when training stops")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    try:
        if options.report:
            print(report.merge(options.out))
        elif options.setting and options.variant:
            name = f"{options.setting}-{options.variant}"
            chosen = group(options.setting, options.variant, options.seeds)
            run(chosen, name, options.seconds, options.out)
        else:
            parser.error("--setting and --variant, or --report")
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
