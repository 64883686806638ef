"""Evaluates the loss of a checkpoint apart from training."""

import os

import jax

from lucid_jax.checkpoint.restore import restore_model
from lucid_jax.config import Config, ConfigError
from lucid_jax.data import BatchLoader, check_data, load_tokenizer, log_data
from lucid_jax.evaluate.loss import LossEvaluator
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.parallel.mesh import make_layout
from lucid_jax.runtime.distributed import on_process_0
from lucid_jax.runtime.environment import environment
from lucid_jax.runtime.workdir import local_directory, make_writable, write_json


def evaluate_checkpoint(config: Config, workdir: str | os.PathLike, which: str) -> str:
    """Evaluates loss and perplexity of a checkpoint, overall and by position.

    Args:
      config: The run; the first `eval_batches` batches of its `data.eval` are read.
      workdir: The run's directory, which gets `eval.json`.
      which: The checkpoint, as in `restore_model`.

    Returns:
      A table for the terminal.

    Raises:
      ConfigError: there is no evaluation data, the configuration does not fit, or the run in
        `workdir` is of another model.
      CheckpointError: there is no sound checkpoint.
    """
    workdir = local_directory(workdir)
    layout = make_layout(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if not config.data.eval:
        raise ConfigError("--mode=eval needs data.eval")
    log_data(config.data, tokenizer, check_data(config, tokenizer, "eval"))
    loader = BatchLoader(
        config, tokenizer, layout.sharding("batch", "sequence"), split="eval",
        stripes=layout.stripes(config.data.sequence_length),
    )  # fmt: skip
    model = LanguageModel.build(config.model, layout)
    path, step, params = restore_model(config, model, workdir, which)
    # It may not exist yet if `which` is a step of another run.
    on_process_0(lambda: make_writable(workdir))
    report = LossEvaluator(config, model, loader)(params)
    loader.log_skipped()
    if report is None:
        raise ConfigError(f"data.eval={config.data.eval!r} holds no token to predict")
    if jax.process_index() == 0:
        result = {
            "step": step,
            "checkpoint": str(which),
            "environment": environment(),
            **report.to_dict(),
        }
        write_json(workdir / "eval.json", result)
    return f"step {step} of {path}: {report.table()}"
