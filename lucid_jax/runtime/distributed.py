"""Several processes, on one host or many, as one run."""

from __future__ import annotations

import re
import socket
import time

import jax
from absl import logging

from lucid_jax.config import ConfigError

# How long jax waits for the other processes, too.
_PATIENCE = 300.0


def join(text: str) -> None:
    """Makes this process one of those of a run; the first thing that it does with jax.

    Args:
      text: `"auto"` where jax can find out by itself (TPU pods, Slurm, Open MPI,
        Kubernetes), else `HOST:PORT,INDEX,COUNT`, with the address of process 0.

    Raises:
      ConfigError: anything else, nothing was found out, or process 0 does not answer.
    """
    if text == "auto":
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ConfigError(
                f"--distributed=auto finds no cluster here ({error}): give HOST:PORT,INDEX,COUNT"
            ) from error
    else:
        match = re.fullmatch(r"(.+:\d+),(\d+),(\d+)", text)
        if not match or int(match[2]) >= int(match[3]):
            raise ConfigError(
                "--distributed must be auto or HOST:PORT,INDEX,COUNT with INDEX from 0 and less"
                f" than COUNT; got {text!r}"
            )
        if int(match[2]) > 0:
            _await_first(match[1])
        jax.distributed.initialize(
            match[1],
            process_id=int(match[2]),
            num_processes=int(match[3]),
            cluster_detection_method="deactivate",
        )
    if jax.process_index() > 0:
        # Every process would say the same.
        logging.set_verbosity(logging.WARNING)


def _await_first(address: str) -> None:
    """Returns when process 0 listens; jax would end this process without a word of its own."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
            return
        except OSError as error:
            if time.monotonic() > deadline or isinstance(error, socket.gaierror):
                raise ConfigError(
                    f"no process 0 answers at {address} ({error}): start the same command there"
                    " with INDEX 0, or give its address"
                ) from error
            time.sleep(0.2)
