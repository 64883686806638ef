"""The commands that an installed package brings, beside `python run.py` of a clone."""

import runpy
import sys


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
        sys.exit(f"error: {error}; pip install 'lucid-jax[train]' brings what training needs")
