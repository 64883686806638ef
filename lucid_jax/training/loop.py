"""The training loop: build, restore or initialise, then step, log, evaluate and save."""

import contextlib
import dataclasses
import functools
import os
import time
from typing import Any

import jax
from absl import logging

from lucid_jax.checkpoint.manager import Checkpointer, Restored, checkpoint_directory
from lucid_jax.checkpoint.restore import check_same_model, restore_params
from lucid_jax.config import Config
from lucid_jax.data import BatchLoader, check_data, load_tokenizer, log_data
from lucid_jax.data.tokenizer import fingerprint
from lucid_jax.evaluate.loss import LossEvaluator, LossReport
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.ops.implementations import Implementations, recorded
from lucid_jax.parallel.mesh import make_layout
from lucid_jax.runtime.distributed import on_process_0
from lucid_jax.runtime.lock import locked
from lucid_jax.runtime.peers import leave_if_a_peer_is_gone
from lucid_jax.runtime.preemption import Preemption
from lucid_jax.runtime.progress import format_duration
from lucid_jax.runtime.workdir import local_directory, remove_run, save_config
from lucid_jax.training.profiler import StepProfiler
from lucid_jax.training.reporter import Reporter
from lucid_jax.training.step import Trainer, TrainState


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The end of a run.

    Attributes:
      step: Steps done, of `steps`.
      report: The last evaluation made, None if there was none.
      finished: False if a request to stop left steps or the last evaluation undone.
    """

    step: int
    steps: int
    report: LossReport | None
    finished: bool

    def summary(self, workdir: str | os.PathLike, command: str) -> str:
        """Returns lines for a terminal, with what to run after `command`, which made the run."""
        state = "finished" if self.finished else "stopped"
        lines = [f"{state} at step {self.step} of {self.steps}; files are in {workdir}/"]
        if report := self.report:
            unigram = f"(best unigram model {report.unigram_loss:.4f})"
            lines.append(f"evaluation loss {report.loss:.4f} {unigram}")
        lines.append(f"evaluate: {command} --mode=eval")
        if self.finished:
            lines.append(f"resume and extend: {command} --config.steps={2 * self.steps}")
        else:
            lines.append(f"resume: {command}")
        return "\n".join(lines)


def train(
    config: Config,
    workdir: str | os.PathLike,
    *,
    profile: range = range(0),
    overwrite: bool = False,
) -> TrainResult:
    """Trains until `config.steps`, from the newest checkpoint of `workdir` if there is one.

    A request to stop saves at once and cuts an evaluation short. The evaluation is not made up
    for, except after the last step, when the run is resumed.

    Args:
      workdir: Gets `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/` and
        `loss.png`.
      profile: Steps to record with the JAX profiler, into `workdir/profile`.
      overwrite: Removes the run in `workdir` first, once everything else is checked.

    Raises:
      ConfigError: the configuration or the data cannot be used, another run uses `workdir`, or
        the run in it trains another model.
      NonFiniteError: the loss or the gradient norm was not finite.
    """
    # 1. Build. Every mistake in the configuration or the data raises here, before compilation.
    workdir = local_directory(workdir)
    layout = make_layout(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    mixtures = check_data(config, tokenizer)
    on_process_0(lambda: log_data(config.data, tokenizer, mixtures))
    open_loader = functools.partial(
        BatchLoader, config, tokenizer, layout.sharding("batch", "sequence"),
        stripes=layout.stripes(config.data.sequence_length),
    )  # fmt: skip
    loader = open_loader(split="train")
    model = LanguageModel.build(config.model, layout)
    trainer = Trainer.build(config, model)
    train_step = trainer.make_step()
    traced, implementations = _trace(trainer, train_step)
    profiler = StepProfiler(workdir / "profile", profile)
    eval_loader = open_loader(split="eval") if config.data.eval else None
    evaluator = LossEvaluator(config, model, eval_loader) if eval_loader else None

    with contextlib.ExitStack() as stack:
        for opened in filter(None, (loader, eval_loader)):
            stack.callback(opened.log_skipped)
        preemption = stack.enter_context(Preemption())
        stack.enter_context(locked(workdir))
        initial = None
        if overwrite:
            # Parameters that cannot be read must not cost the run.
            initial = _initial_params(trainer)
            on_process_0(lambda: remove_run(workdir, config.checkpoint.init_from))
        check_same_model(config, workdir, fingerprint(config.data.tokenizer))
        checkpointer = stack.enter_context(
            Checkpointer(checkpoint_directory(workdir), config.checkpoint)
        )

        # 2. Restore or initialise.
        restored = checkpointer.restore_latest(trainer.abstract_state)
        state = _start(trainer, loader, restored, initial)
        start = step = int(state.step)
        save_config(workdir, config)
        # Closed on an error too, so that the lines before it are written out.
        reporter = stack.enter_context(contextlib.closing(Reporter(workdir, config, layout, step)))
        stack.enter_context(leave_if_a_peer_is_gone())

        def evaluate() -> LossReport | None:
            """Evaluates and reports; returns None if a stop is requested meanwhile."""
            assert evaluator is not None
            report = evaluator(state.params, lambda: preemption.requested(step))
            if report:
                reporter.evaluation(step, report)
            return report

        # 3. Step, log, evaluate, save.
        profiler.check(range(step, config.steps))
        report: LossReport | None = None
        evaluated = restored is not None and restored.eval_loss is not None
        # The signal may have come while data or parameters were read.
        stop = preemption.requested(step)
        metrics: list[dict[str, jax.Array]] = []
        while step < config.steps and not stop:
            profiler.before_step(step)
            batch = next(loader)
            if step == start:
                with reporter.off_the_clock():
                    _compile(traced, implementations)
            state, step_metrics = train_step(state, batch)
            metrics.append(step_metrics)
            step += 1
            stop = preemption.requested(step)
            last = step == config.steps
            profiler.after_step(step, state, last or stop)
            evaluates = evaluator is not None and (last or step % config.eval_every == 0)
            saves = last or step % config.checkpoint.every == 0
            # This waits for the steps and checks them, so that nothing unsound is saved.
            if step % config.log_every == 0 or evaluates or saves or stop:
                reporter.training(step, metrics)
                metrics = []
            with reporter.off_the_clock():
                evaluation = evaluate() if evaluates else None
                report, evaluated = evaluation or report, evaluation is not None
                stop = stop or (evaluates and preemption.requested(step))
                if saves or stop:
                    checkpointer.save(
                        step,
                        state,
                        data_state=loader.get_state(),
                        config=config.to_dict(),
                        eval_loss=evaluation.loss if evaluation else None,
                    )

        # 4. Make the last evaluation if an earlier process was stopped in it.
        if evaluator and step == config.steps and not (evaluated or stop):
            report = evaluate()
            evaluated, stop = report is not None, preemption.requested(step)
    cut_off = evaluator is not None and stop and not evaluated
    return TrainResult(step, config.steps, report, step >= config.steps and not cut_off)


def _trace(
    trainer: Trainer, train_step: jax.stages.Wrapped
) -> tuple[jax.stages.Traced, Implementations]:
    """Traces the step, which raises if the implementation that is asked for cannot run."""
    with recorded() as found:
        return train_step.trace(trainer.abstract_state, trainer.abstract_batch), found


def _compile(traced: jax.stages.Traced, implementations: Implementations) -> None:
    """Compiles the step for the calls that follow, and warns of each slow op."""
    logging.info("%s", implementations)
    for fallback in implementations.fallbacks:
        logging.warning(fallback)
    logging.info("compiling the training step; a large model takes minutes")
    begin = time.perf_counter()
    traced.lower().compile()
    logging.info("compiled in %s", format_duration(time.perf_counter() - begin))


def _initial_params(trainer: Trainer) -> Any:
    """Returns the parameters of `init_from`, or None."""
    source = trainer.config.checkpoint.init_from
    if not source:
        return None
    step, params, _ = restore_params(source, trainer.model.abstract_params)
    logging.info("starting from step %d of %s", step, source)
    return params


def _start(
    trainer: Trainer, loader: BatchLoader, restored: Restored | None, initial: Any
) -> TrainState:
    """Returns the restored state, or that of step 0 with `initial`, `init_from` or random ones."""
    config, model = trainer.config, trainer.model
    if restored:
        loader.set_state(restored.data_state)
        changes = config.changes_since(Config.from_dict(restored.config))
        for key, (was, now) in changes.items():
            logging.warning("changed since the checkpoint: %s was %r, is now %r", key, was, now)
        logging.info("resuming at step %d", restored.step)
        return restored.state
    params = initial if initial is not None else _initial_params(trainer)
    mesh = model.layout.mesh
    logging.info(
        "%s parameters on %d × %s, mesh %s",
        f"{model.num_params:,}", mesh.size, mesh.devices.flat[0].device_kind,
        ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
    )  # fmt: skip
    return trainer.init_state(params)
