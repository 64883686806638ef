"""Sweeps: several trials of one configuration, resumable, and a table of what came out."""

from __future__ import annotations

import copy
import math
import os
import pathlib
import runpy
from collections.abc import Mapping
from typing import Any

from absl import logging

from lucid_jax.checkpoint import checkpoint_directory
from lucid_jax.config import Config, ConfigError
from lucid_jax.data import check_data, load_tokenizer
from lucid_jax.metrics.reporter import NonFiniteError
from lucid_jax.metrics.writer import read_metrics
from lucid_jax.sharding import make_layout
from lucid_jax.train import train

Trial = Mapping[str, Any]


def run_sweep(
    values: dict[str, Any], path: str | None, workdir: str | os.PathLike, trial: int | None
) -> str:
    """Runs the trials that have not finished, each in `workdir/NN`.

    Args:
      values: The configuration that every trial starts from.
      path: A Python file whose `get_trials()` lists mappings from dotted keys to values.
      workdir: Of the sweep. A killed sweep goes on when it is run again.
      trial: Run only this one, numbered from 0; None runs all in turn.

    Returns:
      A table of all trials, best evaluation loss first.

    Raises:
      ConfigError: no such file or trial, or a trial that cannot run; all are checked
        before the first one starts.
    """
    trials = _load(path)
    configs = [Config.from_dict(_override(values, overrides)) for overrides in trials]
    if trial is not None and not 0 <= trial < len(trials):
        raise ConfigError(f"--trial={trial} is not one of the {len(trials)} trials, 0 to"
                          f" {len(trials) - 1}")  # fmt: skip
    for config in configs:
        make_layout(config)
        check_data(config, load_tokenizer(config.data.tokenizer))
    directories = [pathlib.Path(workdir) / f"{i:02d}" for i in range(len(trials))]
    for i, overrides in enumerate(trials):
        logging.info("trial %d: %s", i, _describe(overrides))
    for i in range(len(trials)) if trial is None else (trial,):
        if _result(directories[i], configs[i])[0] == "finished":
            logging.info("trial %d has finished already", i)
            continue
        logging.info("trial %d starts: %s", i, _describe(trials[i]))
        try:
            if not train(configs[i], directories[i]).finished:
                logging.info("stopped; the same command goes on from here")
                break
        except NonFiniteError as error:
            # One diverged trial is a result; the others still run.
            logging.error("trial %d: %s", i, error)
    return _table(trials, configs, directories)


def _load(path: str | None) -> list[Trial]:
    if not path:
        raise ConfigError("--mode=sweep needs --sweep=FILE")
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"no sweep file {path}")
    trials = list(runpy.run_path(path)["get_trials"]())
    if not trials:
        raise ConfigError(f"{path} lists no trials")
    return trials


def _override(values: dict[str, Any], overrides: Trial) -> dict[str, Any]:
    changed = copy.deepcopy(values)
    for key, value in overrides.items():
        *sections, field = key.split(".")
        target = changed
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"unknown config key {key}: {section} has none below it")
        target[field] = value
    return changed


def _describe(overrides: Trial) -> str:
    return ", ".join(f"{key}={value}" for key, value in overrides.items())


def _result(directory: pathlib.Path, config: Config) -> tuple[str, int, float]:
    """Status, last step, and evaluation loss (the last training loss where there is none)."""
    lines = read_metrics(directory)
    if not lines:
        return "not started", 0, math.inf
    losses = [x["eval_loss"] for x in lines if "eval_loss" in x]
    losses = losses or [x["loss"] for x in lines if "loss" in x]
    # A run that diverges may have logged "nan" or "inf".
    loss = float(losses[-1])
    # The last metrics are written before the last evaluation and the last save.
    finished = (checkpoint_directory(directory) / str(config.steps)).exists()
    return (
        "finished" if finished else "unfinished",
        lines[-1]["step"],
        loss if math.isfinite(loss) else math.inf,
    )


def _table(trials: list[Trial], configs: list[Config], directories: list[pathlib.Path]) -> str:
    results = [_result(*pair) for pair in zip(directories, configs)]
    order = sorted(range(len(trials)), key=lambda i: results[i][2])
    rows = [f"{'trial':>5}  {'loss':>8}  {'step':>8}  {'status':<11}  overrides"]
    for i in order:
        status, step, loss = results[i]
        rows.append(f"{i:>5}  {loss:>8.4f}  {step:>8}  {status:<11}  {_describe(trials[i])}")
    return "\n".join(rows)
