"""Runs the kernels in Pallas' interpreters on machines without their device."""

import contextlib

import jax
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from lucid_jax.ops import target
from lucid_jax.ops.attention import splash
from lucid_jax.ops.precondition import mosaic_gpu as pallas_mosaic_gpu
from lucid_jax.ops.precondition import mosaic_tpu as pallas_mosaic_tpu
from lucid_jax.ops.precondition import triton as pallas_triton

ON_GPU = jax.default_backend() == "gpu"
ON_TPU = jax.default_backend() == "tpu"
# Memory is initialised to NaN, and copies complete as late as possible.
TPU_PARAMS = False if ON_TPU else pltpu.InterpretParams(detect_races=True)


@contextlib.contextmanager
def interpreted(implementation: str):
    """Interprets the kernels of an implementation; a race of TPU copies is an error."""
    if ON_TPU if implementation == "mosaic_tpu" else ON_GPU:
        yield
        return
    if implementation == "mosaic_gpu":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pallas_mosaic_gpu, "INTERPRET", plgpu.InterpretGPUParams())
            yield
        return
    # Compiling the interpreted program takes longer than running it.
    option = "jax_disable_most_optimizations"
    before = jax.config.read(option)
    with pytest.MonkeyPatch.context() as patch:
        if implementation == "triton":
            patch.setattr(pallas_triton, "INTERPRET", True)
            patch.setattr(target, "device_kind", lambda: "NVIDIA H200")
        else:
            patch.setattr(pallas_mosaic_tpu, "INTERPRET", TPU_PARAMS)
            patch.setattr(splash, "INTERPRET", True)
        jax.config.update(option, True)
        try:
            yield
        finally:
            jax.config.update(option, before)
    races, tpu_interpreter.races = tpu_interpreter.races, None
    assert races is None or not races.races_found
