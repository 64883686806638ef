"""What benchmarks share: the verdict of a gate, the clock, and where they ran."""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np

import lucid_jax.runtime.environment

Name = TypeVar("Name", bound=Hashable)


class GateError(Exception):
    """A program is wrong, so its time means nothing."""


def forward_and_backward(op: Callable) -> Callable:
    """The output of `op` and the gradients of all its arguments."""

    def run(arguments, cotangent):
        out, pull_back = jax.vjp(op, *arguments)
        return out, pull_back(cotangent)

    return run


def judge(name: str, found: Mapping, exact: Mapping, tolerance: float) -> float:
    """The largest `‖found − exact‖/‖exact‖`, which must not exceed the tolerance."""
    errors = {
        key: float(np.linalg.norm(np.asarray(found[key], np.float64) - ref) / np.linalg.norm(ref))
        for key, ref in exact.items()
    }
    for key, error in errors.items():
        if not error <= tolerance:  # NaN fails too.
            raise GateError(
                f"{name}: {key} has relative error {error:.1e}, expected at most {tolerance:.0e};"
                " nothing was timed at this length"
            )
    return max(errors.values())


def interleaved(
    runs: Mapping[Name, Callable[[], object]], seconds: float, fewest: int = 5, most: int = 40
) -> dict[Name, list[float]]:
    """Times each run once a round, round after round, so that all share the machine's moods.

    In an order drawn anew each time: at the limit of its power a device is slower after some
    programs than after others, by up to a tenth.

    Args:
      runs: What to time; each blocks until it is done.
      seconds: Rounds go on until these have passed.
      fewest: Rounds at least.
      most: Rounds at most.
    """
    for run in runs.values():
        run()
    times: dict[Name, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    end = time.perf_counter() + seconds
    for count in range(most):
        if count >= fewest and time.perf_counter() > end:
            break
        for name, run in order.sample(list(runs.items()), len(runs)):
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def summary(times: Sequence[float]) -> dict[str, float | int]:
    """Median, minimum and quartiles, in seconds."""
    first, median, third = statistics.quantiles(times, n=4, method="inclusive")
    return {
        "median_s": median,
        "min_s": min(times),
        "quartile_1_s": first,
        "quartile_3_s": third,
        "repeats": len(times),
    }


def temp_bytes(program: jax.stages.Compiled) -> int:
    """Peak of what a program allocates beside its arguments and results."""
    analysis = program.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def environment(packages: Sequence[str] = ()) -> dict[str, object]:
    """Device, versions, date, and how busy the machine was before the run.

    Args:
      packages: Whose versions are told beside those of jax and numpy.
    """
    return {
        **lucid_jax.runtime.environment.environment(packages),
        "cpu_model": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
