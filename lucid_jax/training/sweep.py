"""Sweeps: resumable trials of one configuration, and a table of their results."""

import copy
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging

from lucid_jax.checkpoint.manager import checkpoint_directory
from lucid_jax.config import Config, ConfigError
from lucid_jax.data import check_data, load_tokenizer
from lucid_jax.parallel.mesh import make_layout
from lucid_jax.runtime.preemption import Stopped
from lucid_jax.runtime.user_file import call_in_file
from lucid_jax.runtime.workdir import local_directory, read_config, read_json, write_json
from lucid_jax.training.loop import train
from lucid_jax.training.reporter import NonFiniteError
from lucid_jax.training.writer import read_metrics

Trial = Mapping[str, Any]

_DIVERGED_FILE = "diverged.json"


def run_sweep(
    values: dict[str, Any], path: str | None, workdir: str | os.PathLike, trial: int | None
) -> str:
    """Runs the trials that have neither finished nor diverged, each in `workdir/NN`.

    A diverged trial would diverge again, so it runs again only if `trial` names it.

    Args:
      values: The configuration that every trial starts from.
      path: A Python file whose `get_trials()` lists mappings from dotted keys to values.
      workdir: The sweep's directory. A killed sweep resumes when it is run again.
      trial: The only trial to run, numbered from 0; None runs all in turn.

    Returns:
      A table of all trials, lowest evaluation loss first, which `workdir/table.txt` has too.

    Raises:
      ConfigError: the file or the trial does not exist, a trial cannot run, or its directory
        holds another one; all are checked before the first one starts.
      Stopped: a trial was asked to stop; the message is the table.
    """
    workdir = local_directory(workdir)
    trials = _load(path)
    configs = [Config.from_dict(_override(values, overrides)) for overrides in trials]
    directories = [workdir / f"{i:02d}" for i in range(len(trials))]
    if trial is not None and not 0 <= trial < len(trials):
        raise ConfigError(f"--trial={trial} is not one of the {len(trials)} trials, 0 to"
                          f" {len(trials) - 1}")  # fmt: skip
    for i, (config, directory) in enumerate(zip(configs, directories)):
        make_layout(config)
        check_data(config, load_tokenizer(config.data.tokenizer))
        _check_same_trial(i, config, directory)
    for i, overrides in enumerate(trials):
        logging.info("trial %d: %s", i, _describe(overrides))
    for i in range(len(trials)) if trial is None else (trial,):
        status, step, _ = _result(directories[i], configs[i])
        if status == "finished":
            logging.info("trial %d has finished already", i)
            continue
        if status == "diverged" and trial is None:
            logging.info("trial %d diverged at step %d; --trial=%d tries it again", i, step, i)
            continue
        logging.info("trial %d starts: %s", i, _describe(trials[i]))
        (directories[i] / _DIVERGED_FILE).unlink(missing_ok=True)
        try:
            if not train(configs[i], directories[i]).finished:
                logging.info("stopped; the same command resumes the sweep")
                raise Stopped(_table(trials, configs, directories))
        except NonFiniteError as error:
            # A diverged trial is a result; the other trials still run.
            logging.error("trial %d: %s", i, error)
            _note_divergence(directories[i], error.step)
    table = _table(trials, configs, directories)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "table.txt").write_text(f"{table}\n", encoding="utf-8")
    return table


def _load(path: str | None) -> list[Trial]:
    if not path:
        raise ConfigError("--mode=sweep needs --sweep=FILE")
    try:
        trials = call_in_file(path, "get_trials")
    except ConfigError as error:
        raise ConfigError(f"--sweep: {error}") from error
    if not isinstance(trials, Sequence) or not all(isinstance(x, Mapping) for x in trials):
        raise ConfigError(f"{path}: get_trials() must return a list of mappings; got {trials!r}")
    if not trials:
        raise ConfigError(f"{path} lists no trials")
    return list(trials)


def _override(values: dict[str, Any], overrides: Trial) -> dict[str, Any]:
    changed = copy.deepcopy(values)
    for key, value in overrides.items():
        *sections, field = key.split(".")
        target = changed
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"unknown config key {key}: {section} is not a section")
        target[field] = value
    return changed


def _describe(overrides: Trial) -> str:
    return ", ".join(f"{key}={value}" for key, value in overrides.items())


def _check_same_trial(number: int, config: Config, directory: pathlib.Path) -> None:
    """Raises ConfigError if `directory` holds results of another configuration."""
    earlier = read_config(directory)
    changes = config.changes_since(earlier) if earlier else {}
    for key, (was, now) in changes.items():
        raise ConfigError(
            f"trial {number} was trained with {key}={was!r} in {directory}, and has"
            f" {key}={now!r} now: give the sweep another --workdir, or move that directory away"
        )


def _note_divergence(directory: pathlib.Path, step: int) -> None:
    if jax.process_index() == 0:
        write_json(directory / _DIVERGED_FILE, {"step": step})


def _result(directory: pathlib.Path, config: Config) -> tuple[str, int, float]:
    """Returns status, last step and evaluation loss (training loss if never evaluated)."""
    if values := read_json(directory / _DIVERGED_FILE):
        return "diverged", values["step"], math.inf
    lines = read_metrics(directory)
    if not lines:
        return "not started", 0, math.inf
    losses = [x["eval_loss"] for x in lines if "eval_loss" in x]
    losses = losses or [x["loss"] for x in lines if "loss" in x]
    # The metrics of a diverging run may hold "nan" or "inf".
    loss = float(losses[-1])
    # Metrics are written before the checkpoint of their step, and a run that is stopped after
    # its last step may save without the last evaluation: both must be there.
    finished = (checkpoint_directory(directory) / str(config.steps)).exists() and (
        not config.data.eval or "eval_loss" in lines[-1]
    )
    return (
        "finished" if finished else "unfinished",
        lines[-1]["step"],
        loss if math.isfinite(loss) else math.inf,
    )


def _table(trials: list[Trial], configs: list[Config], directories: list[pathlib.Path]) -> str:
    results = [_result(directory, config) for directory, config in zip(directories, configs)]
    order = sorted(range(len(trials)), key=lambda i: results[i][2])
    lines = [f"{'trial':>5}  {'loss':>8}  {'step':>8}  {'status':<11}  overrides"]
    for i in order:
        status, step, loss = results[i]
        lines.append(f"{i:>5}  {loss:>8.4f}  {step:>8}  {status:<11}  {_describe(trials[i])}")
    return "\n".join(lines)
