"""The work directory of a run, the configuration noted in it, and writing whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax

from lucid_jax.config import Config, ConfigError

_CONFIG_FILE = "config.json"


def local_directory(path: str | os.PathLike) -> pathlib.Path:
    """Where `path` leads, `~` resolved; there need not be anything yet.

    Raises:
      ConfigError: no directory can be there, or it is not in the file system.
    """
    if "://" in str(path):
        raise ConfigError(
            f"a work directory must be in the file system: mount the bucket; got {str(path)!r}"
        )
    directory = pathlib.Path(path).expanduser()
    there = next(part for part in (directory, *directory.parents) if part.exists())
    if not there.is_dir():
        raise ConfigError(f"no work directory can be at {str(path)!r}: {there} is a file")
    return directory


@contextlib.contextmanager
def new_directory(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to fill, which gets the name `output` when that is done without an error.

    Raises:
      ConfigError: `output` is there.
    """
    if output.exists():
        raise ConfigError(f"{output} is there already: remove it or choose another output")
    unfinished = output.with_name(f"{output.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(path: pathlib.Path, values: Any) -> None:
    """Writes a file that others see whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(path)


def save_config(directory: pathlib.Path, config: Config) -> None:
    """Notes what is trained in `directory`, which is created; process 0 does."""
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / _CONFIG_FILE, config.to_dict())


def read_config(directory: pathlib.Path) -> Config | None:
    """What was last trained in `directory`; None if nothing was.

    Raises:
      ConfigError: it has keys or values that no run can have.
    """
    path = directory / _CONFIG_FILE
    return Config.from_dict(json.loads(path.read_text())) if path.exists() else None
