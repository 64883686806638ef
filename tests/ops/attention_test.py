"""Softmax and LUCID attention of every backend agree with the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops import oracle
from ops.cases import CASES, MANY_DOCUMENTS, WIDE_CASES, Case
from ops.conformance import LucidConformance, SoftmaxConformance, assert_close, slow
from ops.interpreter import ON_GPU

from lucid_jax import softmax_attention


class TestSoftmaxReference(SoftmaxConformance):
    implementation = "reference"
    modes = (("float64", "highest"), ("bfloat16", "highest"))
    quick = ("packed-float64-highest",)


class TestSoftmaxXla(SoftmaxConformance):
    implementation = "xla"
    modes = (("float64", "highest"), ("float32", "highest"), ("bfloat16", None))
    quick = ("packed-float64-highest", "cosine_0.9-bfloat16-None")


@pytest.mark.usefixtures("wide_panels")
class TestSoftmaxXlaWide(SoftmaxConformance):
    implementation = "xla"
    modes = (("float64", "highest"),)
    cases = WIDE_CASES


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
class TestSoftmaxCudnn(SoftmaxConformance):
    implementation = "cudnn"
    modes = (("bfloat16", None), ("float16", None))
    cases = tuple(
        case
        for case in CASES
        if case.segments == "none" and case.length % 2 == 0 and case.head_dim % 8 == 0
    )


@pytest.mark.usefixtures("triton_interpreter")
class TestSoftmaxTriton(SoftmaxConformance):
    implementation = "triton"
    modes = (("float32", "highest"), ("bfloat16", None), ("float16", None))
    # 300 rows are three blocks; longer cases take minutes in the interpreter.
    cases = (
        *(case for case in CASES if ON_GPU or case.length <= 300),
        Case("width_128_packed", length=300, head_dim=128, segments="packed"),
        Case("width_256", length=100, head_dim=256),
        MANY_DOCUMENTS,
    )
    quick = ("many-bfloat16-None",)


@pytest.mark.usefixtures("mosaic_interpreter")
class TestSoftmaxSplash(SoftmaxConformance):
    implementation = "splash"
    modes = (("bfloat16", None),)
    quick = ("packed-bfloat16-None",)


class TestLucidXla(LucidConformance):
    """Tests the composition; the solve and the softmax have their own tests."""

    implementation = "xla"
    modes = (("float32", "highest"), ("bfloat16", None))
    cases = tuple(case for case in CASES if case.length < 300 or case.keys != "random")
    quick = ("packed_identical-bfloat16-None",)


@pytest.mark.parametrize("implementation", ["xla", *slow("reference")])
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_temperature_divides_the_logits(implementation, temperature):
    drawn = Case("temperature", length=70).draw()
    q, k, v = (jnp.asarray(drawn[name], jnp.float32) for name in "qkv")
    out = softmax_attention(q, k, v, temperature=temperature, implementation=implementation)
    ref = oracle.softmax_attention(*(np.asarray(x) for x in (q, k, v)), temperature=temperature)
    assert_close("out", out, ref, 1e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_infinite_logits_stay_in_their_row(implementation):
    """Both tokens have logits of −inf and tie: the first sees itself, the second both."""
    q, k = jnp.full((1, 2, 1, 8), 1e20), jnp.full((1, 2, 1, 8), -1e20)
    v = jnp.arange(16.0).reshape(1, 2, 1, 8)
    for sign in (1, -1):
        o = softmax_attention(sign * q, k, v, implementation=implementation)
        np.testing.assert_allclose(o[0, :, 0], [v[0, 0, 0], v[0, :, 0].mean(0)], rtol=1e-6)


@pytest.mark.parametrize("temperature", [1e-2, 1e-4, 1e-6])
def test_tied_large_logits_have_exact_gradients(temperature):
    """The logarithm of the norm, at most 6 here, is lost beside a logit of 10⁷ in float32."""
    rng = np.random.default_rng(0)
    k = jnp.asarray(np.broadcast_to(rng.normal(size=(1, 1, 1, 16)), (1, 200, 1, 16)), jnp.float32)
    v = jnp.asarray(rng.normal(size=(1, 200, 1, 16)), jnp.float32)

    def op(v, implementation):
        return softmax_attention(k, k, v, temperature=temperature, implementation=implementation)

    o, pull_back = jax.vjp(lambda v: op(v, "xla"), v)
    _, expected = jax.vjp(lambda v: op(v, "reference"), v)
    (found,), (expected,) = pull_back(o), expected(o)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_temperature_may_be_any_number(dtype):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 20, 2, 8)), dtype) for _ in range(3))
    expected = softmax_attention(q, k, v, temperature=0.5)
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    for temperature in (np.float64(0.5), np.float32(0.5), jnp.float32(0.5)):
        o = softmax_attention(q, k, v, temperature=temperature)
        np.testing.assert_allclose(*(np.asarray(x, float) for x in (o, expected)), atol=tolerance)


def test_a_temperature_may_be_learnt():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 20, 2, 8)), jnp.float32) for _ in range(3))

    def loss(temperature):
        return softmax_attention(q, k, v, temperature=temperature).sum()

    gradient = jax.jit(jax.grad(loss))(jnp.float32(0.5))
    step = 2**-6
    difference = (loss(0.5 + step) - loss(0.5 - step)) / (2 * step)
    np.testing.assert_allclose(gradient, difference, rtol=0.03)
