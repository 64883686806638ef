"""Pallas' interpreter for the Triton kernels, where there is no GPU to run them."""

import contextlib

import jax
import pytest

from lucid_jax.ops.precondition import pallas_triton

ON_GPU = jax.default_backend() == "gpu"


@contextlib.contextmanager
def interpreted():
    """On a GPU the kernels themselves run."""
    if ON_GPU:
        yield
        return
    # Compiling the emulation takes longer than running it.
    quick = "jax_disable_most_optimizations"
    before = jax.config.read(quick)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_triton, "INTERPRET", True)
        jax.config.update(quick, True)
        try:
            yield
        finally:
            jax.config.update(quick, before)
