"""The work directory of a run, its saved configuration, and atomic writes."""

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
    """Returns `path` with `~` expanded; the directory need not exist yet.

    Raises:
      ConfigError: `path` is a bucket's URL, or it or one of its parents is a file.
    """
    if "://" in str(path):
        raise ConfigError(
            f"a work directory must be in the file system: mount the bucket; got {str(path)!r}"
        )
    directory = pathlib.Path(path).expanduser()
    existing = next(part for part in (directory, *directory.parents) if part.exists())
    if not existing.is_dir():
        raise ConfigError(f"no work directory can be at {str(path)!r}: {existing} is a file")
    return directory


@contextlib.contextmanager
def new_directory(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a directory to fill, and renames it to `output` if the block succeeds.

    Raises:
      ConfigError: `output` already exists.
    """
    if output.exists():
        raise ConfigError(f"{output} already exists: remove it or choose another output")
    unfinished = output.with_name(f"{output.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(path: pathlib.Path, values: Any) -> None:
    """Writes a JSON file atomically: readers never see part of it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(path)


def save_config(directory: pathlib.Path, config: Config) -> None:
    """Saves a run's configuration in `directory`, which is created. Only process 0 writes."""
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / _CONFIG_FILE, config.to_dict())


def read_config(directory: pathlib.Path) -> Config | None:
    """Returns the configuration last saved in `directory`, or None.

    Raises:
      ConfigError: the saved configuration has unknown keys or impossible values.
    """
    path = directory / _CONFIG_FILE
    return Config.from_dict(json.loads(path.read_text())) if path.exists() else None
