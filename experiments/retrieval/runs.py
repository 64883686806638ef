"""Training on generated tasks: models of several rates and seeds side by side.

The model, the step, the objective and the optimiser are the project's. Unlike
`lucid_jax.training.loop`, one program draws the data of a whole chunk of steps and does the
steps, for all models of a group at once: a small model alone leaves a GPU idle.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp

from experiments.activations import build_model
from lucid_jax.checkpoint.manager import Checkpointer
from lucid_jax.config import CheckpointConfig, Config, ConfigError
from lucid_jax.models.loss import Batch
from lucid_jax.training.step import Trainer, TrainState

# The seed of evaluation data.
EVAL_SEED = 10**6
_EVAL_BATCH, _EVAL_TOKENS = 64, 2**15

# 5 million parameters. With an init_std of 0.02 models guess among the values in the sequence for
# a long time.
MODEL = {
    "vocab_size": 258, "num_layers": 6, "embed_dim": 256, "mlp_dim": 768, "num_heads": 4,
    "num_kv_heads": 4, "head_dim": 64, "init_std": 0.05, "remat": "none",
}  # fmt: skip


class Task(Protocol):
    """A distribution of sequences that end in answers, such as `Retrieval`."""

    @property
    def length(self) -> int:
        """Tokens of a sequence (T)."""

    @property
    def asked_tokens(self) -> int:
        """Tokens at the end of a sequence that have all answers."""

    @property
    def cases(self) -> Sequence[int]:
        """Kinds of sequences that are evaluated apart, such as numbers of needles."""

    @property
    def curve_cases(self) -> Sequence[int]:
        """The cases that are evaluated during training."""

    def at_length(self, length: int) -> Self:
        """Returns the task to evaluate at a length."""

    def draw(
        self, key: jax.Array, count: int, case: jax.Array | int | None = None, /
    ) -> tuple[jax.Array, jax.Array]:
        """Draws sequences to train on, or those of a case to evaluate.

        Returns tokens int32 `[B,T+1]`, and whether each is an answer, bool `[B,T+1]`.
        """

    def batch(self, text: jax.Array, answers: jax.Array) -> Batch:
        """Returns a training batch of the result of `draw`."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps on one distribution of sequences."""

    task: Task
    batch: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Group:
    """N models that are trained side by side, one for every rate and seed.

    Models of one seed see the same data in the same order, in all groups with the same stages.
    """

    name: str  # The setting.
    attention: str  # As in the configuration.
    stages: tuple[Stage, ...]  # One after another, under one schedule of the learning rate.
    rates: tuple[float, ...]
    seeds: tuple[int, ...]  # Of parameters and data.
    temperature: float = 1.0
    positions: str = "rope"
    model: tuple[tuple[str, Any], ...] = ()  # Changes to `MODEL`.
    chunk: int = 50  # Steps between evaluations; divides the steps of every stage.

    @property
    def models(self) -> list[tuple[float, int]]:
        """Rate and seed of every model."""
        return [(rate, seed) for rate in self.rates for seed in self.seeds]

    def end(self, stage: int) -> int:
        """Returns the step at which a stage ends, from its index."""
        return sum(stage.steps for stage in self.stages[: stage + 1])

    def config(self, stage: Stage, rate: float = 1.0, seed: int = 0) -> Config:
        """Returns the configuration of a model in a stage."""
        names = "attention", "temperature", "positions"
        attention = {name: getattr(self, name) for name in names}
        return Config.from_dict(
            {
                "steps": self.end(len(self.stages)),
                "batch_size": stage.batch,
                "seed": seed,
                "telemetry": False,
                "model": MODEL | attention | dict(self.model),
                "optim": {"b2": 0.98, "eps": 1e-8, "warmup": 0.05, "learning_rate": rate},
                # One document a sequence: softmax attention may use the fastest kernel.
                "data": {"sequence_length": stage.task.length, "packing": "document"},
            }
        )


def build_trainer(config: Config) -> Trainer:
    """Builds the model and optimiser of a configuration."""
    return Trainer.build(config, build_model(config))


def accuracies(
    config: Config, task: Task, cases: Sequence[int], params: Any, key: jax.Array, batch: int
) -> jax.Array:
    """Returns the share of answers that are the most likely token, in each case of a task."""
    model = build_model(config).merge(params)
    asked = slice(task.length - task.asked_tokens, None)

    def accuracy(case):
        text, answers = task.draw(key, batch, case)
        inputs = task.batch(text, answers)
        x, _ = model(inputs["tokens"], inputs["positions"], None)
        found = jnp.argmax(x[:, asked].astype(jnp.float32) @ model.head, -1)
        return jnp.mean(found == inputs["targets"][:, asked], where=answers[:, 1:][:, asked])

    return jax.lax.map(accuracy, jnp.array(cases))


def init_states(group: Group) -> TrainState:
    """Returns the initial state of every model, `[N,…]`."""
    trainer = build_trainer(group.config(group.stages[0]))
    states = {seed: trainer.init_state(trainer.model.init(seed)) for seed in group.seeds}
    return jax.tree.map(lambda *x: jnp.stack(x), *(states[seed] for _, seed in group.models))


def make_chunk(group: Group, stage: Stage) -> Callable[..., tuple[TrainState, jax.Array]]:
    """Returns a function from state, rate and data key to the state after a chunk, and the loss."""
    # An AdamW update is proportional to its rate, so every rate can scale the update at rate 1.
    train_step = build_trainer(group.config(stage)).make_step()

    def chunk(state, rate, key):
        def step(state, data):
            new, metrics = train_step(state, stage.task.batch(*data))
            params = jax.tree.map(lambda p, q: p + rate * (q - p), state.params, new.params)
            return dataclasses.replace(new, params=params), metrics["loss"]

        data = stage.task.draw(jax.random.fold_in(key, state.step), group.chunk * stage.batch)
        by_step = jax.tree.map(lambda x: x.reshape(group.chunk, stage.batch, -1), data)
        state, losses = jax.lax.scan(step, state, by_step)
        return state, losses.mean()

    return chunk


class Training:
    """A group between its first step and its last, which may take several runs.

    Models are evaluated on the last stage's task during all stages. States `[N,…]` and curves of
    steps, seconds and accuracies are saved at the end of every stage, and when the time is up.
    """

    def __init__(self, group: Group, directory: pathlib.Path):
        """Restores what `directory` has; raises ConfigError if it has another group's states."""
        self._group, self._directory = group, directory
        self.step = 0
        self.curves: list[dict[str, list]] = [
            {"step": [], "seconds": [], "accuracy": []} for _ in group.models
        ]
        self.states = init_states(group)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.states
        )
        other = f"{directory} has states of other models, rates, seeds or stages: remove it"
        try:
            with self._open() as checkpointer:
                restored = checkpointer.restore_latest(abstract)
        except ConfigError as error:
            raise ConfigError(other) from error
        if restored is not None:
            if restored.config != self._description():
                raise ConfigError(other)
            self.step, self.states = restored.step, restored.state
            self.curves = restored.data_state["curves"]

    @property
    def finished(self) -> bool:
        """Returns whether all stages are done."""
        return self.step == self._group.end(len(self._group.stages))

    def _open(self) -> Checkpointer:
        return Checkpointer(self._directory, CheckpointConfig(keep_last=1, keep_best=0))

    def _description(self) -> dict:
        """Returns the group as it is read back from JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self._group)))

    def run(self, deadline: float, log: Callable[[str], None]) -> None:
        """Trains until all is done or the deadline of the monotonic clock has come."""
        group = self._group
        rates = jnp.array([rate for rate, _ in group.models])
        keys = jax.vmap(jax.random.key)(jnp.array([seed for _, seed in group.models]))
        last, eval_key = group.stages[-1], jax.random.key(EVAL_SEED)
        accurate = functools.partial(
            accuracies, group.config(last), last.task, last.task.curve_cases,
            batch=min(_EVAL_BATCH, _EVAL_TOKENS // last.task.length),
        )  # fmt: skip
        left = [i for i in range(len(group.stages)) if self.step < group.end(i)]
        chunks = [jax.vmap(make_chunk(group, group.stages[i])) for i in left]
        programs = [
            jax.jit(jax.vmap(accurate, in_axes=(0, None))).lower(self.states.params, eval_key),
            *(jax.jit(x, donate_argnums=0).lower(self.states, rates, keys) for x in chunks),
        ]
        with ThreadPoolExecutor() as pool:
            evaluate, *chunks = pool.map(lambda program: program.compile(), programs)
        with self._open() as checkpointer:
            for i, chunk in zip(left, chunks):
                while self.step < group.end(i) and time.monotonic() < deadline:
                    start = time.perf_counter()
                    self.states, losses = jax.block_until_ready(chunk(self.states, rates, keys))
                    took = time.perf_counter() - start
                    self.step += group.chunk
                    found = evaluate(self.states.params, eval_key).mean(1).tolist()
                    for curve, accuracy in zip(self.curves, found):
                        before = curve["seconds"][-1] if curve["seconds"] else 0.0
                        curve["step"].append(self.step)
                        # A model's share of the time of all.
                        curve["seconds"].append(before + took / len(self.curves))
                        curve["accuracy"].append(accuracy)
                    remaining = (group.end(i) - self.step) * took / group.chunk
                    log(
                        f"{group.name} {group.attention} step {self.step},"
                        f" {1e3 * took / group.chunk:.0f} ms a step,"
                        f" {remaining:.0f} s left of stage {i + 1}, loss {losses.mean():.3f},"
                        f" accuracy {' '.join(f'{x:.3f}' for x in found)}"
                    )
                if self.step:
                    curves, config = {"curves": self.curves}, self._description()
                    checkpointer.save(
                        self.step, self.states, data_state=curves, config=config, eval_loss=None
                    )

    def records(self) -> list[dict]:
        """Returns a record of each model; `cases` are those that its curve is the mean of."""
        group = self._group
        return [
            {
                "setting": group.name,
                "attention": group.attention,
                "temperature": group.temperature,
                "positions": group.positions,
                "learning_rate": rate,
                "seed": seed,
                "cases": group.stages[-1].task.curve_cases,
                "finished": self.finished,
                "curve": curve,
            }
            for (rate, seed), curve in zip(group.models, self.curves)
        ]
