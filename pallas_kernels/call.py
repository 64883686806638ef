"""The call of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl


def pallas_call(kernel: Callable, **options: Any) -> Callable:
    """`pl.pallas_call` for kernels whose integers have 32 bits, also where JAX's have 64."""
    call = pl.pallas_call(kernel, **options)

    def run(*arrays):
        with jax.enable_x64(False):
            return call(*arrays)

    return run
