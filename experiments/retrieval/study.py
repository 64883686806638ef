"""Softmax against LUCID on generated retrieval: the same data, steps, parameters and rates.

  python -m experiments.retrieval.study --setting=4of4 --variant=lucid --seconds=400 --out=DIR
  python -m experiments.retrieval.study --report --out=DIR

A command trains one variant on one setting, with all rates and seeds side by side, and evaluates by
needles and length. Writes study_SETTING-VARIANT.json, and a work directory in DIR/models of the
first seed at the best rate, for `run.py --mode=eval`. The report merges these files into
study.json, or takes study.json if there are none, prints tables and draws.

A command that is run again goes on from where the clock stopped it, or if it was killed from the
last finished stage. Until it has finished, its states are in DIR/unfinished_SETTING-VARIANT.
"""

import argparse
import dataclasses
import functools
import operator
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from experiments import measuring, reporting
from experiments.retrieval import report
from experiments.retrieval.runs import EVAL_SEED, Group, Stage, Training, accuracies
from experiments.retrieval.task import Retrieval
from lucid_jax.checkpoint.manager import save_params
from lucid_jax.config import ConfigError

RATES = (3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2)
# Attention and temperature; the hybrid has LUCID in every fourth layer.
VARIANTS = {
    "softmax": ("softmax", 1.0),
    "lucid": ("lucid", 1.0),
    "sharp": ("softmax", 0.5),
    "hybrid": ("softmax,softmax,softmax,lucid", 1.0),
}
# Evaluation lengths, as multiples of the training's.
_EVAL_FACTORS = (1, 2, 4, 8)
# The fewest tokens and sequences of a case.
_EVAL_TOKENS, _EVAL_SEQUENCES = 2**17, 64


def _curriculum(digits: int, alphabet: int, *pairs: tuple[int, int, int, int]) -> tuple[Stage, ...]:
    """Returns repeated texts, then stages of pairs: length, needles, questions and steps."""

    def stage(length: int, needles: int, queries: int, steps: int, repeated: float) -> Stage:
        return Stage(Retrieval(length, digits, alphabet, needles, queries, repeated), 64, steps)

    return stage(128, 4, 4, 800, 1.0), *(stage(*x, 0.25) for x in pairs)


def _lengthened(stage: Stage, length: int, steps: int) -> Stage:
    """Returns a stage of the same pairs in longer sequences, with as many tokens a step."""
    assert isinstance(stage.task, Retrieval)
    task = dataclasses.replace(stage.task, length=length)
    return Stage(task, stage.batch * stage.task.length // length, steps)


def _twice(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    return tuple(dataclasses.replace(stage, steps=2 * stage.steps) for stage in stages)


_2OF6 = _curriculum(2, 6, (64, 4, 4, 400), (128, 16, 16, 400), (256, 32, 32, 1200))
_SMALL = _curriculum(1, 36, (64, 4, 4, 400), (128, 16, 16, 400))
# Names of settings give the digits of a key and the values of a digit. Most pairs of keys of four
# digits share one or more.
STAGES = {
    "2of6": _2OF6,
    "long": (*_2OF6, *(_lengthened(_2OF6[-1], n, 400) for n in (512, 1024, 2048))),
    # Associative recall: as many slots as pairs.
    "recall": _curriculum(1, 36, (16, 4, 4, 400), (64, 16, 16, 400), (128, 32, 32, 1200)),
    "4of4": _curriculum(4, 4, (64, 4, 4, 400), (192, 16, 16, 800), (512, 64, 32, 1600)),
    "small": _SMALL,
    # Whether more steps teach a variant what it has not learnt.
    "2of6-twice": _twice(_2OF6),
    "small-twice": _twice(_SMALL),
}
# 0.1 million parameters: half an hour on two CPU cores.
SMALL_MODEL = (
    ("num_layers", 2), ("embed_dim", 64), ("mlp_dim", 192), ("num_heads", 1),
    ("num_kv_heads", 1), ("init_std", 0.1), ("compute_dtype", "float32"),
)  # fmt: skip


def make_group(setting: str, variant: str, seeds: tuple[int, ...]) -> Group:
    """Returns all rates and the given seeds of a variant."""
    attention, temperature = VARIANTS[variant]
    small = setting.startswith("small")
    rates, model = ((3e-3,), SMALL_MODEL) if small else (RATES, ())
    return Group(setting, attention, STAGES[setting], rates, seeds, temperature, model=model)


def evaluate(
    group: Group, params: Any, log: Callable[[str], None]
) -> list[dict[str, dict[str, float]]]:
    """Returns the accuracies of every model `[N,…]`, by length and case of the task."""
    trained = group.stages[-1]
    tasks = [trained.task.at_length(factor * trained.task.length) for factor in _EVAL_FACTORS]
    models = [jax.tree.map(operator.itemgetter(i), params) for i in range(len(group.models))]

    def compile_at(task):
        # A small batch of long sequences would leave the device waiting for launches.
        batch = max(_EVAL_SEQUENCES, _EVAL_TOKENS // task.length)
        config = group.config(dataclasses.replace(trained, task=task))
        key = jax.random.key(EVAL_SEED + 1)
        accuracy = functools.partial(accuracies, config, task, task.cases, key=key, batch=batch)
        return jax.jit(accuracy).lower(models[0]).compile()

    results: list[dict[str, dict[str, float]]] = [{} for _ in models]
    with ThreadPoolExecutor() as pool:
        for task, accuracy in zip(tasks, pool.map(compile_at, tasks)):
            for result, model in zip(results, models):
                shares = accuracy(model).tolist()
                result[str(task.length)] = dict(zip(map(str, task.cases), shares))
            log(f"evaluated at {task.length} tokens")
    return results


def run(group: Group, name: str, seconds: float, out: pathlib.Path) -> None:
    """Trains, writes and saves one group, and evaluates it unless the time is up."""
    start = time.monotonic()

    def log(text: str) -> None:
        print(f"[{time.monotonic() - start:5.0f} s] {text}", flush=True)

    unfinished = out / f"unfinished_{name}"
    training = Training(group, unfinished)
    training.run(start + seconds, log)
    if not training.step:
        log("the time was up before the first steps")
        return
    records = training.records()
    environment = measuring.environment(("flax", "optax"))
    write = functools.partial(
        reporting.write_json, out / f"study_{name}.json", environment=environment, records=records
    )
    # An evaluation that is killed leaves the curves.
    write()
    if training.finished:
        for record, evaluation in zip(records, evaluate(group, training.states.params, log)):
            record["evaluation"] = evaluation
        write()
    log(f"best rate:\n{report.table(records)}")
    ((best, *_),) = report.best_rates(records)
    where = records.index(best)
    state = jax.tree.map(lambda x: x[where], training.states)
    config = group.config(group.stages[-1], *group.models[where])
    save_params(out / "models" / name, config, int(state.step), state.params)
    if training.finished:
        shutil.rmtree(unfinished)


def command(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    settings: Iterable[str],
    variants: Iterable[str],
    make_group: Callable[[str, str, tuple[int, ...]], Group],
    merge: Callable[[pathlib.Path], str],
) -> None:
    """Trains a variant in a setting, or merges the results of `--out`."""
    parser.add_argument("--setting", choices=settings)
    parser.add_argument("--variant", choices=variants)
    parser.add_argument("--seeds", type=reporting.integers, default=SEEDS, help="comma-separated")
    parser.add_argument("--rates", type=_floats, help="comma-separated; default: all of the study")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--seconds", type=float, default=400, help="when training stops")
    flags = parser.parse_args(argv)
    if not (flags.report or (flags.setting and flags.variant)):
        parser.error("--setting and --variant, or --report")
    try:
        if flags.report:
            print(merge(flags.out))
        else:
            group = make_group(flags.setting, flags.variant, flags.seeds)
            if flags.rates:
                group = dataclasses.replace(group, rates=flags.rates)
            run(group, f"{flags.setting}-{flags.variant}", flags.seconds, flags.out)
    except ConfigError as error:
        parser.error(str(error))


def _floats(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    command(parser, argv, STAGES, VARIANTS, make_group, report.merge)


if __name__ == "__main__":
    main()
