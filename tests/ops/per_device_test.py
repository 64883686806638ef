"""Ops in sharded programs: explicit mesh axes, and `jax.shard_map` with its default checks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from ops.conformance import slow
from ops.interpreter import interpreted

import lucid_jax
from lucid_jax.ops.attention import api as attention_api
from lucid_jax.ops.decode import LayerCache, PathCache, decode_attention, decode_path_attention
from lucid_jax.ops.precondition import api
from lucid_jax.ops.precondition.gram import inverse_norms

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="the mesh needs four devices")

B, S, H, K, D = 4, 24, 4, 2, 8
SPECS = {
    "sequences": PartitionSpec("a"),
    "heads": PartitionSpec(None, None, "a"),
    "both": PartitionSpec("a", None, "b"),
    "two_axes": PartitionSpec(("a", "b")),
}


def mesh_of(axis_type: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("a", "b"), (axis_type,) * 2, devices=jax.devices()[:4])


def draw(kv_heads: int = K):
    """Draws q, k, v and the segment ids of packed rows."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(B, S, heads, D)), jnp.float32)
        for heads in (H, kv_heads, kv_heads)
    )
    return q, k, v, jnp.asarray(np.sort(rng.integers(-2, 2, (B, S)), 1), jnp.int32)


def lucid(q, k, v, ids, implementation=None):
    beta = jax.nn.sigmoid(v[..., 0])
    return lucid_jax.lucid_attention(
        q, k, v, segment_ids=ids, beta=beta, implementation=implementation
    )


def softmax(q, k, v, ids, implementation=None):
    return lucid_jax.softmax_attention(q, k, v, segment_ids=ids, implementation=implementation)


def precondition(q, k, v, ids, implementation=None):
    """The queries are a prefix that ends a segment."""
    q = q[:, :, :: q.shape[2] // k.shape[2]]
    prefix = lucid_jax.Prefix(q, q, ids)
    return lucid_jax.precondition(
        k, v, segment_ids=ids, prefix=prefix, implementation=implementation
    )


def path(q, k, v, ids, implementation=None):
    transitions = lucid_jax.Transitions(v, 2 * jax.nn.sigmoid(k[..., 0]))
    return lucid_jax.lucid_attention(
        q, k, v, segment_ids=ids, transitions=transitions, implementation=implementation
    )


def with_gradients(op, implementation=None):
    """Returns a function of q, k, v and ids: the result, and the gradient of its squares."""

    def run(q, k, v, ids):
        out, pull_back = jax.vjp(lambda *x: op(*x, ids, implementation), q, k, v)
        return out, *pull_back(out)

    return run


OPS = {"lucid": lucid, "softmax": softmax, "precondition": precondition, "path": path}
# Softmax attention has no kernels of its own.
SLOW_RUNS = [
    *(f"{op}-reference" for op in OPS),
    *(
        f"{op}-{kernels}"
        for op in ("lucid", "precondition")
        for kernels in ("triton", "mosaic_tpu")
    ),
]
RUNS = [*(f"{op}-xla" for op in OPS), *slow(*SLOW_RUNS)]


def put(arrays, mesh, spec):
    """Shards arrays of four axes as `spec` says, and others along their first axis alike."""
    return [
        jax.device_put(
            x, jax.NamedSharding(mesh, spec if x.ndim == 4 else PartitionSpec(*spec[:1]))
        )
        for x in arrays
    ]


def assert_same(out, expected):
    for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def check_explicit_axes(name, implementation, spec):
    op, arrays = OPS[name], draw()
    with interpreted(implementation):
        run = jax.jit(with_gradients(op, implementation))
        out = run(*put(arrays, mesh_of(AxisType.Explicit), spec))
        assert_same(out, run(*arrays))
    for x in out:
        assert jax.typeof(x).sharding.spec == PartitionSpec(*spec, *[None] * (4 - len(spec)))


@pytest.mark.parametrize("run", RUNS)
def test_arrays_on_explicit_axes(run):
    check_explicit_axes(*run.split("-"), SPECS["both"])


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("spec", ["sequences", "heads", "two_axes"])
def test_any_split_of_explicit_axes(spec, op):
    check_explicit_axes(op, "xla", SPECS[spec])


def test_eager_calls_on_explicit_axes():
    arrays, mesh = draw(), mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        out = lucid(*put(arrays, mesh, SPECS["both"]))
    assert_same(out, lucid(*arrays))


@pytest.mark.parametrize("spec", ["both", "sequences"])
def test_vmap_over_an_explicit_axis(spec):
    """The mapped axis is sharded; along it each sequence is an op of its own."""
    arrays = draw()

    def one(*arrays):
        return [x[0] for x in with_gradients(lucid)(*(x[None] for x in arrays))]

    run = jax.jit(jax.vmap(one))
    out = run(*put(arrays, mesh_of(AxisType.Explicit), SPECS[spec]))
    assert_same(out, jax.jit(with_gradients(lucid))(*arrays))
    assert jax.typeof(out[0]).sharding.spec[0] == "a"


def test_more_devices_than_kv_heads():
    """Two devices share a KV head; its gradient is the sum of their shares."""
    q, k, v, ids = draw(kv_heads=1)
    mesh = mesh_of(AxisType.Explicit)
    sharded = put([q], mesh, SPECS["both"]) + put([k, v, ids], mesh, SPECS["sequences"])
    run = jax.jit(with_gradients(softmax))
    assert_same(run(*sharded), run(q, k, v, ids))


def test_decode_on_explicit_axes():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, n, D)), jnp.float32) for n in (H, K, K))
    keys, y = (jnp.asarray(rng.normal(size=(B, K, S, D)), jnp.float32) for _ in range(2))
    cached = LayerCache(keys, y, inverse_norms(keys))
    length, beta = jnp.asarray([0, 5, 24, 9], jnp.int32), jax.nn.sigmoid(v[..., 0])
    mesh, spec = mesh_of(AxisType.Explicit), PartitionSpec("a", "b")

    def shard(x):
        return jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec(*spec[: x.ndim])))

    out = jax.jit(decode_attention)(
        *jax.tree.map(shard, (q, k, v, cached, length)), beta=shard(beta)
    )
    assert_same(out, decode_attention(q, k, v, cached, length, beta=beta))
    assert all(jax.typeof(x).sharding.spec[:2] == ("a", "b") for x in jax.tree.leaves(out))


def test_decode_with_transitions_on_explicit_axes():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, S, n, D)), jnp.float32) for n in (H, K, K))
    transitions = lucid_jax.Transitions(v, jax.nn.sigmoid(k[..., 0]))
    places = jnp.zeros((B, K, S + 1, D))
    mesh, length = mesh_of(AxisType.Explicit), jnp.full(B, S, jnp.int32)

    @jax.jit
    def run(q, k, v, transitions, places, length):
        layer = LayerCache(places, places, places[..., 0])
        cached = PathCache.from_tokens(layer, k, transitions)
        new = jax.tree.map(lambda x: x[:, 0], (q, k, v, transitions))
        return decode_path_attention(*new, cached, length)

    def shard(x, *spec):
        return jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec(*spec)))

    tokens = jax.tree.map(lambda x: shard(x, "a", None, "b"), (q, k, v, transitions))
    out = run(*tokens, shard(places, "a", "b"), shard(length, "a"))
    assert_same(out, run(q, k, v, transitions, places, length))


@pytest.mark.parametrize("run", RUNS)
def test_shard_map_checks_the_op(run):
    """With its default check_vma, differentiated from outside; the values are on every device."""
    name, implementation = run.split("-")
    op, (q, k, v, ids) = OPS[name], draw()
    spec, mesh = SPECS["both"], mesh_of(AxisType.Auto)
    in_specs = spec, spec, PartitionSpec(None, None, "b"), PartitionSpec("a")
    v = v[:1]

    def on_one_device(q, k, v, ids):
        return op(q, k, jnp.broadcast_to(v, k.shape), ids, implementation)

    with interpreted(implementation):
        mapped = jax.shard_map(on_one_device, mesh=mesh, in_specs=in_specs, out_specs=spec)
        out = jax.jit(with_gradients(lambda q, k, v, ids, _: mapped(q, k, v, ids)))(q, k, v, ids)
        whole = with_gradients(lambda q, k, v, ids, _: on_one_device(q, k, v, ids))
        assert_same(out, jax.jit(whole)(q, k, v, ids))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([(None, "a")] * 3, r"\[B,S,H,D\] can be sharded along B and its heads; got S over 'a'"),
        ([("a",), ("b",), ("b",)], r"sharded alike along B; got 'a', 'b'"),
    ],
)
def test_errors(specs, message):
    mesh = mesh_of(AxisType.Explicit)
    arrays = [
        jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec(*spec)))
        for x, spec in zip(draw(), specs)
    ]
    with pytest.raises(ValueError, match=message):
        jax.jit(lucid_jax.softmax_attention)(*arrays)


def test_eager_calls_are_compiled_once():
    q, k, v, ids = draw()
    for op, compiled in (
        (lucid_jax.precondition, api._precondition),
        (lucid_jax.softmax_attention, attention_api._attention),
    ):
        arguments = (k, v) if op is lucid_jax.precondition else (q, k, v)
        op(*arguments, segment_ids=ids)
        size = compiled._cache_size()
        op(*arguments, segment_ids=ids)
        assert compiled._cache_size() == size > 0
