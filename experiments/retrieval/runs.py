"""Training on generated retrieval: models of several rates and seeds side by side.

The model, the step, the objective and the optimiser are the project's. What differs from
`lucid_jax.training.loop` is that one program draws the rows of a whole chunk of steps, does the steps
and evaluates, for all models of a group at once: small models alone leave a GPU idle.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp

from experiments import measuring
from experiments.retrieval.task import Retrieval
from lucid_jax.checkpoint.manager import Checkpointer
from lucid_jax.config import CheckpointConfig, Config, ConfigError
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.parallel.mesh import Layout, make_layout
from lucid_jax.training.step import Trainer, TrainState

# Of evaluations, where a run has its own.
EVAL_SEED = 10**6
_EVAL_ROWS, _EVAL_TOKENS = 64, 2**15

# 5 million parameters. With an init_std of 0.02 models stay long where they guess among the
# values that are there.
MODEL = {
    "vocab_size": 258,
    "num_layers": 6,
    "embed_dim": 256,
    "mlp_dim": 768,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 64,
    "init_std": 0.05,
    "remat": "none",
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps on one distribution of rows, `rows` of them a step."""

    task: Retrieval
    rows: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Group:
    """Models that are trained side by side: N, one of every rate and seed.

    Models of one seed see the same rows in the same order, in other groups of the same stages too.

    Attributes:
      name: Of the setting, to tell results apart.
      attention: As in the configuration.
      stages: One after another, under one schedule of the learning rate.
      rates: Learning rates.
      seeds: Of parameters and rows.
      temperature: As in the configuration.
      model: Changes to `MODEL`.
      chunk: Steps between evaluations; it divides those of every stage.
    """

    name: str
    attention: str
    stages: tuple[Stage, ...]
    rates: tuple[float, ...] = (1e-3,)
    seeds: tuple[int, ...] = (0,)
    temperature: float = 1.0
    model: tuple[tuple[str, Any], ...] = ()
    chunk: int = 50

    @property
    def models(self) -> list[tuple[float, int]]:
        """Rate and seed of every model."""
        return [(rate, seed) for rate in self.rates for seed in self.seeds]

    def config(self, stage: Stage, rate: float = 1.0, seed: int = 0) -> Config:
        """The configuration of a model in a stage."""
        return Config.from_dict(
            {
                "steps": sum(stage.steps for stage in self.stages),
                "batch_size": stage.rows,
                "seed": seed,
                "telemetry": False,
                "model": {
                    **MODEL,
                    "attention": self.attention,
                    "temperature": self.temperature,
                    **dict(self.model),
                },
                "optim": {"b2": 0.98, "eps": 1e-8, "warmup": 0.05, "learning_rate": rate},
                # One document a row: softmax attention may take the fastest kernel.
                "data": {"sequence_length": stage.task.length, "packing": "document"},
            }
        )


def layout_of(config: Config) -> Layout:
    """One device, however many there are."""
    return make_layout(config, jax.devices()[:1])


def needle_counts(task: Retrieval) -> list[int]:
    """1, 2, 4, … and the most."""
    return [*(2**i for i in range((task.needles - 1).bit_length())), task.needles]


def accuracies(
    config: Config, task: Retrieval, params: Any, key: jax.Array, rows: int
) -> jax.Array:
    """The share of the answers that are the most likely token, by `needle_counts`.

    Args:
      config: With the model.
      task: What it is asked.
      params: Of the model.
      key: Of the rows; the same rows for the same key.
      rows: How many of them for each number of needles.

    Returns:
      float32 `[len(needle_counts(task))]`.
    """
    model = LanguageModel.build(config.model, layout_of(config)).merge(params)
    asked = slice(task.length - task.asked_tokens, None)

    def of(needles):
        text, answers = task.rows(key, rows, needles)
        batch = task.batch(text, answers)
        x, _ = model(batch["tokens"], batch["positions"], None)
        logits = x[:, asked].astype(jnp.float32) @ model.head
        answers = answers[:, 1:][:, asked]
        right = (jnp.argmax(logits, -1) == batch["targets"][:, asked]) & answers
        return right.sum() / answers.sum()

    return jax.lax.map(of, jnp.array(needle_counts(task)))


def trainer_of(config: Config) -> Trainer:
    """Builds the model and optimiser of a configuration."""
    return Trainer.build(config, LanguageModel.build(config.model, layout_of(config)))


def init_states(group: Group) -> TrainState:
    """The first state of every model, `[N,…]`."""
    config = group.config(group.stages[0])
    trainer = trainer_of(config)
    of_seed = {seed: trainer.init_state(trainer.model.init(seed)) for seed in group.seeds}
    return jax.tree.map(lambda *x: jnp.stack(x), *(of_seed[seed] for _, seed in group.models))


def make_chunk(group: Group, stage: Stage) -> Callable[..., tuple[TrainState, jax.Array]]:
    """A chunk of steps of one model.

    It is a function of state, rate and the key of the model's rows, and returns the new state and
    the mean loss.
    """
    # An update of AdamW is proportional to its rate, so that any one can be made of that at 1.
    config = group.config(stage)
    train_step = trainer_of(config).make_step()

    def chunk(state, rate, key):
        def step(state, rows):
            new, metrics = train_step(state, stage.task.batch(*rows))
            params = jax.tree.map(lambda p, q: p + rate * (q - p), state.params, new.params)
            return dataclasses.replace(new, params=params), metrics["loss"]

        rows = stage.task.rows(jax.random.fold_in(key, state.step), group.chunk * stage.rows)
        by_step = jax.tree.map(lambda x: x.reshape(group.chunk, stage.rows, -1), rows)
        state, losses = jax.lax.scan(step, state, by_step)
        return state, losses.mean()

    return chunk


def compiling(programs: Sequence[jax.stages.Lowered]) -> list[Future[jax.stages.Compiled]]:
    """Compiles programs side by side, while the caller goes on."""
    # XLA's compiler lets go of the interpreter's lock.
    pool = ThreadPoolExecutor()
    compiled = [pool.submit(program.compile) for program in programs]
    pool.shutdown(wait=False)
    return compiled


class Training:
    """A group between its first step and its last, in one sitting or several.

    All stages are evaluated on what the last one is about. States and curves are saved at the end
    of every stage, and when the time is up.

    Attributes:
      states: Of all models, `[N,…]`.
    """

    def __init__(self, group: Group, directory: pathlib.Path):
        """Goes on from what `directory` has, and starts to compile what is left to do.

        Raises:
          ConfigError: `directory` has the states of another group.
        """
        self._group = group
        self._directory = directory
        self._step = 0
        self._curves: list[list[dict]] = [[] for _ in group.models]
        self.states = init_states(group)
        self._restore()

        self._of_models = (
            jnp.array([rate for rate, _ in group.models]),
            jax.vmap(jax.random.key)(jnp.array([seed for _, seed in group.models])),
        )
        last = group.stages[-1]
        rows = min(_EVAL_ROWS, _EVAL_TOKENS // last.task.length)
        accuracy = functools.partial(accuracies, group.config(last), last.task, rows=rows)
        evaluate = jax.jit(jax.vmap(accuracy, in_axes=(0, None)))
        # By stage; the states have the same shapes in all.
        chunks = {
            index: jax.jit(jax.vmap(make_chunk(group, stage)), donate_argnums=0)
            for index, stage in enumerate(group.stages)
            if self._step < self._end(index)
        }
        self._evaluate, *compiled = compiling(
            [
                evaluate.lower(self.states.params, jax.random.key(EVAL_SEED)),
                *(chunk.lower(self.states, *self._of_models) for chunk in chunks.values()),
            ]
        )
        self._chunks = dict(zip(chunks, compiled))

    def _end(self, index: int) -> int:
        """Steps until a stage is done."""
        return sum(stage.steps for stage in self._group.stages[: index + 1])

    def _open(self) -> Checkpointer:
        return Checkpointer(self._directory, CheckpointConfig(keep_last=1, keep_best=0))

    def _description(self) -> dict:
        """The group as it is read back."""
        return json.loads(json.dumps(dataclasses.asdict(self._group)))

    def _restore(self) -> None:
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.states
        )
        other = f"{self._directory} has states of other models, rates, seeds or stages: remove it"
        with self._open() as checkpointer:
            try:
                restored = checkpointer.restore_latest(abstract)
            except ConfigError as error:
                raise ConfigError(other) from error
        if restored is None:
            return
        if restored.config != self._description():
            raise ConfigError(other)
        self._step, self.states = restored.step, restored.state
        self._curves = restored.data_state["curves"]

    def run(
        self,
        deadline: float,
        log: Callable[[str], None] = lambda text: None,
        others: Sequence[Future] = (),
    ) -> list[dict]:
        """Trains until all is done or the deadline of the monotonic clock has come.

        Args:
          deadline: When it stops.
          log: What takes a line now and then.
          others: Programs that are being compiled, to wait for before the first step too.

        Returns:
          A record for each model; none is `finished` where the deadline came first.
        """
        programs = [self._evaluate, *self._chunks.values(), *others]
        # For all of them: what compiles beside a step slows it, and seconds are recorded.
        wait(programs, timeout=max(0, deadline - time.monotonic()))
        with self._open() as checkpointer:
            for index in self._chunks:
                while self._step < self._end(index) and time.monotonic() < deadline:
                    log(self._advance(index))
                if any(self._curves):
                    checkpointer.save(
                        self._step,
                        self.states,
                        data_state={"curves": self._curves},
                        config=self._description(),
                        eval_loss=None,
                    )
        return self._records()

    def _advance(self, index: int) -> str:
        """Does a chunk of a stage and evaluates; what came out in one line."""
        group = self._group
        evaluate, chunk = self._evaluate.result(), self._chunks[index].result()
        start = time.perf_counter()
        self.states, losses = jax.block_until_ready(chunk(self.states, *self._of_models))
        took = time.perf_counter() - start
        self._step += group.chunk
        found = evaluate(self.states.params, jax.random.key(EVAL_SEED))
        counts = list(map(str, needle_counts(group.stages[-1].task)))
        for curve, loss, accuracy in zip(self._curves, *jax.device_get((losses, found))):
            before = curve[-1]["seconds"] if curve else 0.0
            point = {
                "step": self._step,
                "stage": index,
                # A model's share of the time of all.
                "seconds": before + took / len(self._curves),
                "loss": float(loss),
            }
            curve.append({**point, "accuracy": dict(zip(counts, accuracy.tolist()))})
        latest = " ".join(f"{curve[-1]['accuracy'][counts[-1]]:.3f}" for curve in self._curves)
        ms = 1e3 * took / group.chunk
        return f"{group.name} {group.attention} step {self._step}, {ms:.0f} ms a step: {latest}"

    def _records(self) -> list[dict]:
        group = self._group
        return [
            {
                "run": {
                    "name": group.name,
                    "attention": group.attention,
                    "temperature": group.temperature,
                    "stages": [dataclasses.asdict(stage) for stage in group.stages],
                    "learning_rate": rate,
                    "seed": seed,
                },
                "finished": self._step == self._end(len(group.stages)),
                "curve": curve,
            }
            for (rate, seed), curve in zip(group.models, self._curves)
        ]


def first_at(record: dict, share: float, needles: int) -> dict | None:
    """The first point of the curve with that accuracy at a number of needles, if there is one."""
    return next((c for c in record["curve"] if c["accuracy"][str(needles)] >= share), None)


def write(path: pathlib.Path, records: Sequence[dict], **more: Any) -> None:
    """All records so far, with the machine and its versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = measuring.environment(("flax", "optax"))
    path.write_text(json.dumps({"environment": environment, **more, "records": list(records)}))
