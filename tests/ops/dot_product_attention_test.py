# ruff: noqa: E501
"""`dot_product_attention` is that of JAX over the oracle's preconditioned values, or refuses."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops import oracle

import lucid_jax
from lucid_jax import Prefix
from lucid_jax.ops.decode import LayerCache, decode_attention

S = 12
CAUSAL = np.tril(np.ones((S, S), bool))[None, None]
ENDS = np.arange(S) < np.array([[S], [7]])
STARTS = np.arange(S) >= np.array([[0], [3]])
IDS = np.array([[4] * 5 + [9] * 7, [1] * 2 + [0] * 6 + [2] * 4])
SAME = (IDS[:, :, None] == IDS[:, None])[:, None]


def draw(h=4, k=2, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, S, heads, 8)), dtype) for heads in (h, k, k)]


def pairs(tokens):
    return (tokens[:, :, None] & tokens[:, None])[:, None]


# The arguments, the segments of the oracle, and the tokens that are no padding.
ALL = np.ones((2, S), bool)
CASES = {
    "is_causal": ({"is_causal": True}, None, ALL),
    "scale": ({"is_causal": True, "scale": 0.2}, None, ALL),
    "causal_mask": ({"mask": CAUSAL}, None, ALL),
    "jax_mask": ({"mask": jnp.asarray(CAUSAL[0])}, None, ALL),
    "segments": ({"mask": CAUSAL & SAME}, IDS, ALL),
    "segments_and_is_causal": ({"mask": SAME, "is_causal": True}, IDS, ALL),
    "hidden_ends": ({"mask": CAUSAL & pairs(ENDS)}, None, ENDS),
    "hidden_starts": ({"mask": CAUSAL & pairs(STARTS)}, ~STARTS, STARTS),
    "hidden_keys": ({"mask": STARTS[:, None, None], "is_causal": True}, ~STARTS, STARTS),
    "query_lengths": ({"is_causal": True, "query_seq_lengths": jnp.array([S, 7])}, None, ENDS),
    "key_lengths": ({"is_causal": True, "key_value_seq_lengths": jnp.array([S, 7])}, None, ENDS),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_that_of_jax_over_preconditioned_values(name):
    arguments, segments, tokens = CASES[name]
    q, k, v = draw()
    o = lucid_jax.dot_product_attention(q, k, v, **arguments)
    y = jnp.asarray(oracle.precondition(k, v, segments), jnp.float32)
    expected = jax.nn.dot_product_attention(q, k, y, **arguments)
    expected = np.where(tokens[..., None, None], expected, 0)
    np.testing.assert_allclose(o, expected, atol=1e-5)


def test_one_sequence_lengths_under_jit_and_own_ids():
    q, k, v = draw()
    o = lucid_jax.lucid_attention(q, k, v, segment_ids=IDS)
    op = lucid_jax.dot_product_attention
    np.testing.assert_array_equal(op(q, k, v, is_causal=True, segment_ids=IDS), o)
    np.testing.assert_array_equal(op(q[0], k[0], v[0], mask=(CAUSAL & SAME)[0]), o[0])
    constant = jnp.asarray(CAUSAL & SAME)
    np.testing.assert_allclose(jax.jit(lambda q: op(q, k, v, mask=constant))(q), o, atol=1e-6)
    cut = jax.jit(lambda n: op(q, k, v, is_causal=True, query_seq_lengths=n))(np.array([3, 0]))
    assert (np.asarray(cut != 0).any((2, 3)).sum(1) == [3, 0]).all()


def test_its_arguments_are_those_of_jax():
    own, theirs = (
        inspect.signature(module.dot_product_attention).parameters for module in (lucid_jax, jax.nn)
    )
    for name, expected in theirs.items():
        assert (own[name].kind, own[name].default) == (expected.kind, expected.default), name


Q, K, V = draw()
WINDOW = CAUSAL & ~np.tril(np.ones((S, S), bool), -3)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "causal: pass is_causal=True", {}),
        (ValueError, "does not support bias", {"bias": jnp.zeros((1, 1, S, S)), "is_causal": True}),
        (ValueError, "does not support local_window_size", {"local_window_size": 3, "is_causal": True}),
        (ValueError, "does not support return_residual", {"return_residual": True, "is_causal": True}),
        (ValueError, "query 3 of sequence 0 does not see key 0", {"mask": WINDOW}),
        (ValueError, "query 0 of sequence 1 sees key 1", {"mask": np.concatenate([CAUSAL, SAME[1:]])}),
        (ValueError, "same for all heads", {"mask": np.concatenate([CAUSAL, WINDOW, CAUSAL, CAUSAL], 1)}),
        (ValueError, r"broadcastable to \[B,H,S,S\] = \(2, 4, 12, 12\); got \(3, 1, 12, 12\)", {"mask": np.repeat(CAUSAL, 3, 0)}),
        (TypeError, "mask must have dtype bool; got float32", {"mask": CAUSAL.astype(np.float32)}),
        (ValueError, "mask and segment_ids cannot", {"mask": CAUSAL, "segment_ids": IDS}),
        (ValueError, "scale must be positive; got -1", {"is_causal": True, "scale": -1}),
        (ValueError, r"query_seq_lengths must have shape \[B\] = \(2,\)", {"is_causal": True, "query_seq_lengths": jnp.int32(3)}),
        (ValueError, "one of reference, xla, triton, mosaic_tpu, mosaic_gpu; got 'cudnn'", {"is_causal": True, "implementation": "cudnn"}),
    ],
)  # fmt: skip
def test_what_it_cannot_do_it_refuses_by_name(error, message, arguments):
    with pytest.raises(error, match=message):
        lucid_jax.dot_product_attention(Q, K, V, **arguments)


def test_a_traced_mask_is_refused():
    with pytest.raises(ValueError, match="mask must be known before compilation"):
        jax.jit(lambda mask: lucid_jax.dot_product_attention(Q, K, V, mask=mask))(CAUSAL)


SWAPPED = [x.swapaxes(1, 2) for x in (Q, K, V)]


@pytest.mark.parametrize(
    "call",
    [
        lambda: lucid_jax.dot_product_attention(*SWAPPED, is_causal=True),
        lambda: lucid_jax.lucid_attention(*SWAPPED),
        lambda: lucid_jax.lucid_attention(*(SWAPPED[0],) * 3, segment_ids=IDS),
        lambda: lucid_jax.precondition(SWAPPED[1], SWAPPED[2], segment_ids=IDS),
    ],
)
def test_arrays_with_heads_first_are_refused_where_shapes_tell(call):
    with pytest.raises(ValueError, match=r"swap axes 1 and 2 of arrays \[B,H,S,D\]"):
        call()


def test_more_heads_than_any_model_has_are_a_warning():
    x = jnp.zeros((1, 4, 300, 8))
    with pytest.warns(
        UserWarning, match=r"k has 300 heads of 4 tokens; if it is \[B,H,S,D\], swap"
    ):
        assert lucid_jax.precondition(x, x).shape == x.shape


def run_all(ids, lengths):
    """Calls every op that takes ids or lengths."""
    q, k, v = draw()
    prefix = Prefix(k[:, :5], v[:, :5], ids[:, :5], lengths)
    cached = LayerCache(*(x.swapaxes(1, 2) for x in (k, v)), None)
    return [
        lucid_jax.lucid_attention(q, k, v, segment_ids=ids),
        lucid_jax.softmax_attention(q, k, v, segment_ids=ids),
        lucid_jax.precondition(k, v, segment_ids=ids, prefix=prefix),
        decode_attention(q[:, 0], k[:, 0], v[:, 0], cached, lengths)[0],
        lucid_jax.dot_product_attention(
            q, k, v, is_causal=True, segment_ids=ids, query_seq_lengths=lengths
        ),
    ]


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_segment_ids_and_lengths_may_have_any_integer_dtype(make, x64):
    lengths = np.array([4, 5])
    expected = run_all(IDS.astype(np.int32), lengths.astype(np.int32))
    # Only the low 32 bits of an id count.
    wide = IDS + np.arange(S) % 2 * 2**32
    with jax.enable_x64(x64):
        found = [
            run_all(make(wide), make(lengths)),
            run_all(*(make(x.astype(np.uint8)) for x in (IDS, lengths))),
        ]
    for results in found:
        jax.tree.map(np.testing.assert_array_equal, results, expected)
