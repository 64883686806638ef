"""Checkpoints without optimizer state, a third of the size: to keep, to send, to evaluate.

  python -m experiments.parameters --input=runs/scored_model --output=runs/scored_model_params

The output is a work directory for `run.py --mode=eval` and `checkpoint.init_from`.
"""

import argparse
import pathlib
from collections.abc import Sequence

from experiments.activations import build_model
from lucid_jax.checkpoint.manager import save_params
from lucid_jax.checkpoint.restore import restore_params, saved_config
from lucid_jax.config import Config


def main(argv: Sequence[str] | None = None) -> None:
    """Copies the parameters of the newest checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    flags = parser.parse_args(argv)
    config = Config.from_dict(saved_config(flags.input))
    step, params, _ = restore_params(flags.input, build_model(config).abstract_params)
    save_params(flags.output, config, step, params)


if __name__ == "__main__":
    main()
