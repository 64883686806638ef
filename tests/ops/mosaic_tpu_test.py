"""The Mosaic backend in the TPU interpreter: memory starts as NaN, and races are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu
from ops.cases import CASES, Case
from ops.conformance import LucidConformance, PreconditionConformance

from lucid_jax import Prefix, lucid_attention, precondition
from lucid_jax.ops.precondition import pallas_mosaic_tpu
from pallas_kernels.mosaic_tpu.tiles import Tiles

ON_TPU = jax.default_backend() == "tpu"
INTERPRET = False if ON_TPU else pltpu.InterpretParams(detect_races=True)


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU interpreter where there is no TPU; a race fails the test."""
    monkeypatch.setattr(pallas_mosaic_tpu, "INTERPRET", INTERPRET)
    yield
    if not ON_TPU:
        assert interpreter.races is None or not interpreter.races.races_found


@pytest.mark.usefixtures("interpreted")
class TestMosaicTpu(PreconditionConformance):
    implementation = "mosaic_tpu"
    modes = (("float32", "highest"), ("bfloat16", None))
