"""Restores parameters alone: to evaluate, to generate with, to convert, to start from."""

import os
import pathlib
from typing import Any, NamedTuple

import jax
from absl import logging
from etils import epath

from lucid_jax.checkpoint.manager import checkpoint_directory
from lucid_jax.checkpoint.reader import (
    PARAMS,
    STATE,
    CheckpointError,
    absolute_path,
    eval_losses,
    is_parameters_alone,
    read_checkpoint,
    read_first_sound,
    read_record,
    step_paths,
)
from lucid_jax.checkpoint.record import named_leaves
from lucid_jax.checkpoint.retention import hide_orbax_chatter
from lucid_jax.config import Config, ConfigError
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.runtime.workdir import local_directory

# Fields that change neither the parameters nor, but for rounding, what the model computes.
_FREE = ("model.implementation", "model.remat", "model.compute_dtype", "model.init_std")


class RestoredModel(NamedTuple):
    """Parameters after `step` training steps, from the work or step directory `path`."""

    path: pathlib.Path
    step: int
    params: Any


def restore_model(
    config: Config, model: LanguageModel, workdir: str | os.PathLike, which: str
) -> RestoredModel:
    """Restores the parameters of a run's checkpoint, on the mesh of the run's model.

    Args:
      which: `"latest"`, `"best"` (lowest evaluation loss), the number of a step, or a step
        directory, which may be of a run with another configuration as long as the arrays fit.

    Raises:
      ConfigError: the arrays do not fit, or the run in `workdir` has another model.
      CheckpointError: there is no sound checkpoint.
    """
    of_this_run = which in ("latest", "best") or which.isdecimal()
    path = local_directory(workdir) if of_this_run else pathlib.Path(which)
    # A step directory may be in a bucket, whose URL pathlib would change.
    source = _step_directory(path, which) if which.isdecimal() else path if of_this_run else which
    step, params, saved = restore_params(source, model.abstract_params, best=which == "best")
    if changes := _describe_changes(config, Config.from_dict(saved)):
        if of_this_run:
            raise ConfigError(
                f"{path} holds another model: {changes}; to use its parameters in this one"
                f" nevertheless, give --checkpoint={checkpoint_directory(path) / str(step)}"
            )
        logging.warning("%s is of another model: %s", which, changes)
    return RestoredModel(path, step, params)


def check_same_model(config: Config, workdir: str | os.PathLike, tokenizer: str) -> None:
    """Checks that the parameters of the run in `workdir`, if any, mean the same in `config`.

    Reads records alone, so that the message names keys instead of arrays.

    Args:
      tokenizer: The fingerprint of the tokenizer, which the data state also holds.

    Raises:
      ConfigError: the run has another model or another tokenizer.
    """
    paths = step_paths(absolute_path(checkpoint_directory(workdir)))
    if not paths:
        return
    record, _ = read_first_sound(paths, read_record)
    if is_parameters_alone(record.arrays):
        return  # They are no run; restoring them as one raises.
    saved = Config.from_dict(record.config)
    changes = _describe_changes(config, saved)
    # States of earlier versions may lack it.
    if any(x.get("data.tokenizer", tokenizer) != tokenizer for x in record.data_state.values()):
        changes = (
            f"data.tokenizer was {saved.data.tokenizer!r}, is now {config.data.tokenizer!r}, of"
            " other content"
        )
    if changes:
        raise ConfigError(
            f"{workdir} holds a run of another model: {changes}; give another --workdir, or"
            " --overwrite to remove that run"
        )


def _step_directory(workdir: pathlib.Path, step: str) -> epath.Path:
    paths = {int(path.name): path for path in step_paths(checkpoint_directory(workdir))}
    if int(step) not in paths:
        found = ", ".join(map(str, sorted(paths))) or "none"
        raise CheckpointError(f"no checkpoint of step {step} in {workdir}; its steps: {found}")
    return paths[int(step)]


def restore_params(
    path: str | os.PathLike, abstract_params: Any, *, best: bool = False
) -> tuple[int, Any, dict]:
    """Restores only the `params` of a saved state; writes nothing.

    Args:
      path: A work directory or a directory of a `Checkpointer`, whose newest sound checkpoint
        is restored, or a step directory.
      abstract_params: Pytree of jax.ShapeDtypeStruct. An array without a sharding is restored
        to the default device.
      best: Restores the sound checkpoint of lowest evaluation loss instead.

    Returns:
      The step, the parameters, and the configuration that they were saved with.

    Raises:
      ConfigError: the checkpoint holds other parameters, shapes or dtypes.
      CheckpointError: there is no checkpoint, or with `best` none that was evaluated, or all
        are damaged.
    """
    hide_orbax_chatter()
    abstract = named_leaves({"params": abstract_params})
    (record, arrays), _ = read_first_sound(
        _candidates(path, best), lambda path: read_checkpoint(path, abstract, PARAMS)
    )
    params = jax.tree.unflatten(jax.tree.structure(abstract_params), arrays.values())
    return record.step, params, record.config


def saved_config(path: str | os.PathLike) -> dict:
    """Returns the configuration in the newest checkpoint of `path` whose record is sound.

    Raises:
      CheckpointError: there is no checkpoint, or the records of all are damaged.
    """
    record, _ = read_first_sound(_candidates(path), read_record)
    return record.config


def _candidates(path: str | os.PathLike, best: bool = False) -> list[epath.Path]:
    """Returns the step directories that `path` means, in the order to try; never empty."""
    directory = absolute_path(path)
    if checkpoint_directory(directory).exists():
        directory = checkpoint_directory(directory)
    paths = [directory] if (directory / STATE).exists() else step_paths(directory)
    if best:
        losses = eval_losses(paths)
        paths = sorted(losses, key=losses.__getitem__)
    if not paths:
        raise CheckpointError(
            f"no checkpoint{' with an evaluation loss' if best else ''} in {directory}"
        )
    return paths


def _describe_changes(config: Config, saved: Config) -> str:
    return ", ".join(
        f"{key} was {was!r}, is now {now!r}"
        for key, (was, now) in config.changes_since(saved).items()
        if key.startswith("model.") and key not in _FREE
    )
