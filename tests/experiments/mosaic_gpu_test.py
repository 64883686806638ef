"""The gradients of attention by Mosaic GPU kernels; without a GPU in Pallas' interpreter."""

import jax
import pytest
from ops.cases import CASES, Case
from ops.conformance import SoftmaxConformance
from ops.interpreter import ON_GPU, interpreted

from experiments.mosaic_gpu import trial

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax is older than 0.11")


@pytest.fixture(autouse=True)
def interpreter():
    with interpreted("mosaic_gpu"):
        yield


class TestSoftmaxMosaicGpu(SoftmaxConformance):
    implementation = "mosaic_gpu"
    modes = (("float16", None), *([("bfloat16", None)] if ON_GPU else []))
    cases = (
        *(case for case in CASES if ON_GPU or case.length <= 300),
        Case("many_documents", length=300, batch=2, segments="many", heads=4, kv_heads=2),
        Case("heads_of_68", length=300, head_dim=68, segments="long"),
        Case("heads_of_128", length=300, head_dim=128, segments="long"),
        Case("interleaved", length=200, segments="interleaved"),
        Case("three_blocks", length=400, heads=2, segments="long"),
    )
    quick = ("many_documents-float16-None",)

    @staticmethod
    def op(q, k, v, *, segment_ids, implementation, precision):
        return trial.softmax_attention(q, k, v, segment_ids)
