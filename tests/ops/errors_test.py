# ruff: noqa: E501
"""Invalid calls fail before compilation; the error says what was expected and what it got."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.interpreter import ON_GPU, interpreted

from lucid_jax import Prefix, Transitions, lucid_attention, precondition, softmax_attention

K = jnp.zeros((2, 8, 2, 4))
Q = jnp.zeros((2, 8, 4, 4))
IDS = jnp.zeros((2, 8), jnp.int32)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"k must have shape \[B,S,K,D\]; got \(8, 2, 4\)", lambda: precondition(K[0], K)),
        (ValueError, r"at least one element on axis S", lambda: precondition(K[:, :0], K[:, :0])),
        (ValueError, r"v must have shape .* = \(2, 8, 2, 4\); got \(2, 8, 1, 4\)", lambda: precondition(K, K[:, :, :1])),
        (TypeError, r"v must have dtype float32; got bfloat16", lambda: precondition(K, K.astype(jnp.bfloat16))),
        (TypeError, r"k must have one of the dtypes .* got int32", lambda: precondition(K.astype(jnp.int32), K)),
        (TypeError, r"segment_ids must have an integer dtype; got float32", lambda: precondition(K, K, segment_ids=IDS * 1.0)),
        (ValueError, r"segment_ids must have shape \[B,S\] = \(2, 8\); got \(2, 7\)", lambda: precondition(K, K, segment_ids=IDS[:, 1:])),
        (ValueError, r"must be given together", lambda: precondition(K, K, segment_ids=IDS, prefix=Prefix(K, K))),
        (ValueError, r"prefix.k must have shape .* got \(1, 8, 2, 4\)", lambda: precondition(K, K, prefix=Prefix(K[:1], K[:1]))),
        (ValueError, r"prefix.length must have shape \[B\] = \(2,\); got \(\)", lambda: precondition(K, K, prefix=Prefix(K, K, length=jnp.int32(3)))),
        (ValueError, r"implementation must be None or one of reference, xla, triton, mosaic_tpu, mosaic_gpu; got 'cuda'", lambda: precondition(K, K, implementation="cuda")),
        (ValueError, r"precision must be None or 'highest'; got 'high'", lambda: precondition(K, K, precision="high")),
        (ValueError, r"beta must have shape \[B,S,K\] = \(2, 8, 2\); got \(2, 8\)", lambda: precondition(K, K, beta=IDS * 1.0)),
        (TypeError, r"beta must have one of the dtypes .* got int32", lambda: lucid_attention(Q, K, K, beta=K[..., 0].astype(jnp.int32))),
        (TypeError, r"beta must be an array; got float", lambda: precondition(K, K, beta=0.5)),
        (ValueError, r"H must be a multiple of K; got H=3 query heads, K=2", lambda: softmax_attention(Q[:, :, :3], K, K)),
        (ValueError, r"temperature must be positive, at least 1e-30; got 0", lambda: softmax_attention(Q, K, K, temperature=0)),
        (ValueError, r"at least 1e-30; got 1e-40", lambda: softmax_attention(Q, K, K, temperature=1e-40)),
        (TypeError, r"temperature must be a number; got str", lambda: softmax_attention(Q, K, K, temperature="1")),
        (TypeError, r"k must be an array; got list", lambda: precondition(K.tolist(), K)),
        (TypeError, r"v must be an array; got NoneType", lambda: precondition(K, None)),
        (TypeError, r"q must be an array; got NoneType", lambda: lucid_attention(None, K, K)),
        (TypeError, r"prefix must be a Prefix; got tuple", lambda: precondition(K, K, prefix=(K, K))),
        (TypeError, r"k has dtype float64, which needs jax_enable_x64; pass float32", lambda: precondition(np.zeros(K.shape), np.zeros(K.shape))),
        (TypeError, r"q has dtype float64, which needs jax_enable_x64", lambda: lucid_attention(np.zeros(Q.shape), K, K)),
        (ValueError, r"q and k must have the same length S; got 1 and 8", lambda: softmax_attention(Q[:, :1], K, K)),
        pytest.param(ValueError, r"implementation='cudnn' cannot run this call: it needs a GPU", lambda: softmax_attention(Q, K, K, implementation="cudnn"), marks=pytest.mark.skipif(ON_GPU, reason="it reports a missing GPU")),
        (TypeError, r"transitions must be Transitions; got tuple", lambda: precondition(K, K, transitions=(K, K))),
        (ValueError, r"transitions.w must have shape .* got \(2, 8, 4, 4\)", lambda: softmax_attention(Q, K, K, transitions=Transitions(Q, K[..., 0]))),
        (ValueError, r"transitions.beta must have shape \[B,S,K\] = \(2, 8, 2\); got \(2, 8, 2, 4\)", lambda: lucid_attention(Q, K, K, transitions=Transitions(K, K))),
        (TypeError, r"transitions.beta must have dtype float32; got int32", lambda: precondition(K, K, transitions=Transitions(K, K[..., 0].astype(int)))),
        (ValueError, r"transitions and prefix.transitions must be given together", lambda: precondition(K, K, prefix=Prefix(K, K), transitions=Transitions(K, K[..., 0]))),
        (ValueError, r"prefix.transitions.beta must have shape \[B,P,K\] = \(2, 8, 2\); got \(2, 8\)", lambda: precondition(K, K, prefix=Prefix(K, K, transitions=Transitions(K, K[..., 0, 0])), transitions=Transitions(K, K[..., 0]))),
        (ValueError, r"transitions must be given without beta; got both", lambda: precondition(K, K, beta=K[..., 0], transitions=Transitions(K, K[..., 0]))),
        (ValueError, r"implementation='mosaic_tpu' cannot run this call: it takes no transitions", lambda: precondition(K, K, transitions=Transitions(K, K[..., 0]), implementation="mosaic_tpu")),
        (ValueError, r"implementation='cudnn' cannot run this call: it takes no transitions", lambda: softmax_attention(Q, K, K, transitions=Transitions(K, K[..., 0]), implementation="cudnn")),
        (ValueError, r"q must have shape \[B,S,H,D\]", lambda: lucid_attention(Q[0], K, K)),
    ],
)  # fmt: skip
def test_error_messages(error, message, call):
    with pytest.raises(error, match=message):
        jax.eval_shape(call)


def test_numpy_arrays_and_empty_prefixes_are_taken():
    rng = np.random.default_rng(0)
    k = rng.normal(size=(2, 8, 2, 4)).astype(np.float32)
    y = precondition(k, k)
    empty = Prefix(k[:, :0], k[:, :0])
    np.testing.assert_array_equal(precondition(k, k, prefix=empty), y)


def test_second_derivatives_of_kernels_are_refused():
    def loss(k):
        return precondition(k, K, implementation="triton").sum()

    with interpreted("triton"), pytest.raises(NotImplementedError, match="no second derivatives"):
        jax.jvp(jax.grad(loss), (K,), (K,))


def test_a_symbolic_length_is_refused():
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("2, s, 2, 4"), jnp.float32)
    with pytest.raises(ValueError, match=r"k must have a shape of numbers; got \(2, s, 2, 4\)"):
        jax.export.export(jax.jit(precondition))(shape, shape)
