"""The parameters of a checkpoint in the model of a configuration, apart from training."""

from __future__ import annotations

import os
import pathlib
from typing import Any, NamedTuple

from absl import logging

from lucid_jax.checkpoint.manager import checkpoint_directory, restore_params
from lucid_jax.config import Config, ConfigError
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.runtime.workdir import local_directory

# What parameters do not depend on, and their function only in its rounding.
_FREE = ("model.implementation", "model.remat", "model.compute_dtype", "model.init_std")


class RestoredModel(NamedTuple):
    """Where parameters come from, and they.

    Attributes:
      path: The work directory, or the directory of a step.
      step: Of training.
      params: Sharded as the layout says.
    """

    path: pathlib.Path
    step: int
    params: Any


def restore_model(
    config: Config, model: LanguageModel, workdir: str | os.PathLike, which: str
) -> RestoredModel:
    """Restores parameters to evaluate or generate with.

    Args:
      config: The run.
      model: Its model, on the mesh that gets the parameters.
      workdir: The run's directory.
      which: `"latest"`, `"best"` (lowest evaluation loss), or a step's directory, whose
        parameters are taken into the model of `config` even if they come from another.

    Raises:
      ConfigError: a configuration that does not fit, or of another model than the run in
        `workdir`.
      CheckpointError: no sound checkpoint.
    """
    of_this_run = which in ("latest", "best")
    path = local_directory(workdir) if of_this_run else pathlib.Path(which)
    step, params, saved = restore_params(
        path if of_this_run else which, model.abstract_params, best=which == "best"
    )
    if changes := _describe_changes(config, Config.from_dict(saved)):
        if of_this_run:
            raise ConfigError(
                f"{path} holds another model: {changes}; to evaluate its parameters in this"
                f" one, or generate with them, give"
                f" --checkpoint={checkpoint_directory(path) / str(step)}"
            )
        logging.warning("%s is of another model: %s", which, changes)
    return RestoredModel(path, step, params)


def _describe_changes(config: Config, saved: Config) -> str:
    return ", ".join(
        f"{key} was {was!r}, is now {now!r}"
        for key, (was, now) in config.changes_since(saved).items()
        if key.startswith("model.") and key not in _FREE
    )
