"""The Triton backend: conformance, every schedule, unsupported inputs and races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from ops import oracle
from ops.cases import CASES, MANY_DOCUMENTS, Case
from ops.conformance import (
    FIXED_TOLERANCE,
    BetaConformance,
    LucidConformance,
    PreconditionConformance,
    assert_close,
)
from ops.float16_error import check_float16_errors
from ops.interpreter import ON_GPU

from lucid_jax import lucid_attention, precondition
from lucid_jax.ops.precondition import triton_schedule
from lucid_jax.ops.precondition.api import precondition_with
from lucid_jax.ops.precondition.triton import TritonBackend
from lucid_jax.ops.precondition.triton_schedule import Schedule
from pallas_kernels.bf16_split import bf16_split
from pallas_kernels.triton import tile
from pallas_kernels.triton.tiles import Tiles


@pytest.mark.usefixtures("triton_interpreter")
class TestTriton(PreconditionConformance):
    implementation = "triton"
    modes = (("float32", "highest"), ("bfloat16", None))
    if ON_GPU:
        modes += (("bfloat16", "highest"), ("float16", None))
    # 300 rows are five blocks; longer cases take minutes in the interpreter.
    cases = (*(case for case in CASES if ON_GPU or case.length <= 300), MANY_DOCUMENTS)
    quick = ("many-bfloat16-None",)


@pytest.mark.usefixtures("triton_interpreter")
class TestTritonBeta(BetaConformance):
    implementation = "triton"
    modes = (("float32", "highest"), ("bfloat16", None))
    if ON_GPU:
        modes += (("bfloat16", "highest"), ("float16", None))
    quick = ("packed_identical-bfloat16-None",)


@pytest.mark.usefixtures("triton_interpreter")
class TestTritonWide(PreconditionConformance):
    """The head dimensions of the other entries of the schedule table."""

    implementation = "triton"
    modes = (("bfloat16", None), ("float16", None), ("float32", "highest"))
    cases = (
        Case("width_128", length=300, head_dim=128),
        Case("width_128_two_heads", length=300, kv_heads=2, head_dim=128),
        Case("width_136_packed", length=300, head_dim=136, segments="packed"),
        Case("width_256_cosine", length=300, head_dim=256, keys="cosine0.9"),
    )


@pytest.fixture
def much_work(monkeypatch):
    monkeypatch.setattr(triton_schedule, "_MUCH_ROWS", 0)


@pytest.mark.usefixtures("triton_interpreter", "much_work")
class TestTritonMuchWork(PreconditionConformance):
    """The schedules of calls that are too large for the oracle."""

    implementation = "triton"
    modes = (("bfloat16", None), ("float16", None))
    cases = (
        MANY_DOCUMENTS,
        Case("width_128_cosine", length=300, head_dim=128, keys="cosine0.9"),
    )
    if ON_GPU:
        cases += CASES


@pytest.mark.usefixtures("triton_interpreter")
class TestLucidTriton(LucidConformance):
    implementation = "triton"
    modes = (("bfloat16", None),)
    cases = (Case("gqa", length=200, heads=4, kv_heads=2), Case("segments", segments="packed"))


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize(
    ("keys", "sizes", "fused", "lookahead"),
    [
        ("cosine0.9", "documents", True, 0),
        pytest.param("cosine0.7", "alike", True, 0, marks=pytest.mark.slow),
        pytest.param("cosine0.9", "rising", True, 2, marks=pytest.mark.slow),
        pytest.param("cosine0.9", "falling", False, 1, marks=pytest.mark.slow),
        pytest.param("cosine0.99", "documents", False, 0, marks=pytest.mark.slow),
        pytest.param("zeros", "documents", True, 1, marks=pytest.mark.slow),
        pytest.param("cosine0.9", "descending", True, 0, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_inputs_cost_the_error_of_float16_in_every_document(keys, sizes, fused, lookahead):
    tiles = Tiles(64, 32, warps=4, stages=1, lookahead=lookahead)
    backend = TritonBackend(Schedule(tiles, tiles, tiles, tiles, fused), interpret=not ON_GPU)

    def op(k, v, segment_ids):
        return precondition_with(backend, k, v, segment_ids, None)

    check_float16_errors(op, keys, sizes)


@pytest.mark.slow
@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize(
    ("lookahead", "segments", "fused", "head_group"),
    [
        (0, "many", True, 0), (1, "packed", False, 4), (1, "many", True, 1),
        (2, "none", False, 1), (2, "none", True, 2), (3, "many", False, 2),
    ],
)  # fmt: skip
def test_every_schedule_solves_the_same_system(lookahead, segments, fused, head_group):
    # Five blocks, the last one partial. An error of the solve shows in the gradients too.
    drawn = Case("lookahead", batch=2, length=270, heads=2, kv_heads=2, segments=segments).draw()
    k, v, y_bar = (jnp.asarray(drawn[name], jnp.float32) for name in ("k", "v", "y_bar"))
    segment_ids = drawn["segment_ids"]
    tiles = Tiles(64, 32, warps=4, stages=1, lookahead=lookahead, head_group=head_group)
    schedule = Schedule(tiles, tiles, tiles, tiles, fused)
    backend = TritonBackend(schedule, interpret=not ON_GPU)

    # Not under jit, so that kernels that several schedules share compile once.
    def run(k, v, y_bar):
        y, pull_back = jax.vjp(
            lambda k, v: precondition_with(backend, k, v, segment_ids, None),
            k,
            v,
        )
        return y, *pull_back(y_bar)

    y, k_bar, v_bar = run(k, v, y_bar)
    gradients, size = oracle.precondition_gradients(k, v, y_bar, segment_ids)
    tolerance = FIXED_TOLERANCE["float32"]
    assert_close("out", y, oracle.precondition(k, v, segment_ids), tolerance)
    assert_close("gradient of k", k_bar, gradients["k"], tolerance, size)
    assert_close("gradient of v", v_bar, gradients["v"], tolerance)


def test_a_product_of_terms_keeps_16_bits():
    a, b = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)

    def kernel(a_ref, b_ref, out_ref):
        def load(term):
            return plgpu.load(a_ref.at[pl.program_id(0) * 0 + term])

        out_ref[:, :] = tile.dot_terms(load, plgpu.load(b_ref.at[:, :]))

    shape = jax.ShapeDtypeStruct(a.shape, jnp.float32)
    terms = jnp.stack(bf16_split(jnp.asarray(a), 2))
    found = pl.pallas_call(kernel, grid=(1,), out_shape=shape, interpret=not ON_GPU)(terms, b)
    # Two terms leave at most 2⁻¹⁷ of an operand.
    assert_close("product", found, a.astype(np.float64) @ b.astype(np.float64), 2**-15)


@pytest.mark.skipif(ON_GPU, reason="the error reports a missing GPU")
@pytest.mark.parametrize("op", [precondition, lucid_attention])
def test_triton_needs_a_gpu(op):
    x = jnp.ones((1, 8, 1, 16), jnp.bfloat16)
    arguments = (x, x) if op is precondition else (x, x, x)
    with pytest.raises(ValueError, match="needs a GPU; this is compiled for cpu"):
        op(*arguments, implementation="triton")


@pytest.mark.usefixtures("triton_interpreter")
def test_unsupported_inputs_are_named():
    wide = jnp.ones((1, 8, 1, 257), jnp.bfloat16)
    with pytest.raises(ValueError, match="head width of at most 256; got 257"):
        precondition(wide, wide, implementation="triton")
    with jax.enable_x64(True):
        double = jnp.ones((1, 8, 1, 16), jnp.float64)
        with pytest.raises(ValueError, match="float16, bfloat16 or float32; got float64"):
            precondition(double, double, implementation="triton")


@pytest.mark.skipif(not ON_GPU, reason="races need a GPU")
@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_runs_give_the_same_bits(seed):
    """The result does not depend on the order of the programs; a thousand runs in all."""
    rng = np.random.default_rng(seed)
    b, heads = rng.integers(1, 4, 2)
    s, d = rng.integers(1, 9000), rng.choice([16, 64, 128])
    keys = jax.random.split(jax.random.key(seed), 4)
    k, v, y_bar = (jax.random.normal(key, (b, s, heads, d), jnp.bfloat16) for key in keys[:3])
    ids = None
    if rng.random() < 0.5:
        ids = jnp.cumsum(jax.random.bernoulli(keys[3], 0.005, (b, s)), 1, dtype=jnp.int32)

    @jax.jit
    def run(k, v, y_bar, ids):
        y, pull_back = jax.vjp(
            lambda k, v: precondition(k, v, segment_ids=ids, implementation="triton"), k, v
        )
        return y, pull_back(y_bar)

    @jax.jit
    def differs(a, b):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
        return sum(jnp.sum(x.view(jnp.uint16) != y.view(jnp.uint16)) for x, y in pairs)

    first = run(k, v, y_bar, ids)
    total = sum(differs(first, run(k, v, y_bar, ids)) for _ in range(100))
    assert total == 0, f"{total} values differed at {(b, s, heads, d)}, packed {ids is not None}"
