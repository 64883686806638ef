"""A lock of a directory, so that two runs never write to it at the same time."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import TextIO

from absl import logging

from lucid_jax.config import ConfigError
from lucid_jax.runtime.distributed import on_process_0
from lucid_jax.runtime.workdir import make_writable, writing_to

_FILE = ".lock"


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
    """Creates `directory` if needed and keeps other runs out of it during the block.

    The system releases the lock when the process that took it ends, however it ends. Process 0
    takes it for all processes of a run.

    Raises:
      ConfigError: another run holds the lock, or the directory cannot be written to.
    """
    file = on_process_0(lambda: _take(directory))
    try:
        yield
    finally:
        if file:
            file.close()


def _take(directory: pathlib.Path) -> TextIO:
    make_writable(directory)
    with writing_to(directory):
        # Not truncated, because another run may have written its name into it.
        file = (directory / _FILE).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        with file:
            raise ConfigError(
                f"{directory} is in use by {_read_owner(file)}: stop that run, or give another"
                " --workdir"
            ) from error
    except OSError as error:
        logging.warning("%s is not locked: its file system has no locks (%s)", directory, error)
        return file
    owner = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
    }
    with writing_to(directory):
        file.truncate(0)
        file.write(json.dumps(owner) + "\n")
        file.flush()
    return file


def _read_owner(file: TextIO) -> str:
    file.seek(0)
    try:
        owner = json.loads(file.read())
        return f"process {owner['process']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # Which has not written its name yet.
