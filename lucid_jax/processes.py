"""Several processes, on one host or many, as one run."""

from __future__ import annotations

import re

import jax
from absl import logging

from lucid_jax.config import ConfigError


def join(text: str) -> None:
    """Makes this process one of those of a run; the first thing that it does with jax.

    Args:
      text: `"auto"` where jax can find out by itself (TPU pods, Slurm, Open MPI,
        Kubernetes), else `HOST:PORT,INDEX,COUNT`, with the address of process 0.

    Raises:
      ConfigError: anything else, or nothing was found out.
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
        jax.distributed.initialize(
            match[1],
            process_id=int(match[2]),
            num_processes=int(match[3]),
            cluster_detection_method="deactivate",
        )
    if jax.process_index() > 0:
        # Every process would say the same.
        logging.set_verbosity(logging.WARNING)
