"""The Mosaic GPU kernels in Pallas' interpreter."""

import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from ops.cases import CASES, Case
from ops.conformance import PreconditionConformance

from experiments.mosaic_gpu import trial

pytestmark = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="jax is older than 0.11"
)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(trial, "INTERPRET", plgpu.InterpretGPUParams())


class TestMosaicGpu(PreconditionConformance):
    implementation = "mosaic_gpu"
    modes = (("bfloat16", None), ("float16", None))
    # One to three blocks, and heads of both widths that the kernels have.
    cases = (
        *(case for case in CASES if case.length <= 300),
        Case("many_documents", length=300, batch=2, segments="many"),
        Case("interleaved", length=200, segments="interleaved"),
    )
    quick = ("length_129_wide-float16-None", "packed_identical-float16-None")

    @staticmethod
    def op(k, v, *, segment_ids, implementation, precision):
        return trial.precondition(k, v, segment_ids)
