"""Every backend of `precondition` against the float64 oracle."""

import jax
import pytest
from ops.conformance import PreconditionConformance

from lucid_jax.ops.precondition import pallas_triton


class TestReference(PreconditionConformance):
    implementation = "reference"
    modes = (("float64", "highest"), ("bfloat16", "highest"))


class TestXla(PreconditionConformance):
    implementation = "xla"


class TestTriton(PreconditionConformance):
    """Compiled where there is a GPU, in Pallas' interpreter elsewhere."""

    implementation = "triton"
    modes = (("float32", "highest"), ("bfloat16", None), ("bfloat16", "highest"), ("float16", None))

    @pytest.fixture(autouse=True)
    def interpreter(self, monkeypatch):
        monkeypatch.setattr(pallas_triton, "INTERPRET", jax.default_backend() != "gpu")
