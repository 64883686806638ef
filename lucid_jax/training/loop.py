"""The training loop: start or resume, step, report, evaluate, save, and stop cleanly."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from lucid_jax.checkpoint.manager import Checkpointer, checkpoint_directory, restore_params
from lucid_jax.config import Config, ConfigError
from lucid_jax.data import BatchLoader, check_data, load_tokenizer
from lucid_jax.evaluate.loss import LossEvaluator, LossReport
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.models.loss import Batch, micro_batches, weighted_losses
from lucid_jax.parallel.mesh import make_layout
from lucid_jax.runtime.preemption import Preemption
from lucid_jax.runtime.workdir import local_directory, save_config
from lucid_jax.training.reporter import Reporter
from lucid_jax.training.step import Trainer, TrainState


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended: steps done of those wanted, and its last evaluation.

    A request to stop may leave steps undone, or after the last one its evaluation; then
    the run has not finished.
    """

    step: int
    steps: int
    report: LossReport | None
    finished: bool


def train(
    config: Config, workdir: str | os.PathLike, *, profile: tuple[int, int] | None = None
) -> TrainResult:
    """Trains until `config.steps`, from the newest checkpoint of `workdir` if there is one.

    Everything that can be wrong with the configuration or the data is found before
    anything is compiled.

    Args:
      config: The run.
      workdir: Gets `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/` and
        `loss.png`.
      profile: First step and one past the last to record with the JAX profiler, into
        `workdir/profile`.

    Raises:
      ConfigError: what was asked for cannot run.
      NonFiniteError: the loss or gradient norm stopped being finite.
    """
    workdir = local_directory(workdir)
    layout = make_layout(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_data(config, tokenizer)
    open_loader = functools.partial(
        BatchLoader, config, tokenizer, layout.sharding("batch", "sequence"),
        stripes=layout.stripes(config.data.sequence_length),
    )  # fmt: skip
    loader = open_loader(split="train")
    model = LanguageModel.build(config.model, layout)
    trainer = Trainer.build(config, model)
    evaluator = None
    if config.data.eval:
        evaluator = LossEvaluator(config, model, open_loader(split="eval"))
    train_step = trainer.make_step()
    measure = _make_telemetry(config, model)

    with (
        Preemption() as preemption,
        Checkpointer(checkpoint_directory(workdir), config.checkpoint) as checkpointer,
    ):
        state, evaluated = _start(trainer, loader, checkpointer)
        step = int(state.step)
        save_config(workdir, config)
        report, stop = None, False
        # Whoever was stopped at this step did not wait for its evaluation.
        owed = evaluator is not None and not evaluated and _evaluates_at(step, config)
        # Closed on an error too: the last lines before it are what one looks for.
        with contextlib.closing(Reporter(workdir, config, layout, step, owed)) as reporter:

            def evaluate() -> LossReport | None:
                """None where a request to stop comes first."""
                assert evaluator is not None
                found = evaluator(state.params, lambda: preemption.requested(step))
                if found:
                    reporter.evaluation(step, found)
                return found

            if owed:
                with reporter.off_the_clock():
                    report = evaluate()
                stop = preemption.requested(step)
                owed = stop and report is None
                if report:
                    checkpointer.add_eval_loss(step, report.loss)
            metrics: list[dict[str, jax.Array]] = []
            recorded, recording = range(*profile) if profile else range(0), False
            while step < config.steps and not stop:
                if step in recorded and not recording:
                    jax.profiler.start_trace(workdir / "profile")
                    recording = True
                batch = next(loader)
                state, measured = train_step(state, batch)
                metrics.append(measured)
                step += 1
                stop = preemption.requested(step)
                last = step == config.steps
                if recording and (step not in recorded or last or stop):
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()
                    recording = False
                owed = evaluator is not None and _evaluates_at(step, config)
                due_save = step % config.checkpoint.every == 0 or last
                # A report waits for its steps and checks them, so nothing unsound is saved.
                if step % config.log_every == 0 or owed or due_save or stop:
                    reporter.training(step, metrics, measure(state.params, batch))
                    metrics = []
                with reporter.off_the_clock():
                    found = None
                    if owed:
                        found = evaluate()
                        stop = preemption.requested(step)
                    report = found or report
                    owed = owed and stop and found is None
                    if due_save or stop:
                        checkpointer.save(
                            step,
                            state,
                            data_state=loader.get_state(),
                            config=config.to_dict(),
                            eval_loss=found.loss if found else None,
                        )
    return TrainResult(step, config.steps, report, step >= config.steps and not owed)


def parse_steps(text: str | None) -> tuple[int, int] | None:
    """`"10:15"` as (10, 15); None as None.

    Raises:
      ConfigError: anything else.
    """
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise ConfigError(f"--profile must be FIRST:LAST with FIRST < LAST; got {text!r}")
    return int(first), int(last)


def _evaluates_at(step: int, config: Config) -> bool:
    return step > 0 and (step % config.eval_every == 0 or step == config.steps)


def _start(
    trainer: Trainer, loader: BatchLoader, checkpointer: Checkpointer
) -> tuple[TrainState, bool]:
    """The state to go on from, and whether it has been evaluated.

    It is that of this run's newest checkpoint, else of `init_from`, else random.
    """
    config, model = trainer.config, trainer.model
    restored = checkpointer.restore_latest(trainer.abstract_state)
    if restored is not None:
        loader.set_state(restored.data_state)
        changes = config.changes_since(Config.from_dict(restored.config))
        for key, (was, now) in changes.items():
            logging.warning("changed since the checkpoint: %s was %r, is now %r", key, was, now)
        logging.info("resuming at step %d", restored.step)
        return restored.state, restored.eval_loss is not None
    params = None
    if config.checkpoint.init_from:
        source, params, _ = restore_params(config.checkpoint.init_from, model.abstract_params)
        logging.info("starting from step %d of %s", source, config.checkpoint.init_from)
    state, mesh = trainer.init_state(params), model.layout.mesh
    logging.info(
        "%s parameters on %d × %s, mesh %s",
        f"{model.num_params:,}",
        mesh.size,
        mesh.devices.flat[0].device_kind,
        dict(mesh.shape),
    )
    return state, False


def _make_telemetry(
    config: Config, model: LanguageModel
) -> Callable[[Any, Batch], dict[str, list[float]]]:
    """Measures the LUCID layers on one batch; a forward pass at log steps, no more.

    Returns a function to lists by layer: `off_diagonal`, the largest entry of `A` below
    its diagonal, and `value_gain`, the largest `‖y‖/‖v‖` of a head, at most 2.
    """
    lucid = [i for i, kind in enumerate(config.model.layer_kinds) if kind == "lucid"]

    @jax.jit
    def measure(params, batch):
        # One micro-batch: what is known to fit.
        micro = jax.tree.map(lambda x: x[0], micro_batches(batch, config.accumulation))
        _, measured = weighted_losses(config, model, params, micro, telemetry=True)
        return measured

    def telemetry(params, batch) -> dict[str, list[float]]:
        if not (config.telemetry and lucid):
            return {}
        measured = jax.device_get(measure(params, batch))
        return {name: [float(x[i]) for i in lucid] for name, x in measured.items()}

    return telemetry
