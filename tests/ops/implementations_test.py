"""The implementations that a program runs are named, and a slow one is explained."""

import jax
import jax.numpy as jnp
import pytest
from ops.interpreter import interpreted

from lucid_jax import Transitions, lucid_attention
from lucid_jax.ops import implementations, target


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a CPU has no kernels")
def test_a_program_names_its_implementations():
    x = jax.ShapeDtypeStruct((1, 8, 1, 16), jnp.float32)
    with implementations.recorded() as found:
        jax.eval_shape(lucid_attention, x, x, x)
    assert str(found) == "attention xla · solve xla"
    assert not found.fallbacks


@pytest.mark.parametrize("transitions", [False, True])
def test_a_gpu_takes_the_kernels(transitions):
    def run(x):
        path = Transitions(x, x[..., 0]) if transitions else None
        return lucid_attention(x, x, x, transitions=path)

    with interpreted("triton"), implementations.recorded() as found:
        jax.eval_shape(run, jax.ShapeDtypeStruct((1, 8, 1, 16), jnp.float32))
    assert str(found) == "attention triton · solve triton"


def test_a_missing_kernel_is_a_sentence(monkeypatch):
    monkeypatch.setattr(target, "platform", lambda: "gpu")
    monkeypatch.setattr(target, "device_kind", lambda: "NVIDIA H200")
    x = jax.ShapeDtypeStruct((1, 8, 1, 272), jnp.float32)
    with implementations.recorded() as found:
        jax.eval_shape(lucid_attention, x, x, x)
    assert str(found) == "attention xla · solve xla"
    attention, solve = sorted(found.fallbacks)
    assert attention.startswith("attention runs without a kernel on NVIDIA H200")
    assert "triton: it needs a head width of at most 256; got 272" in attention
    assert "triton: it needs a head width of at most 256; got 272" in solve
