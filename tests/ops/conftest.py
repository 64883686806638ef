"""Fixtures that give a CPU the behaviour of other devices."""

import pytest
from ops.interpreter import interpreted

from lucid_jax.ops.attention import xla as attention_xla
from lucid_jax.ops.precondition import xla as precondition_xla


@pytest.fixture
def wide_panels(monkeypatch):
    """Uses the panels of an accelerator, several blocks wide; a CPU uses square tiles."""
    for module in (attention_xla, precondition_xla):
        monkeypatch.setattr(module, "panel_width", lambda: 1024)


@pytest.fixture
def triton_interpreter():
    with interpreted("triton"):
        yield


@pytest.fixture
def mosaic_gpu_interpreter():
    with interpreted("mosaic_gpu"):
        yield


@pytest.fixture
def mosaic_interpreter():
    with interpreted("mosaic_tpu"):
        yield
