"""The commands that an installed package brings, beside `python run.py` of a clone."""

import runpy
import sys

# What the op alone does without.
_TRAIN = ("absl", "etils", "flax", "grain", "ml_collections", "optax", "orbax", "safetensors")


def run() -> None:
    """Does what `python run.py` does: `lucid-jax-run`."""
    _run_as_main("lucid_jax.shipped.run")


def convert() -> None:
    """Does what `python -m lucid_jax.convert` does: `lucid-jax-convert`."""
    _run_as_main("lucid_jax.convert.__main__")


def _run_as_main(module: str) -> None:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _TRAIN:
            raise
        sys.exit(f"error: {error}; pip install 'lucid-jax[train]' brings what training needs")
