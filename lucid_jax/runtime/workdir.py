"""The work directory of a run, its saved configuration, and its JSON files."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from lucid_jax.config import Config, ConfigError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_CONFIG_FILE = "config.json"
# What training and the evaluation of its loss leave in a work directory.
_RUN_FILES = (_CONFIG_FILE, "metrics.jsonl", "loss.png", "eval.json")
_RUN_DIRECTORIES = ("checkpoints", "tensorboard", "profile")


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


def user_cache() -> pathlib.Path:
    """Returns the folder in the user's cache, which need not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "lucid_jax"


def make_writable(directory: pathlib.Path) -> None:
    """Creates `directory` if needed; raises ConfigError unless files can be written in it."""
    with writing_to(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))


@contextlib.contextmanager
def writing_to(directory: pathlib.Path) -> Iterator[None]:
    """Raises ConfigError if a file in `directory` cannot be written in the block."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write to the work directory {directory}: {error.strerror}"
        ) from error


def describe_disk_error(error: BaseException | None) -> str | None:
    """Returns a line for an error that came from a disk that is full or cannot be written.

    Libraries pass such errors on in exceptions of their own. Returns None for other errors.
    """
    while error:
        for number in _DISK_ERRORS:
            if os.strerror(number) in str(error):
                return (
                    f"{os.strerror(number)}; the checkpoints saved before are whole, and the"
                    " command resumes (without --overwrite)"
                )
        error = error.__cause__ or error.__context__
    return None


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


def read_json(path: pathlib.Path) -> Any:
    """Reads a JSON file of a run; returns None if there is none.

    A file that is not JSON is set aside with a warning, as if it were not there.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        set_aside(path, "is not JSON")
        return None


def set_aside(path: pathlib.Path, why: str) -> None:
    """Renames a damaged file to `<name>.damaged`, with a warning. Only process 0 renames."""
    target = path.with_name(f"{path.name}.damaged")
    logging.warning("%s %s: it is now %s", path, why, target.name)
    if jax.process_index() == 0:
        path.replace(target)


def remove_run(directory: pathlib.Path, init_from: str) -> None:
    """Removes the files of a run from its work directory, but no others, such as scores of tasks.

    Raises:
      ConfigError: they hold the parameters that the new run starts from, or cannot be removed.
    """
    if init_from and directory.resolve() in (
        (source := pathlib.Path(init_from).expanduser().resolve()),
        *source.parents,
    ):
        raise ConfigError(f"--overwrite would remove checkpoint.init_from={init_from!r}")
    with writing_to(directory):
        for path in map(directory.joinpath, _RUN_FILES):
            path.unlink(missing_ok=True)
        for path in map(directory.joinpath, _RUN_DIRECTORIES):
            if path.exists():
                shutil.rmtree(path)


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
    values = read_json(directory / _CONFIG_FILE)
    return None if values is None else Config.from_dict(values)
