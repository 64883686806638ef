"""Runs that consist of several processes, on one host or many."""

import math
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from lucid_jax.config import ConfigError
from lucid_jax.runtime.peers import shorten_fatal_errors

T = TypeVar("T")

# Seconds to wait for process 0, and then for the other processes.
_TIMEOUT = 300.0


def join(address: str) -> None:
    """Makes this process one of the processes of a run. Call it before any other use of jax.

    Only process 0 prints from then on.

    Args:
      address: `"auto"` where jax can detect the cluster (TPU pods, Slurm, Open MPI,
        Kubernetes), otherwise `HOST:PORT,INDEX,COUNT`, with the address of process 0.

    Raises:
      ConfigError: `address` is malformed, no cluster is detected, or process 0 does not answer.
    """
    if address == "auto":
        undo = shorten_fatal_errors()
        try:
            jax.distributed.initialize()
        except ValueError as error:
            undo()
            raise ConfigError(
                f"--distributed=auto finds no cluster here ({error}): give HOST:PORT,INDEX,COUNT"
            ) from error
    else:
        match = re.fullmatch(r"(.+:\d+),(\d+),(\d+)", address)
        if not match or int(match[2]) >= int(match[3]):
            raise ConfigError(
                "--distributed must be auto or HOST:PORT,INDEX,COUNT with INDEX from 0 and less"
                f" than COUNT; got {address!r}"
            )
        if int(match[2]) > 0:
            _wait_for_process_0(match[1])
        else:
            logging.info("waiting for %d other processes", int(match[3]) - 1)
        shorten_fatal_errors()
        jax.distributed.initialize(
            match[1],
            process_id=int(match[2]),
            num_processes=int(match[3]),
            cluster_detection_method="deactivate",
            initialization_timeout=math.ceil(_TIMEOUT),
        )
    if jax.process_index() > 0:
        # Otherwise every process would print and log the same lines.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        logging.set_verbosity(logging.WARNING)


def on_process_0(call: Callable[[], T]) -> T | None:
    """Returns the result of `call` on process 0 and None on others, which wait for it.

    Raises:
      ConfigError: on every process, if `call` raises it.
    """
    result, problem = None, None
    if jax.process_index() == 0:
        try:
            result = call()
        except ConfigError as error:
            problem = error
    if multihost_utils.broadcast_one_to_all(np.array(problem is not None)):
        raise problem or ConfigError("process 0 cannot go on, and says why")
    return result


def _wait_for_process_0(address: str) -> None:
    """Returns once process 0 listens; without it, jax would abort with no clear message."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + _TIMEOUT
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=_TIMEOUT).close()
            return
        except OSError as error:
            if time.monotonic() > deadline or isinstance(error, socket.gaierror):
                raise ConfigError(
                    f"no process 0 answers at {address} ({error}): start the same command there"
                    " with INDEX 0, or give its address"
                ) from error
            time.sleep(0.2)
