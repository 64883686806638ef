"""Training runs on generated retrieval: many short ones in one process, compiled ahead.

The model, the step, the objective and the optimiser are the project's. What differs from
`lucid_jax.train` is that rows are generated on the device, so that a program does a whole
chunk of steps and an evaluation, and that the programs of later runs are compiled by threads
while earlier ones run.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import measuring
from experiments.retrieval.task import Retrieval
from lucid_jax.checkpoint import Checkpointer, checkpoint_directory
from lucid_jax.config import Config
from lucid_jax.model import abstract_model
from lucid_jax.sharding import Layout, make_layout
from lucid_jax.train_step import TrainState, abstract_state, init_state, make_train_step
from lucid_jax.workdir import save_config

# Data of evaluations; runs draw theirs from keys of their seeds.
_EVAL_SEED = 10**6
_EVAL_ROWS = 64
_COMPILE_THREADS = 6

# 5.1 million parameters.
MODEL = {
    "vocab_size": 258,
    "num_layers": 4,
    "embed_dim": 320,
    "mlp_dim": 896,
    "num_heads": 5,
    "num_kv_heads": 5,
    "head_dim": 64,
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
    config: Config, task: Retrieval, params: Any, rng: jax.Array, rows: int, needles: jax.Array
) -> jax.Array:
    """The share of the answers that are the most likely token, float32 scalar."""
    graph, _ = abstract_model(config.model, layout_of(config))
    model = nnx.merge(graph, params)
    batch, answers = task.batch_and_answers(rng, rows, needles)
    x, _ = model(batch["tokens"], batch["positions"], None)
    asked = slice(task.length - task.queries * task.width, None)
    logits = x[:, asked].astype(jnp.float32) @ model.head
    right = (jnp.argmax(logits, -1) == batch["targets"][:, asked]) & answers[:, asked]
    return right.sum() / answers.sum()


def needle_counts(task: Retrieval) -> list[int]:
    """1, 2, 4, … and the most."""
    return [*(2**i for i in range((task.needles - 1).bit_length())), task.needles]


def _compile_stage(run: Run, stage: Stage) -> Callable[[TrainState], Any]:
    """A program for `run.chunk` steps: new state, losses `[chunk]` and accuracies by needles."""
    config = run.config(stage)
    layout = layout_of(config)
    graph, _ = abstract_model(config.model, layout)
    train_step = make_train_step(config, graph, layout)
    task, data = stage.task, jax.random.key(run.seed)

    def step(state, _):
        batch = task.batch(jax.random.fold_in(data, state.step), stage.rows)
        state, metrics = train_step(state, batch)
        return state, metrics["loss"]

    def chunk(state):
        state, losses = jax.lax.scan(step, state, length=run.chunk)
        rng = jax.random.key(_EVAL_SEED)
        found = jax.lax.map(
            lambda n: accuracy(config, task, state.params, rng, _EVAL_ROWS, n),
            jnp.array(needle_counts(task)),
        )
        return state, losses, found

    abstract = abstract_state(config, layout)
    return jax.jit(chunk, donate_argnums=0).lower(abstract).compile()


def _train(run: Run, programs: Sequence[concurrent.futures.Future], deadline: float):
    """The trained state and the record of a run; None where the deadline came first."""
    config = run.config(run.stages[0])
    state = init_state(config, layout_of(config))
    curve: list[dict] = []
    times: list[float] = []
    for index, (stage, program) in enumerate(zip(run.stages, programs)):
        compiled = program.result()
        for _ in range(stage.steps // run.chunk):
            if time.monotonic() > deadline:
                return None
            start = time.perf_counter()
            state, losses, found = compiled(state)
            losses, found = jax.device_get((losses, found))
            times.append((time.perf_counter() - start) / run.chunk)
            curve.append(
                {
                    "step": int(state.step),
                    "stage": index,
                    "loss": float(losses.mean()),
                    "accuracy": dict(zip(map(str, needle_counts(stage.task)), map(float, found))),
                }
            )
            if found[-1] >= run.stop_at:
                break
    record = {
        "run": dataclasses.asdict(run),
        "seconds_per_step": statistics.median(times),
        "curve": curve,
    }
    return state, record


def execute(runs: Sequence[Run], seconds: float) -> Iterator[tuple[Run, TrainState, dict]]:
    """Trains one run after another until the time is up; yields each as it is done."""
    deadline = time.monotonic() + seconds
    pool = concurrent.futures.ThreadPoolExecutor(_COMPILE_THREADS)
    programs = [[pool.submit(_compile_stage, run, s) for s in run.stages] for run in runs]
    try:
        for run, compiled in zip(runs, programs):
            trained = _train(run, compiled, deadline)
            if trained is None:
                print(f"stopped by the clock in {run.name} {run.attention}", flush=True)
                return
            yield run, *trained
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def steps_to(record: dict, share: float, needles: int) -> int | None:
    """The first step with that accuracy at a number of needles; None if there was none."""
    return next(
        (c["step"] for c in record["curve"] if c["accuracy"].get(str(needles), 0) >= share), None
    )


def save_model(directory: pathlib.Path, run: Run, state: TrainState) -> None:
    """A work directory that `run.py --mode=eval` takes, without the optimiser's state."""
    config = run.config(run.stages[-1])
    with Checkpointer(checkpoint_directory(directory), config.checkpoint) as checkpointer:
        checkpointer.save(
            int(state.step), {"params": state.params}, data_state={}, config=config.to_dict(),
            eval_loss=None,
        )  # fmt: skip
    save_config(directory, config)


def write(path: pathlib.Path, records: Sequence[dict], **more: Any) -> None:
    """All records so far, with the machine and its versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = measuring.environment(("flax", "optax"))
    path.write_text(json.dumps({"environment": environment, **more, "records": list(records)}))
