"""Checkpoints of parameters alone, a third of a whole one: to keep, to send, to evaluate.

  python -m experiments.parameters --input=runs/scored_model --output=runs/scored_model_params

The output is a work directory for `run.py --mode=eval` and `checkpoint.init_from`.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from lucid_jax.checkpoint.manager import (
    Checkpointer,
    checkpoint_directory,
    restore_params,
    saved_config,
)
from lucid_jax.config import Config
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.parallel.mesh import make_layout
from lucid_jax.runtime.workdir import save_config


def save(directory: pathlib.Path, config: Config, step: int, params: Any) -> None:
    """Writes a work directory with one checkpoint, of `step`."""
    with Checkpointer(checkpoint_directory(directory), config.checkpoint) as checkpointer:
        state = {"params": params}
        checkpointer.save(step, state, data_state={}, config=config.to_dict(), eval_loss=None)
    save_config(directory, config)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args(arguments)
    config = Config.from_dict(saved_config(options.input))
    model = LanguageModel.build(config.model, make_layout(config, jax.devices()[:1]))
    step, params, _ = restore_params(options.input, model.abstract_params)
    save(options.output, config, step, params)


if __name__ == "__main__":
    main()
