"""Reports of a run: lines in the terminal, and the same numbers in its files."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import logging

from lucid_jax.config import Config
from lucid_jax.evaluate.loss import LossReport
from lucid_jax.ops.precondition.diagnostics import Diagnostics
from lucid_jax.parallel.mesh import Layout
from lucid_jax.runtime.progress import format_duration
from lucid_jax.training.flops import model_flops, peak_flops
from lucid_jax.training.plot import plot_loss
from lucid_jax.training.writer import MetricsWriter

# Columns of a log line, at most.
_WIDTH = 100


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm of `step` was NaN or infinite."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


class Reporter:
    """Logs training and evaluations; process 0 also writes them to files."""

    def __init__(self, workdir: str | os.PathLike, config: Config, layout: Layout, start: int):
        """Opens the files of a run that starts or resumes at step `start`."""
        self._config, self._workdir = config, workdir
        self._writer = None
        if jax.process_index() == 0:
            self._writer = MetricsWriter(workdir, resume_step=start)
        self._batch_tokens = config.batch_size * config.data.sequence_length
        self._peak_flops = layout.mesh.size * peak_flops(layout.mesh.devices.flat[0])
        self._reported, self._since = start, time.perf_counter()

    def training(self, step: int, metrics: Sequence[dict[str, jax.Array]]) -> None:
        """Waits for the steps since the last report, up to `step`, and reports them.

        `metrics` are those of each step, in order. Reports the largest telemetry values.

        Raises:
          NonFiniteError: the loss or the gradient norm of a step was not finite.
        """
        values = [
            {k: np.asarray(v).tolist() for k, v in m.items()} for m in jax.device_get(list(metrics))
        ]
        self._check_finite(values)
        seconds = time.perf_counter() - self._since
        tokens, pairs = (sum(m[name] for m in values) for name in ("tokens", "pairs"))
        flops = model_flops(self._config.model, tokens, pairs)
        telemetry = {
            name: np.max([m[name] for m in values], 0).tolist()
            for name in Diagnostics._fields
            if name in values[0]
        }
        padding = 1 - tokens / (len(values) * self._batch_tokens)
        line = {
            "loss": float(np.mean([m["loss"] for m in values])),
            "grad_norm": values[-1]["grad_norm"],
            "learning_rate": values[-1]["learning_rate"],
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / self._peak_flops,
            "padding": padding,
            "seconds_left": (self._config.steps - step) * seconds / len(values),
        }
        fields = [
            f"step {step}/{self._config.steps}",
            f"loss {line['loss']:.4f}",
            f"grad {line['grad_norm']:.3f}",
            f"lr {line['learning_rate']:.2e}",
            f"{line['tokens_per_second']:,.0f} tok/s",
            f"MFU {line['mfu']:.1%}",
            f"{format_duration(line['seconds_left'])} left",
            *([f"padding {padding:.1%}"] if padding else []),
            *(f"{name} {max(value):.3f}" for name, value in telemetry.items()),
        ]
        logging.info("%s", _join(fields))
        if self._writer:
            self._writer.write(step, {**line, **telemetry})
        self._reported, self._since = step, time.perf_counter()

    def evaluation(self, step: int, report: LossReport) -> None:
        """Reports the evaluation at `step`."""
        logging.info("step %d  evaluation\n%s", step, report.table())
        if self._writer:
            values = {
                "eval_loss": report.loss,
                "eval_perplexity": report.perplexity,
                "eval_unigram_loss": report.unigram_loss,
            }
            self._writer.write(step, values)
            plot_loss(self._workdir)

    @contextlib.contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Keeps the time of its block out of the throughput."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def close(self) -> None:
        """Closes the files and draws the loss curve."""
        if self._writer:
            self._writer.close()
            plot_loss(self._workdir)

    def _check_finite(self, values: Sequence[dict[str, float]]) -> None:
        for i, line in enumerate(values):
            if line["finite"]:
                continue
            step, before = self._reported + 1 + i, ""
            if i:
                before = (
                    f"; the step before: loss {values[i - 1]['loss']:.4f}, gradient norm"
                    f" {values[i - 1]['grad_norm']:.4f}"
                )
            raise NonFiniteError(
                step,
                f"step {step}: loss {line['loss']}, gradient norm {line['grad_norm']}, learning"
                f" rate {line['learning_rate']:.3e}{before}; the update was not applied and"
                " nothing was saved since",
            )


def _join(fields: Sequence[str]) -> str:
    """Joins fields by two spaces; breaks lines between fields where a terminal would elsewhere."""
    lines = [fields[0]]
    for field in fields[1:]:
        if len(lines[-1]) + 2 + len(field) > _WIDTH:
            lines.append("")
        lines[-1] += f"  {field}"
    return "\n".join(lines)
