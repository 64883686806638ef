"""Evaluation of a checkpoint, apart from training."""

from __future__ import annotations

import json
import os
import pathlib

import jax

from lucid_jax.checkpoint import restore_params
from lucid_jax.config import Config, ConfigError
from lucid_jax.data import BatchLoader, check_data, load_tokenizer
from lucid_jax.evaluate.loss import LossEvaluator
from lucid_jax.model import abstract_model
from lucid_jax.sharding import make_layout


def evaluate_checkpoint(config: Config, workdir: str | os.PathLike, which: str) -> str:
    """Loss and perplexity of a checkpoint, in all and by position.

    Args:
      config: The run; its `data.eval` is read, up to `eval_batches` batches.
      workdir: The run's directory, which gets `eval.json`.
      which: `"latest"`, `"best"` (lowest evaluation loss), or a step's directory.

    Returns:
      A table for the terminal.

    Raises:
      ConfigError: no evaluation data, or a configuration that does not fit.
      CheckpointError: no sound checkpoint.
    """
    layout = make_layout(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if not config.data.eval:
        raise ConfigError("--mode=eval needs data.eval")
    check_data(config, tokenizer, "eval")
    loader = BatchLoader(config, tokenizer, layout.sharding("batch", "sequence"), split="eval")
    graph, abstract = abstract_model(config.model, layout)
    path = workdir if which in ("latest", "best") else which
    step, params = restore_params(path, abstract, best=which == "best")
    report = LossEvaluator(config, graph, loader)(params)
    if report is None:
        raise ConfigError(f"data.eval={config.data.eval!r} holds no token to predict")
    if jax.process_index() == 0:
        result = {"step": step, "checkpoint": str(which), **report.to_dict()}
        # With the directory of another run's step, this one may not be there yet.
        pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
        (pathlib.Path(workdir) / "eval.json").write_text(json.dumps(result, indent=2) + "\n")
    return f"step {step} of {path}: {report.table()}"
