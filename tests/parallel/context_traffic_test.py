"""Context parallelism: the collectives of a layer, as its docstring says, in compiled text."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from lucid_jax.ops.remat import saves_attention
from lucid_jax.parallel import context_attention
from lucid_jax.training.hlo import Traffic, collectives

SHARDED = PartitionSpec(None, "x")


def compiled_layer(op, devices: int, *, heads: int, kv_heads: int, packed: bool, stripe: int = 64):
    """Compiles a layer's attention, forward and backward; returns the text, B, S, D and N."""
    b, s, d = 2, 512 * devices, 8
    q, k = (jax.ShapeDtypeStruct((b, s, n, d), jnp.float32) for n in (heads, kv_heads))
    ids = jax.ShapeDtypeStruct((b, s), jnp.int32)
    mesh = jax.make_mesh((devices,), ("x",), (AxisType.Auto,), devices=jax.devices()[:devices])

    def on_one_device(q, k, v, ids):
        return op(q, k, v, axis_name="x", stripe=stripe, segment_ids=ids if packed else None)

    layer = jax.shard_map(
        on_one_device, mesh=mesh, in_specs=SHARDED, out_specs=SHARDED, check_vma=False
    )

    def run(q, k, v, ids):
        o, pull_back = jax.vjp(lambda *x: layer(*x, ids), q, k, v)
        return o, pull_back(o)

    sharding = jax.sharding.NamedSharding(mesh, SHARDED)
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in (q, k, k, ids)]
    return jax.jit(run).lower(*arguments).compile().as_text(), b, s, d, s // devices // stripe


def largest_array(text: str) -> int:
    """Returns the elements of the largest array in the text of a program."""
    shapes = re.findall(r"[a-z]\w*\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize(
    ("devices", "packed"), [(3, True), pytest.param(4, False, marks=pytest.mark.slow)]
)
def test_a_lucid_layer_sends_what_the_docstring_says(devices, packed):
    text, b, s, d, n = compiled_layer(
        context_attention.lucid_attention, devices, heads=6, kv_heads=2, packed=packed
    )
    keys, ids, residuals = 4 * b * s * 2 * d, 4 * b * s, 4 * b * s * 2 * d
    bad_tokens = b * s * 2
    sent = keys + packed * ids + 2 * residuals + 2 * bad_tokens
    assert collectives(text) == {
        "all-gather": Traffic(1 + packed + 2 * n + 2, sent),
        "reduce-scatter": Traffic(2, 2 * residuals // devices),
    }
    assert largest_array(text) < s * s // devices


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "solves"), [(saves_attention, 2), (None, 3)])
def test_rematerialisation_can_save_the_solution(policy, solves):
    def op(*arrays, **options):
        layer = functools.partial(context_attention.lucid_attention, **options)
        return jax.checkpoint(layer, policy=policy)(*arrays)

    text, *_, n = compiled_layer(op, 3, heads=6, kv_heads=2, packed=False)
    # Each step of a solve gathers residuals, and each pass keys and bad tokens, or bad tokens
    # alone. What two passes gather alike is gathered once where the compiler sees that (jax 0.10).
    assert collectives(text)["all-gather"].count - solves * n in (3, 4, 5)


@pytest.mark.slow
@pytest.mark.usefixtures("library")
def test_rematerialisation_can_save_the_softmax_of_query_heads():
    def loops(**remat):
        def op(*arrays, **options):
            layer = functools.partial(context_attention.softmax_attention, **options)
            return jax.checkpoint(layer, **remat)(*arrays) if remat else layer(*arrays)

        text, *_ = compiled_layer(op, 2, heads=2, kv_heads=1, packed=False)
        return text.count(" while(")

    assert loops(policy=saves_attention) == loops() < loops(policy=None)


def test_a_softmax_layer_sends_what_the_docstring_says():
    text, b, s, d, _ = compiled_layer(
        context_attention.softmax_attention, 4, heads=6, kv_heads=2, packed=False
    )
    assert collectives(text) == {
        "all-gather": Traffic(2, 2 * 4 * b * s * 2 * d),
        "reduce-scatter": Traffic(2, 2 * 4 * b * s // 4 * 2 * d),
    }


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "op", [pytest.param("lucid_attention", marks=pytest.mark.slow), "softmax_attention"]
)
def test_by_query_heads_a_layer_also_exchanges_queries_and_outputs(op):
    text, b, s, d, n = compiled_layer(
        getattr(context_attention, op), 4, heads=8, kv_heads=2, packed=True
    )
    found, keys, ids = collectives(text), 4 * b * s * 2 * d, 4 * b * s
    # Queries, outputs, and their gradients; everything else as by stripes.
    assert found.pop("all-to-all") == Traffic(4, 4 * 4 * b * s // 4 * 8 * d)
    # Keys, residuals and bad tokens, or keys and values.
    gathers, sent = 2, 2 * keys
    if op == "lucid_attention":
        gathers, sent = 1 + 2 * n + 2, 3 * keys + 2 * b * s * 2
    assert found == {
        "all-gather": Traffic(1 + gathers, ids + sent),
        "reduce-scatter": Traffic(2, 2 * keys // 4),
    }


def test_by_heads_a_layer_exchanges_everything_both_ways():
    text, b, s, d, _ = compiled_layer(
        context_attention.lucid_attention, 2, heads=6, kv_heads=2, packed=True
    )
    found = collectives(text)
    # q, k, v, o and their gradients; and the segment ids are gathered.
    assert found.pop("all-to-all") == Traffic(8, 2 * 4 * b * s // 2 * (6 + 2 + 2 + 6) * d)
    assert found == {"all-gather": Traffic(1, 4 * b * s)}
