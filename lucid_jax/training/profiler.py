"""Recording of some training steps with the JAX profiler."""

import pathlib
from typing import Any

import jax
from absl import logging

from lucid_jax.config import ConfigError


def parse_steps(text: str | None) -> range:
    """Returns `"10:15"` as range(10, 15), None as an empty range; else raises ConfigError."""
    if text is None:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise ConfigError(f"--profile must be FIRST:LAST with FIRST < LAST; got {text!r}")
    return range(int(first), int(last))


class StepProfiler:
    """Records those of `steps` that the run makes, into `directory`."""

    def __init__(self, directory: pathlib.Path, steps: range):
        self._directory, self._steps = directory, steps
        self._recording = False

    def check(self, made: range) -> None:
        """Warns of steps to record that are not among those that the run makes."""
        missed = [step for step in self._steps if step not in made]
        if missed:
            logging.warning(
                "--profile=%d:%d: the run makes steps %d to %d, so %s of these %d steps can be"
                " recorded",
                self._steps.start, self._steps.stop, made.start, made.stop,
                len(self._steps) - len(missed) or "none", len(self._steps),
            )  # fmt: skip

    def before_step(self, step: int) -> None:
        """Starts to record if `step` is to be recorded."""
        if step in self._steps and not self._recording:
            jax.profiler.start_trace(self._directory)
            self._recording = True

    def after_step(self, step: int, results: Any, last: bool) -> None:
        """Stops recording unless `step` is to be recorded too; waits for `results` first."""
        if self._recording and (last or step not in self._steps):
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            self._recording = False
