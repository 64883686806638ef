"""Shared parts of the benchmarks: correctness gates, timing, and a record of the machine."""

import argparse
import contextlib
import os
import pathlib
import platform
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np

import lucid_jax.runtime.environment

Name = TypeVar("Name", bound=Hashable)


class GateError(Exception):
    """A program gives wrong results, so its time means nothing."""


def require_gpus(parser: argparse.ArgumentParser, count: int = 1) -> None:
    """Ends the command with an error unless there are so many GPUs."""
    if jax.default_backend() != "gpu" or jax.device_count() < count:
        devices = f"{jax.device_count()} × {jax.default_backend()}"
        parser.error(f"needs {count} GPU{'s' if count > 1 else ''}; the devices are {devices}")


def forward_and_backward(op: Callable) -> Callable:
    """Returns a function of arguments and cotangent that gives the output and all gradients."""

    def run(*arrays):
        *arguments, cotangent = arrays
        out, pull_back = jax.vjp(op, *arguments)
        return out, pull_back(cotangent)

    return run


def judge(name: str, found: Mapping, exact: Mapping, tolerance: float) -> float:
    """Returns the largest relative error of the arrays, or raises GateError if it is too large."""
    errors = []
    for key, ref in exact.items():
        difference = np.asarray(found[key], np.float64) - ref
        errors.append(error := float(np.linalg.norm(difference) / np.linalg.norm(ref)))
        if not error <= tolerance:  # A NaN fails this comparison too.
            raise GateError(
                f"{name}: {key} has relative error {error:.1e}, expected at most {tolerance:.0e}"
            )
    return max(errors)


def interleaved(
    runs: Mapping[Name, Callable[[], object]], seconds: float, fewest: int = 5, most: int = 40
) -> dict[Name, list[float]]:
    """Times every program once a round, until the seconds have passed.

    Each round has a new random order: at its power limit a device is up to a tenth slower after
    some programs than after others.
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


def temp_bytes(program: jax.stages.Compiled) -> int:
    """Returns the peak memory of a program beyond its arguments and results."""
    analysis = program.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def provenance(flags: argparse.Namespace, packages: Sequence[str] = ()) -> dict[str, object]:
    """Returns a command and its environment, to be saved with results."""
    return {"command": flags.command, "environment": environment(packages)}


def environment(packages: Sequence[str] = ()) -> dict[str, object]:
    """Returns device, date, versions (also of `packages`), and how busy the machine is now."""
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
