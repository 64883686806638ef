# ruff: noqa: E501
"""LUCID attention in Flax's modules and in our own agrees with the float64 oracle, or refuses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, PartitionSpec
from ops import oracle
from ops.conformance import slow

from lucid_jax.flax import LucidAttention, attention_fn
from lucid_jax.ops import rope

B, S, E = 2, 10, 16
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, S, E)), jnp.float32)
IDS = np.repeat(np.array([[0] * 4 + [1] * 6, [3] * 9 + [2]]), 1, 0)
CAUSAL = nnx.make_causal_mask(X[..., 0])
SEGMENTS = nnx.combine_masks(CAUSAL, nnx.make_attention_mask(IDS, IDS, jnp.equal))
causal_fn = partial(attention_fn, is_causal=True)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, atol=2e-5)


def attend(q, k, v, ids=None):
    y = oracle.precondition(k, v, ids)
    return jnp.asarray(oracle.softmax_attention(q, k, y, ids), jnp.float32)


def nnx_layer(kv_heads=2, **options):
    return nnx.MultiHeadAttention(
        4, E, num_kv_heads=kv_heads, rngs=nnx.Rngs(0), decode=False, attention_fn=attention_fn,
        **options,
    )  # fmt: skip


def linen_layer(**options):
    layer = linen.MultiHeadDotProductAttention(4, **{"attention_fn": attention_fn, **options})
    return layer, layer.init(
        {"params": jax.random.key(0), "dropout": jax.random.key(1)}, X, mask=CAUSAL
    )


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [({"is_causal": True}, None), ({"mask": CAUSAL}, None), ({"mask": SEGMENTS}, IDS)],
    ids=["is_causal", "causal_mask", "segments"],
)
def test_nnx_attention(arguments, ids):
    layer = nnx_layer()
    expected = layer.out(attend(layer.query(X), layer.key(X), layer.value(X), ids))
    assert_close(nnx.jit(lambda layer, x: layer(x, **arguments))(layer, X), expected)


@pytest.mark.parametrize(
    ("fn", "mask", "ids"),
    [(causal_fn, None, None), (attention_fn, CAUSAL, None), (attention_fn, SEGMENTS, IDS)],
    ids=["by_name", "causal_mask", "segments"],
)
def test_linen_attention(fn, mask, ids):
    layer, variables = linen_layer()
    params = variables["params"]

    def project(name):
        p = params[name]
        return jnp.einsum("bse,ehd->bshd", X, p["kernel"]) + p["bias"]

    o = attend(*map(project, ("query", "key", "value")), ids)
    expected = jnp.einsum("bshd,hde->bse", o, params["out"]["kernel"]) + params["out"]["bias"]
    layer = layer.clone(attention_fn=fn)
    assert_close(jax.jit(partial(layer.apply, mask=mask))(variables, X), expected)


def test_more_batch_axes_and_none():
    q, k, v = (jnp.asarray(x) for x in np.random.default_rng(1).normal(size=(3, 2, 3, S, 4, 8)))
    expected = attend(*(x.reshape(6, S, 4, 8) for x in (q, k, v))).reshape(q.shape)
    run = jax.jit(partial(attention_fn, mask=CAUSAL[:, None]))
    assert_close(run(q, k, v), expected)
    assert_close(attention_fn(q, k, v, mask=np.tri(S)), expected)
    assert_close(attention_fn(q[0, 0], k[0, 0], v[0, 0], mask=CAUSAL[0]), expected[0, 0])


def test_one_query_takes_a_mask_of_fewer_axes():
    """Keys that it hides are not solved; a query that sees no key is padding."""
    q, k, v = (jnp.asarray(x) for x in np.random.default_rng(2).normal(size=(3, 2, 5, 4, 8)))
    shown = np.arange(5) >= 2
    expected = attend(q[:, 2:], k[:, 2:], v[:, 2:])[:, -1:]
    for axes in range(4):
        mask = shown.reshape(*[1] * axes, 5)
        assert_close(attention_fn(q[:, -1:], k, v, mask=mask), expected)
    hidden = attention_fn(q[:, -1:], k, v, mask=np.zeros((1, 5), bool))
    np.testing.assert_array_equal(hidden, np.zeros_like(hidden))


def test_nnx_decodes_what_it_computes_at_once():
    layer = nnx_layer()
    expected = layer(X, is_causal=True)
    layer.init_cache(X.shape)
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    found = [step(layer, X[:, t : t + 1]) for t in range(S)]
    assert_close(jnp.concatenate(found, 1), expected)


def test_linen_decodes_what_it_computes_at_once():
    """Hidden tokens at the start are no part of the system that a step solves."""
    padding = 3
    layer, variables = linen_layer(attention_fn=causal_fn)
    expected = layer.apply(variables, X[:, padding:])
    decoder = layer.clone(decode=True)
    cache = decoder.init(jax.random.key(0), X)["cache"]
    mask = jnp.broadcast_to(jnp.arange(S) >= padding, (B, 1, 1, S))

    @jax.jit
    def step(cache, x):
        return decoder.apply(variables | {"cache": cache}, x, mask=mask, mutable=["cache"])

    found = []
    for t in range(S):
        o, updated = step(cache, X[:, t : t + 1])
        cache, found = updated["cache"], [*found, o]
    assert_close(jnp.concatenate(found[padding:], 1), expected)


def with_attention(**options):
    return partial(attention_fn, X[..., None], X[..., None], X[..., None], **options)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("support dropout", lambda: nnx_layer(dropout_rate=0.1)(X, is_causal=True, deterministic=False)),
        ("support sow_weights", lambda: nnx_layer()(X, is_causal=True, sow_weights=True)),
        ("support bias", with_attention(bias=CAUSAL)),
        ("support qk_attn_weights_einsum", with_attention(qk_attn_weights_einsum=jnp.einsum)),
        ("is causal: pass is_causal=True", lambda: nnx_layer()(X)),
        ("mask must be known before compilation", lambda: nnx.jit(lambda m: nnx_layer()(X, mask=m))(CAUSAL)),
        ("mask must be causal", lambda: nnx_layer()(X, mask=jnp.ones((1, 1, S, S)))),
        ("support dropout", lambda: linen_layer(dropout_rate=0.1, deterministic=False)),
        ("support sow_weights", lambda: linen_layer()[0].init(jax.random.key(0), X, sow_weights=True)),
        ("must have the same length S; got 10 and 4", lambda: nnx_layer()(X, X[:, :4], is_causal=True)),
        ("num_kv_heads must divide", lambda: module(num_kv_heads=3)),
        ("decode=True needs a cache", lambda: module()(X, decode=True)),
        ("decode=True does not support segment_ids", lambda: cached(S)(X, decode=True, segment_ids=IDS)),
        ("the cache has 2 sequences of 9 tokens, 0 of them taken", lambda: cached(9)(X, decode=True)),
    ],
)  # fmt: skip
def test_what_it_cannot_do_it_refuses_by_name(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def module(**options):
    return LucidAttention(4, E, rngs=nnx.Rngs(1), **{"num_kv_heads": 2, **options})


def cached(size):
    layer = module()
    layer.init_cache(B, size)
    return layer


@pytest.mark.parametrize(
    ("base", "ids"), [(100.0, IDS), pytest.param(None, None, marks=pytest.mark.slow)]
)
def test_our_module(base, ids):
    layer = module(rope_base=base, use_bias=True)
    q, k, v = layer.query(X), layer.key(X), layer.value(X)
    if base is not None:
        turns = rope.rotations(jnp.arange(S)[None], rope.frequencies(4, base, "none", 1.0, 1))
        q, k = rope.rotate(q, *turns), rope.rotate(k, *turns)
    expected = layer.out(attend(q, k, v, ids))

    def loss(layer):
        o = layer(X, segment_ids=ids)
        return jnp.sum(o**2), o

    (_, o), gradients = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(layer)
    assert_close(o, expected)
    assert all((np.asarray(x) != 0).any() for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize("cuts", [(6, 7, 8, 9), *slow((1, 2, 3, 7), (S,))])
def test_our_module_decodes_in_chunks_of_any_size(cuts):
    layer = cached(S)
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    found = [step(layer, x) for x in jnp.split(X, cuts, 1) if x.shape[1]]
    assert_close(jnp.concatenate(found, 1), module()(X))
    assert np.isnan(step(layer, X[:, :1])).all(), "the cache is full"


@pytest.mark.parametrize("kind", [AxisType.Explicit, *slow(AxisType.Auto)])
def test_our_module_is_placed_by_logical_axes(kind):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    rules = [("embed", None), ("heads", "model"), ("kv_heads", "model")]
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        layer = module(logical_axes=True)
        assert layer.key.kernel[...].sharding.spec == PartitionSpec(None, "model", None)
        assert layer.out.kernel[...].sharding.spec == PartitionSpec("model", None, None)
        x = jax.device_put(X, PartitionSpec("data"))
        # Explicit axes have to be told where the result of a split contraction goes.
        out_sharding = PartitionSpec("data") if kind == AxisType.Explicit else None
        o = nnx.jit(lambda layer, x: layer(x, out_sharding=out_sharding))(layer, x)
    assert_close(o, module()(X))
