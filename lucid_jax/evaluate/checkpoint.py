"""Evaluation of a checkpoint, apart from training: restoring it, and its loss."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
from absl import logging

from lucid_jax.checkpoint import checkpoint_directory, restore_params
from lucid_jax.checkpoint_checksum import checksums
from lucid_jax.config import Config, ConfigError
from lucid_jax.data import BatchLoader, check_data, load_tokenizer
from lucid_jax.evaluate.loss import LossEvaluator
from lucid_jax.model import abstract_model
from lucid_jax.sharding import Layout, make_layout
from lucid_jax.workdir import local_directory, write_json

# What parameters do not depend on, and their function only in its rounding.
_FREE = ("model.implementation", "model.remat", "model.compute_dtype", "model.init_std")


@dataclasses.dataclass(frozen=True)
class Restored:
    """The parameters of a checkpoint: of which step, and the path that they were asked for by."""

    step: int
    path: str | os.PathLike
    params: Any

    def fingerprint(self) -> str:
        """Identifies the parameters by their bits, on any mesh and in any directory."""
        leaves = jax.tree.leaves_with_path(self.params)
        bits = checksums({jax.tree_util.keystr(path): x for path, x in leaves})
        return hashlib.sha256(json.dumps(bits, sort_keys=True).encode()).hexdigest()


def restore(config: Config, layout: Layout, workdir: pathlib.Path, which: str) -> Restored:
    """The checkpoint that is to be evaluated, in the model of `config`.

    Args:
      config: The run.
      layout: Where its parameters are to lie.
      workdir: The run's directory.
      which: `"latest"`, `"best"` (lowest evaluation loss), or a step's directory, which may
        be of another model.

    Raises:
      ConfigError: `workdir` holds another model.
      CheckpointError: no sound checkpoint.
    """
    _, abstract = abstract_model(config.model, layout)
    of_this_run = which in ("latest", "best")
    path = workdir if of_this_run else which
    step, params, saved = restore_params(path, abstract, best=which == "best")
    if changes := _describe_changes(config, Config.from_dict(saved)):
        if of_this_run:
            raise ConfigError(
                f"{workdir} holds another model: {changes}; to evaluate its parameters in this"
                f" one, give --checkpoint={checkpoint_directory(workdir) / str(step)}"
            )
        logging.warning("%s is of another model: %s", which, changes)
    return Restored(step, path, params)


def evaluate_checkpoint(config: Config, workdir: str | os.PathLike, which: str) -> str:
    """Loss and perplexity of a checkpoint, in all and by position.

    Args:
      config: The run; its `data.eval` is read, up to `eval_batches` batches.
      workdir: The run's directory, which gets `eval.json`.
      which: As in `restore`.

    Returns:
      A table for the terminal.

    Raises:
      ConfigError: no evaluation data, or a configuration that does not fit, or of
        another model than the run in `workdir`.
      CheckpointError: no sound checkpoint.
    """
    workdir = local_directory(workdir)
    layout = make_layout(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if not config.data.eval:
        raise ConfigError("--mode=eval needs data.eval")
    check_data(config, tokenizer, "eval")
    loader = BatchLoader(
        config, tokenizer, layout.sharding("batch", "sequence"), split="eval",
        stripes=layout.stripes(config.data.sequence_length),
    )  # fmt: skip
    graph, _ = abstract_model(config.model, layout)
    restored = restore(config, layout, workdir, which)
    report = LossEvaluator(config, graph, loader)(restored.params)
    if report is None:
        raise ConfigError(f"data.eval={config.data.eval!r} holds no token to predict")
    if jax.process_index() == 0:
        result = {"step": restored.step, "checkpoint": str(which), **report.to_dict()}
        # With the directory of another run's step, this one may not be there yet.
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "eval.json", result)
    return f"step {restored.step} of {restored.path}: {report.table()}"


def _describe_changes(config: Config, saved: Config) -> str:
    return ", ".join(
        f"{key} was {was!r}, is now {now!r}"
        for key, (was, now) in config.changes_since(saved).items()
        if key.startswith("model.") and key not in _FREE
    )
