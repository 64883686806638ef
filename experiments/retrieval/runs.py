"""Training runs on generated retrieval: many short ones in one process.

The model, the step, the objective and the optimiser are the project's. What differs from
`lucid_jax.train` is that a program does a whole chunk of steps and an evaluation, and that its
learning rate is an argument: runs that differ in rate and seed share it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import measuring
from experiments.retrieval.task import Retrieval
from lucid_jax.config import Config
from lucid_jax.model import abstract_model
from lucid_jax.sharding import Layout, make_layout
from lucid_jax.train_step import TrainState, init_state, make_train_step

# Of evaluations, where a run has its own.
_EVAL_SEED = 10**6
_EVAL_ROWS = 64

# 0.9 million parameters. With an init_std of 0.02 models stay where they guess among the values
# that are there; see experiments/README.md.
MODEL = {
    "vocab_size": 258,
    "num_layers": 4,
    "embed_dim": 128,
    "mlp_dim": 384,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 64,
    "init_std": 0.1,
    "remat": "none",
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps on one distribution of rows, `rows` of them a step."""

    task: Retrieval
    rows: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Run:
    """A model and how it is trained; runs of one seed see the same data in the same order.

    Attributes:
      name: Of the setting, to tell results apart.
      attention: As in the configuration.
      stages: One after another, under one schedule of the learning rate.
      seed: Of parameters and data.
      model: Changes to `MODEL`.
      optim: Changes to the optimiser.
      chunk: Steps between evaluations; it divides those of every stage.
      stop_at: Accuracy with all needles at which a stage ends early.
    """

    name: str
    attention: str
    stages: tuple[Stage, ...]
    learning_rate: float = 1e-3
    temperature: float = 1.0
    seed: int = 0
    model: tuple[tuple[str, Any], ...] = ()
    optim: tuple[tuple[str, Any], ...] = ()
    chunk: int = 50
    stop_at: float = 2.0

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    def config(self, stage: Stage) -> Config:
        """The configuration of a stage."""
        optim = {"b2": 0.98, "eps": 1e-8, "warmup": 0.05, "learning_rate": self.learning_rate}
        return Config.from_dict(
            {
                "steps": self.steps,
                "batch_size": stage.rows,
                "seed": self.seed,
                "telemetry": False,
                "model": {
                    **MODEL,
                    "attention": self.attention,
                    "temperature": self.temperature,
                    **dict(self.model),
                },
                "optim": optim | dict(self.optim),
                # One document a row: softmax attention may take the fastest kernel.
                "data": {"sequence_length": stage.task.length, "packing": "document"},
            }
        )


def layout_of(config: Config) -> Layout:
    """One device, however many there are."""
    return make_layout(config, jax.devices()[:1])


def accuracy(
    config: Config, task: Retrieval, params: Any, text: jax.Array, answers: jax.Array
) -> jax.Array:
    """The share of the answers that are the most likely token, float32 scalar.

    Args:
      config: With the model.
      task: What the rows are of.
      params: Of the model.
      text: `[B,T+1]`, of `Retrieval.rows`.
      answers: `[B,T+1]`, likewise.
    """
    graph, _ = abstract_model(config.model, layout_of(config))
    model = nnx.merge(graph, params)
    batch = task.batch(text, answers)
    x, _ = model(batch["tokens"], batch["positions"], None)
    asked = slice(task.length - task.asked_tokens, None)
    logits = x[:, asked].astype(jnp.float32) @ model.head
    answers = answers[:, 1:][:, asked]
    right = (jnp.argmax(logits, -1) == batch["targets"][:, asked]) & answers
    return right.sum() / answers.sum()


def needle_counts(task: Retrieval) -> list[int]:
    """1, 2, 4, … and the most."""
    return [*(2**i for i in range((task.needles - 1).bit_length())), task.needles]


def evaluation_rows(task: Retrieval, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows for each of `needle_counts`: `[N,B,T+1]` twice, the same in every run."""
    task = dataclasses.replace(task, in_order=0.0)
    rng = np.random.default_rng(_EVAL_SEED)
    text, answers = zip(*(task.rows(rng, rows, n) for n in needle_counts(task)))
    return np.stack(text), np.stack(answers)


def make_chunk(run: Run, stage: Stage) -> Callable[..., tuple[TrainState, jax.Array, jax.Array]]:
    """Steps on rows `[steps,B,T+1]` at a rate, then accuracies by needles.

    It is a function of state, rate, text, answers, and both of the evaluation.
    """
    # An update of AdamW is proportional to its rate, so that any one can be made of that at 1.
    config = dataclasses.replace(run, learning_rate=1.0).config(stage)
    layout = layout_of(config)
    graph, _ = abstract_model(config.model, layout)
    train_step = make_train_step(config, graph, layout)

    def chunk(state, rate, text, answers, eval_text, eval_answers):
        def step(state, rows):
            new, metrics = train_step(state, stage.task.batch(*rows))
            params = jax.tree.map(lambda p, q: p + rate * (q - p), state.params, new.params)
            return dataclasses.replace(new, params=params), metrics["loss"]

        state, losses = jax.lax.scan(step, state, (text, answers))
        evaluate = functools.partial(accuracy, config, stage.task, state.params)
        found = jax.lax.map(lambda rows: evaluate(*rows), (eval_text, eval_answers))
        return state, losses, found

    return chunk


@functools.cache
def _program(shape: Run, stage: Stage):
    return jax.jit(make_chunk(shape, stage), donate_argnums=0)


def training_rows(stage: Stage, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """All rows of a stage, `[steps,B,T+1]` twice."""
    rng = np.random.default_rng(seed)
    arrays = stage.task.rows(rng, stage.steps * stage.rows)
    text, answers = (x.reshape(stage.steps, stage.rows, -1) for x in arrays)
    return text, answers


def shape_of(run: Run) -> Run:
    """What runs have in common that share programs."""
    return dataclasses.replace(run, name="", seed=0, learning_rate=1.0)


def _train(
    run: Run, data: Sequence[concurrent.futures.Future], deadline: float
) -> tuple[TrainState, dict]:
    """The trained state and the record of a run; not `finished` where the deadline came first."""
    config = run.config(run.stages[0])
    state = init_state(config, layout_of(config))
    curve: list[dict] = []
    times: list[float] = []
    for index, stage in enumerate(run.stages):
        program, counts = _program(shape_of(run), stage), needle_counts(stage.task)
        drawn = data[index].result()
        evaluation = evaluation_rows(stage.task, _EVAL_ROWS)
        for first in range(0, stage.steps, run.chunk):
            if time.monotonic() > deadline:
                break
            rows = (x[first : first + run.chunk] for x in drawn)
            start = time.perf_counter()
            state, losses, found = program(state, run.learning_rate, *rows, *evaluation)
            losses, found = jax.device_get((losses, found))
            times.append((time.perf_counter() - start) / run.chunk)
            curve.append(
                {
                    "step": int(state.step),
                    "stage": index,
                    "loss": float(losses.mean()),
                    "accuracy": dict(zip(map(str, counts), map(float, found))),
                }
            )
            if found[-1] >= run.stop_at:
                break
    record = {
        "run": dataclasses.asdict(run),
        "finished": time.monotonic() <= deadline,
        "seconds_per_step": statistics.median(times) if times else None,
        "curve": curve,
    }
    return state, record


def execute(runs: Sequence[Run], seconds: float) -> Iterator[tuple[Run, TrainState, dict]]:
    """Trains one run after another until the time is up; yields each, the last maybe unfinished."""
    deadline = time.monotonic() + seconds
    # The rows of later seeds are drawn while runs of the first one go.
    wanted = dict.fromkeys((stage, run.seed) for run in runs for stage in run.stages)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        data = {key: pool.submit(training_rows, *key) for key in wanted}
        for run in runs:
            drawn = [data[stage, run.seed] for stage in run.stages]
            state, record = _train(run, drawn, deadline)
            yield run, state, record
            if not record["finished"]:
                pool.shutdown(cancel_futures=True)
                return


def steps_to(record: dict, share: float, needles: int) -> int | None:
    """The first step with that accuracy at a number of needles; None if there was none."""
    return next(
        (c["step"] for c in record["curve"] if c["accuracy"].get(str(needles), 0) >= share), None
    )


def write(path: pathlib.Path, records: Sequence[dict], **more: Any) -> None:
    """All records so far, with the machine and its versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = measuring.environment(("flax", "optax"))
    path.write_text(json.dumps({"environment": environment, **more, "records": list(records)}))
