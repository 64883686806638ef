"""Context parallelism: outputs and gradients equal those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from ops.cases import CASES, MANY_DOCUMENTS, PATH_CASES, Case
from ops.conformance import (
    BetaConformance,
    LucidBetaConformance,
    LucidConformance,
    PathPreconditionConformance,
    PathSoftmaxConformance,
    PreconditionConformance,
    SoftmaxConformance,
    with_beta,
    with_transitions,
)
from ops.interpreter import ON_GPU, interpreted

from lucid_jax import Transitions
from lucid_jax.ops.lucid_attention import measured_lucid_attention
from lucid_jax.ops.precondition import mosaic_tpu as pallas_mosaic_tpu
from lucid_jax.ops.precondition import triton as pallas_triton
from lucid_jax.ops.precondition.diagnostics import Sample, sampled_rows
from lucid_jax.parallel import context_attention
from lucid_jax.parallel.stripes import Stripes

MODES = (("float32", "highest"), ("bfloat16", None))
SHARDED = PartitionSpec(None, "x")


def mesh_of(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), ("x",), (AxisType.Auto,), devices=jax.devices()[:devices])


def sharded(op, devices: int, stripe: int, out_spec=SHARDED):
    """Runs `op` on whole sequences over `devices`; float32 has full precision without asking."""

    def run(*arrays, segment_ids=None, implementation=None, precision=None, **tokens):
        del precision
        stripes = Stripes(arrays[0].shape[1], devices, stripe)
        order = stripes.permutation()

        def arrange(x):
            padding = [(0, 0), (0, stripes.size - stripes.length)] + [(0, 0)] * (x.ndim - 2)
            return jnp.pad(x, padding)[:, order]

        def on_one_device(*arrays):
            *arrays, segment_ids, tokens = arrays
            options = {} if implementation is None else {"implementation": implementation}
            options |= {"axis_name": "x", "stripe": stripe, "segment_ids": segment_ids}
            return op(*arrays, **options, **tokens)

        arguments = jax.tree.map(arrange, (*arrays, segment_ids, tokens))
        run = jax.shard_map(
            on_one_device,
            mesh=mesh_of(devices),
            in_specs=SHARDED,
            out_specs=out_spec,
        )
        out = run(*arguments)
        return out[:, np.argsort(order)[: stripes.length]] if out_spec == SHARDED else out

    return run


def named(*names: str) -> tuple[Case, ...]:
    """Selects cases by name."""
    return tuple(case for case in CASES if case.name in names)


class Stripe:
    """K of the cases is 1 or 2, so that more devices take stripes."""

    implementation = "xla"
    modes = MODES


class TestTwoDevices(Stripe, LucidConformance):
    op = sharded(context_attention.lucid_attention, 2, 16)
    cases = named("length_63", "one_row", "huge_key", "length_257_odd_width")


class TestBestOnTwoDevices(LucidConformance):
    """The default backends: on GPUs the kernels, and cuDNN or Triton by query heads."""

    implementation = None
    modes = (("bfloat16", None),)
    op = sharded(context_attention.lucid_attention, 2, 128)
    cases = (*named("length_63"), MANY_DOCUMENTS)


class TestThreeDevices(Stripe, LucidConformance):
    """3 does not divide K = 2, and no power of two divides the stripes."""

    op = sharded(context_attention.lucid_attention, 3, 20)
    cases = named("packed", "length_100_gqa", "segments_of_one")
    quick = ("packed-float32-highest",)


class TestFourDevices(Stripe, LucidConformance):
    op = sharded(context_attention.lucid_attention, 4, 8)
    cases = named("zero_keys", "identical_keys", "cosine_0.99", "length_1100_panels")


class TestEightDevices(Stripe, LucidConformance):
    op = sharded(context_attention.lucid_attention, 8, 8)
    cases = named("packed_identical", "cosine_0.9")
    modes = (("float32", "highest"), ("float64", "highest"))


class TestWideStripes(Stripe, LucidConformance):
    """Blocks have more rows than a tile."""

    op = sharded(context_attention.lucid_attention, 3, 160)
    cases = named("packed_panels", "length_1000")


class TestByHeads(LucidConformance):
    """Each device takes whole sequences of one head, by any backend of one device."""

    implementation = "reference"
    modes = MODES
    op = sharded(context_attention.lucid_attention, 2, 16)
    cases = named("packed", "length_100_gqa", "two_rows")
    quick = ("packed-float32-highest",)


class TestPrecondition(Stripe, PreconditionConformance):
    op = sharded(context_attention.precondition, 3, 16)
    cases = named("zero_keys", "packed", "cosine_0.9")
    quick = ("zero_keys-bfloat16-None",)


class TestPreconditionByHeads(Stripe, PreconditionConformance):
    op = sharded(context_attention.precondition, 2, 16)
    cases = named("packed")


class TestPreconditionBeta(Stripe, BetaConformance):
    op = with_beta(sharded(context_attention.precondition, 3, 16))
    cases = named("packed", "cosine_0.9")
    quick = ("packed-float32-highest",)


class TestBetaByHeads(Stripe, LucidBetaConformance):
    op = with_beta(sharded(context_attention.lucid_attention, 2, 16))
    cases = named("packed")
    quick = ("packed-float32-highest",)


class TestBeta(Stripe, LucidBetaConformance):
    op = with_beta(sharded(context_attention.lucid_attention, 3, 16))
    cases = named("packed")


class TestPathByHeads(Stripe, PathPreconditionConformance):
    op = with_transitions(sharded(context_attention.precondition, 2, 16), 2)
    cases = tuple(case for case in PATH_CASES if case.segments in ("packed", "interleaved"))
    quick = ("path_packed-float32-highest",)


class TestPathSoftmaxByHeads(Stripe, PathSoftmaxConformance):
    op = with_transitions(sharded(context_attention.softmax_attention, 2, 16), 3)
    cases = TestPathByHeads.cases


class TestSoftmax(Stripe, SoftmaxConformance):
    op = sharded(context_attention.softmax_attention, 3, 16)
    cases = named("packed", "huge_key", "length_1100_panels")
    quick = ("packed-float32-highest",)


class TestSoftmaxByQueryHeads(SoftmaxConformance):
    """Each device takes whole sequences of one query head; two heads share their keys."""

    implementation = "reference"
    modes = MODES
    op = sharded(context_attention.softmax_attention, 4, 16)
    cases = named("packed", "two_rows")
    quick = ("packed-float32-highest",)


class TestSoftmaxByHeads(Stripe, SoftmaxConformance):
    op = sharded(context_attention.softmax_attention, 2, 16)
    cases = named("packed")


@pytest.mark.usefixtures("library")
class TestByQueryHeads(LucidConformance):
    """All heads read the same keys, so every device has a share in their gradients."""

    implementation = None
    modes = MODES
    op = sharded(context_attention.lucid_attention, 2, 16)
    cases = named("zero_keys", "packed_panels")
    quick = ("zero_keys-float32-highest",)


@pytest.fixture
def triton():
    with interpreted("triton"):
        yield


@pytest.fixture
def mosaic_tpu():
    with interpreted("mosaic_tpu"):
        yield


@pytest.mark.usefixtures("triton")
class TestTriton(LucidConformance):
    implementation = "triton"
    modes = MODES
    op = sharded(context_attention.lucid_attention, 2, 128)
    cases = named("packed_panels")


@pytest.mark.usefixtures("triton")
class TestTritonBeta(LucidBetaConformance):
    implementation = "triton"
    modes = MODES[:1]
    op = with_beta(TestTriton.op)
    cases = named("packed_panels")


@pytest.fixture
def large_stripes(monkeypatch):
    """Takes paths of stripes that are too large for the interpreter."""
    monkeypatch.setattr(pallas_triton, "inverse_rows", lambda *_: 256)
    monkeypatch.setattr(pallas_triton, "column_parts", lambda *_: 2)


@pytest.mark.usefixtures("triton", "large_stripes")
class TestTritonLargeStripes(PreconditionConformance):
    """Solves stripes of 512 rows by the inverses of two blocks, with columns in two parts."""

    implementation = "triton"
    modes = MODES
    op = sharded(context_attention.precondition, 2, 256)
    cases = (
        Case("large_stripes", length=900, segments="packed", keys="cosine0.9"),
        Case("large_stripes_identical", length=1024, head_dim=64, keys="identical"),
    )


@pytest.mark.usefixtures("triton", "large_stripes")
class TestTritonLargeStripesBeta(BetaConformance):
    implementation = "triton"
    modes = MODES[:1]
    op = with_beta(TestTritonLargeStripes.op)
    cases = TestTritonLargeStripes.cases


@pytest.mark.usefixtures("mosaic_tpu")
class TestMosaicTpuBeta(BetaConformance):
    implementation = "mosaic_tpu"
    modes = MODES[:1]
    op = with_beta(sharded(context_attention.precondition, 3, 128))
    cases = named("packed_panels")


@pytest.mark.usefixtures("mosaic_tpu")
class TestMosaicTpu(PreconditionConformance):
    implementation = "mosaic_tpu"
    modes = MODES
    op = sharded(context_attention.precondition, 3, 128)
    cases = named("packed_panels")


@pytest.mark.usefixtures("mosaic_tpu")
class TestSplash(SoftmaxConformance):
    """Splash attention's blocks of 512 queries span several stripes, or parts of one."""

    implementation = "splash"
    modes = (("bfloat16", None),)
    op = sharded(context_attention.softmax_attention, 3, 64)
    cases = named("packed", "length_1100_panels", "packed_panels")


@pytest.mark.parametrize("name", ["k", "v", "beta"])
def test_a_bad_token_stays_in_its_document(name):
    """Stripes of three blocks of 20 tokens hold several documents."""
    drawn = Case("bad", length=300, segments="many").draw()
    ids = drawn["segment_ids"]
    arrays = {n: drawn[n].astype(np.float32) for n in ("q", "k", "v", "beta")}
    op = with_beta(sharded(context_attention.lucid_attention, 3, 20))

    @jax.jit
    def both(o_bar, *arrays):
        o, pull_back = jax.vjp(functools.partial(op, segment_ids=jnp.asarray(ids)), *arrays)
        return o, *pull_back(o_bar)

    o_bar = drawn["o_bar"].astype(np.float32)
    clean = both(o_bar, *arrays.values())
    arrays[name][0, 200, 0, ...] = np.nan
    found = both(o_bar, *arrays.values())
    same = ids[0] == ids[0, 200]
    assert 20 < same.sum() < 100
    np.testing.assert_array_equal(np.isnan(found[0][0]).all((1, 2)), same & (np.arange(300) >= 200))
    for x, expected in zip(found, clean):
        np.testing.assert_allclose(x[0][~same], expected[0][~same], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("devices", [2, 3])
def test_diagnostics_equal_those_of_one_device(devices):
    """By heads, and by stripes of 20 tokens, which pad 300 tokens to 320 or 300."""
    drawn = Case("measured", length=310, heads=4, kv_heads=2, segments="many", batch=2).draw()
    arrays = [jnp.asarray(drawn[name], jnp.float32) for name in "qkv"]
    # Padding is segment 0.
    ids = jnp.asarray(drawn["segment_ids"])
    rows = sampled_rows(310)

    beta = jnp.asarray(drawn["beta"], jnp.float32)

    def measure(q, k, v, *, segment_ids, **options):
        sample = Sample(rows, segment_ids)
        op = context_attention.measured_lucid_attention
        o, found = op(q, k, v, sample=sample, segment_ids=segment_ids, **options)
        return jax.lax.pmax(jnp.stack([*found]) + 0 * o.sum(), "x")

    op = jax.jit(sharded(measure, devices, 20, out_spec=PartitionSpec()))
    options = {"segment_ids": ids, "beta": beta}
    _, expected = measured_lucid_attention(*arrays, sample=Sample(rows, ids), **options)
    np.testing.assert_allclose(op(*arrays, **options), jnp.stack([*expected]), rtol=1e-5)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "stripe must divide the 12 tokens of a device; got 8", {"stripe": 8}),
        (ValueError, "stripe must divide the 12 tokens of a device; got 0", {"stripe": 0}),
        (TypeError, "stripe must be an integer; got 4.0", {"stripe": 4.0}),
        (ValueError, "one of xla, triton, mosaic_tpu; got 'ref", {"implementation": "reference"}),
        (ValueError, "of a width that 128 divides; got 4", {"implementation": "triton"}),
        (ValueError, "of a width that 128 divides; got 4", {"implementation": "mosaic_tpu"}),
        (TypeError, "segment_ids must have an integer dtype; got float32", {"segment_ids": True}),
        (ValueError, r"beta must have shape \[B,S,K\] = \(1, 12, 1\)", {"beta": 2}),
        (
            ValueError, "beta with float16 keys needs whole sequences: .* got 2 devices, K=1",
            {"beta": 1, "dtype": "float16"},
        ),
        (
            ValueError, "transitions need whole sequences: .* must divide K; got 2 devices, K=1",
            {"transitions": True},
        ),
    ],
)  # fmt: skip
def test_bad_calls_raise_one_line(error, message, arguments, monkeypatch):
    for backend in (pallas_mosaic_tpu, pallas_triton):
        monkeypatch.setattr(backend, "INTERPRET", True)
    x = jnp.zeros((1, 24, 1, 8))

    def op(q, k, v, ids):
        options = {"stripe": 4, **arguments}
        if options.pop("segment_ids", None):
            options["segment_ids"] = ids
        if "beta" in options:
            options["beta"] = jnp.ones((1, 12, options["beta"]))
        if "transitions" in options:
            options["transitions"] = Transitions(k, k[..., 0])
        q, k, v = (x.astype(options.get("dtype", x.dtype)) for x in (q, k, v))
        options.pop("dtype", None)
        return context_attention.lucid_attention(q, k, v, axis_name="x", **options)

    run = jax.shard_map(op, mesh=mesh_of(2), in_specs=SHARDED, out_specs=SHARDED, check_vma=False)
    with pytest.raises(error, match=message) as caught:
        jax.eval_shape(run, x, x, x, jnp.zeros((1, 24)))
    assert "\n" not in str(caught.value)


def traced_softmax(devices: int, heads: int, kv_heads: int, implementation: str | None) -> str:
    """Returns the jaxpr of softmax attention."""
    q, k = (jax.ShapeDtypeStruct((1, 24, n, 8), jnp.bfloat16) for n in (heads, kv_heads))
    op = functools.partial(
        context_attention.softmax_attention, axis_name="x", stripe=1, implementation=implementation
    )
    run = jax.shard_map(
        op, mesh=mesh_of(devices), in_specs=SHARDED, out_specs=SHARDED, check_vma=False
    )
    return str(jax.make_jaxpr(run)(q, k, k))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("devices", "heads", "kv_heads", "implementation", "exchanged"),
    [
        (8, 16, 1, None, True),
        (6, 12, 2, "cudnn", True),
        (6, 12, 2, "xla", False),
        (3, 6, 2, None, False),
        (2, 3, 1, None, False),
    ],
)
def test_query_heads_are_exchanged_for_a_library_where_they_divide(
    devices, heads, kv_heads, implementation, exchanged
):
    assert ("all_to_all" in traced_softmax(devices, heads, kv_heads, implementation)) == exchanged


@pytest.mark.skipif(ON_GPU, reason="on GPUs cuDNN takes whole sequences of heads")
def test_without_such_a_library_nothing_is_exchanged():
    assert "all_to_all" not in traced_softmax(2, 2, 1, None)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "implementation", "message"),
    [
        (6, 2, "reference", "devices must divide K, or divide H and be a multiple of K; got 3 dev"),
        (4, 1, "reference", "a multiple of K; got 3 devices, H=4, K=1"),
        (3, 1, "dense", "one of reference, xla, cudnn, triton, mosaic_gpu, splash; got 'dense'"),
    ],
)
def test_bad_softmax_calls_raise_one_line(heads, kv_heads, implementation, message):
    with pytest.raises(ValueError, match=message) as caught:
        traced_softmax(3, heads, kv_heads, implementation)
    assert "\n" not in str(caught.value)
