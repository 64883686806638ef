"""The gradients of attention by Mosaic GPU kernels; without a GPU in Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.cases import CASES, Case
from ops.conformance import SoftmaxConformance, slow
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
        # Each buffer of tiles is used several times.
        Case("six_blocks", length=700, heads=2, kv_heads=1, segments="long"),
    )
    quick = ("many_documents-float16-None",)

    @staticmethod
    def op(q, k, v, *, segment_ids, implementation, precision):
        return trial.softmax_attention(q, k, v, segment_ids)


@pytest.mark.parametrize("name", ["v", *slow("k", "o_bar")])
def test_a_bad_token_reaches_no_document_without_a_row_in_its_block(name):
    drawn = Case("documents", length=400, heads=2, kv_heads=1, head_dim=64).draw()
    ids = jnp.asarray(np.repeat([0, 1, 2, 3], [100, 100, 150, 50])[None])

    @jax.jit
    def run(q, k, v, o_bar):
        o, pull_back = jax.vjp(lambda *x: trial.softmax_attention(*x, ids), q, k, v)
        return o, *pull_back(o_bar)

    arrays = {x: jnp.asarray(drawn[x], jnp.float16) for x in ("q", "k", "v", "o_bar")}
    good = run(**arrays)
    # The last token of the second of four documents is in a tile of its neighbours in the block of
    # the rows 128 to 255, which the blocks before and behind it visit too.
    bad = run(**arrays | {name: arrays[name].at[0, 199].set(jnp.nan)})
    for x, y in zip(good, bad):
        for rows in (slice(100), slice(350, None)):
            assert jnp.array_equal(x[:, rows], y[:, rows])
    assert jnp.isnan(bad[1][0, 199]).any()
