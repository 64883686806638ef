"""Rows spread over devices: the same output and gradients as on one, and nothing sent in vain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from ops.cases import CASES, Case
from ops.conformance import LucidConformance, PreconditionConformance, SoftmaxConformance

from lucid_jax import sequence_parallel
from lucid_jax.ops.precondition import pallas_mosaic_tpu, pallas_triton
from lucid_jax.ops.precondition.diagnostics import largest_off_diagonal
from lucid_jax.stripes import Stripes

MODES = (("float32", "highest"), ("bfloat16", None))
ROWS = PartitionSpec(None, "x")


def mesh_of(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), ("x",), (AxisType.Auto,), devices=jax.devices()[:devices])


def spread(op, devices: int, stripe: int, out_spec=ROWS):
    """`op` of whole rows, run on so many devices; `precision` is what float32 has anyway."""

    def run(*arrays, segment_ids=None, implementation=None, precision=None):
        del precision
        stripes = Stripes(arrays[0].shape[1], devices, stripe)
        order = stripes.permutation()

        def arrange(x):
            padding = [(0, 0), (0, stripes.size - stripes.length)] + [(0, 0)] * (x.ndim - 2)
            return jnp.pad(x, padding)[:, order]

        def on_one(*arrays):
            *arrays, segment_ids = arrays
            options = {} if implementation is None else {"implementation": implementation}
            return op(*arrays, axis_name="x", stripe=stripe, segment_ids=segment_ids, **options)

        arguments = jax.tree.map(arrange, (*arrays, segment_ids))
        sharded = jax.shard_map(
            on_one, mesh=mesh_of(devices), in_specs=ROWS, out_specs=out_spec, check_vma=False
        )
        out = sharded(*arguments)
        return out[:, np.argsort(order)[: stripes.length]] if out_spec == ROWS else out

    return run


def some(*quick: str, slow: tuple[str, ...] = ()):
    """Cases by name, those that take long marked."""
    named = {case.name: case for case in CASES}
    return [named[x] for x in quick] + [
        pytest.param(named[x], marks=pytest.mark.slow) for x in slow
    ]


class Stripe:
    """By stripes, whatever the backend; K of the cases is 1 or 2."""

    implementation = "xla"
    modes = MODES


class TestTwoDevices(Stripe, LucidConformance):
    op = spread(sequence_parallel.lucid_attention, 2, 16)
    cases = some("length_63", slow=("one_row", "huge_key", "length_257_odd_width"))


class TestThreeDevices(Stripe, LucidConformance):
    """K = 2 does not divide by 3; stripes that no power of two divides."""

    op = spread(sequence_parallel.lucid_attention, 3, 20)
    cases = some("packed", slow=("length_100_gqa", "segments_of_one"))


class TestFourDevices(Stripe, LucidConformance):
    op = spread(sequence_parallel.lucid_attention, 4, 8)
    cases = some("zero_keys", slow=("identical_keys", "cosine_0.99", "length_1100_panels"))


class TestEightDevices(Stripe, LucidConformance):
    op = spread(sequence_parallel.lucid_attention, 8, 8)
    cases = some("packed_identical", slow=("cosine_0.9",))
    modes = (("float32", "highest"), ("float64", "highest"))


class TestWideStripes(Stripe, LucidConformance):
    """Blocks of more rows than a tile has."""

    op = spread(sequence_parallel.lucid_attention, 3, 160)
    cases = some(slow=("packed_panels", "length_1000"))


class TestByHeads(LucidConformance):
    """Each device has whole rows of one head, by any backend of one device."""

    implementation = "reference"
    modes = MODES
    op = spread(sequence_parallel.lucid_attention, 2, 16)
    cases = some("packed", slow=("length_100_gqa", "two_rows"))


class TestPrecondition(Stripe, PreconditionConformance):
    op = spread(sequence_parallel.precondition, 3, 16)
    cases = some("zero_keys", slow=("packed", "cosine_0.9"))


class TestPreconditionByHeads(Stripe, PreconditionConformance):
    op = spread(sequence_parallel.precondition, 2, 16)
    cases = some(slow=("packed",))


class TestSoftmax(Stripe, SoftmaxConformance):
    op = spread(sequence_parallel.softmax_attention, 3, 16)
    cases = some("packed", slow=("huge_key", "length_1100_panels"))


class TestSoftmaxByHeads(Stripe, SoftmaxConformance):
    op = spread(sequence_parallel.softmax_attention, 2, 16)
    cases = some(slow=("packed",))


@pytest.mark.parametrize("segments", ["none", "packed"])
def test_the_largest_entry_is_that_of_all_rows(segments):
    drawn = Case("largest", length=300, kv_heads=2, segments=segments).draw()
    k, ids = jnp.asarray(drawn["k"], jnp.float32), drawn["segment_ids"]
    op = spread(sequence_parallel.largest_off_diagonal, 3, 20, out_spec=PartitionSpec())
    np.testing.assert_allclose(op(k, segment_ids=ids), largest_off_diagonal(k, ids), rtol=1e-6)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "stripe must divide the 12 rows of a device; got 8", {"stripe": 8}),
        (ValueError, "stripe must divide the 12 rows of a device; got 0", {"stripe": 0}),
        (ValueError, "one of xla, triton, mosaic_tpu; got 'ref", {"implementation": "reference"}),
        (ValueError, "of a width that 128 divides; got 4", {"implementation": "triton"}),
        (ValueError, "of a width that 128 divides; got 4", {"implementation": "mosaic_tpu"}),
        (TypeError, "segment_ids must have dtype int32; got float32", {"segment_ids": True}),
    ],
)  # fmt: skip
def test_what_cannot_run_is_one_line(error, message, arguments, monkeypatch):
    for backend in (pallas_mosaic_tpu, pallas_triton):
        monkeypatch.setattr(backend, "INTERPRET", True)
    x = jnp.zeros((1, 24, 1, 8))

    def op(q, k, v, ids):
        options = {"stripe": 4, **arguments}
        if options.pop("segment_ids", None):
            options["segment_ids"] = ids
        return sequence_parallel.lucid_attention(q, k, v, axis_name="x", **options)

    run = jax.shard_map(op, mesh=mesh_of(2), in_specs=ROWS, out_specs=ROWS, check_vma=False)
    with pytest.raises(error, match=message) as caught:
        jax.eval_shape(run, x, x, x, jnp.zeros((1, 24)))
    assert "\n" not in str(caught.value)
