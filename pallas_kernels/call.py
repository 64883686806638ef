"""The call of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax.experimental import pallas as pl


def pallas_call(kernel: Callable, **options: Any) -> Callable:
    """`pl.pallas_call`, with `traced_alike`."""
    return traced_alike(pl.pallas_call(kernel, **options))


def traced_alike(call: Callable) -> Callable:
    """Returns a call of a kernel that is traced alike under any setting of JAX.

    Its integers have 32 bits, and it promotes ranks and dtypes.

    Raises:
      NotImplementedError: where the call is differentiated; the ops have gradients of their own,
        which are calls of kernels too.
    """

    @jax.custom_jvp
    def run(*arrays):
        with (
            jax.enable_x64(False),
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
        ):
            return call(*arrays)

    @run.defjvp
    def refuse(primals, tangents) -> NoReturn:
        raise NotImplementedError(
            "the kernels have no second derivatives and no forward mode; implementation='reference'"
            " has both"
        )

    return run
