"""Stripes: blocks are dealt in turn, padded, and restored."""

import numpy as np
import pytest

from lucid_jax.parallel.stripes import Stripes

SHAPES = [(64, 4, 8), (100, 3, 7), (1, 2, 16), (300, 5, 20), (256, 8, 32)]


def batch(length: int, sequences: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens, segment_ids = rng.integers(1, 99, (2, sequences, length)).astype(np.int32)
    return {
        "tokens": tokens,
        "segment_ids": segment_ids,
        "positions": np.arange(length, dtype=np.int32) + np.array([[0], [5]], np.int32)[:sequences],
        "weights": np.ones((sequences, length), np.float32),
    }


@pytest.mark.parametrize(("length", "shards", "width"), SHAPES)
def test_blocks_are_dealt_in_turn(length, shards, width):
    stripes = Stripes(length, shards, width)
    assert stripes.size % (shards * width) == 0
    assert length <= stripes.size < length + shards * width
    order = stripes.permutation()
    assert sorted(order) == list(range(stripes.size))
    for shard, places in enumerate(order.reshape(shards, -1)):
        assert (places // width % shards == shard).all()
        assert (np.diff(places) > 0).all()
        np.testing.assert_array_equal(stripes.positions(shard), places)


@pytest.mark.parametrize(("length", "shards", "width"), SHAPES)
def test_all_arrays_of_a_batch_are_ordered_alike(length, shards, width):
    before, stripes = batch(length), Stripes(length, shards, width)
    after = stripes.apply(before)
    for name, x in before.items():
        assert after[name].dtype == x.dtype
        assert after[name].shape == (2, stripes.size)
        np.testing.assert_array_equal(stripes.restore(after[name]), x)
    padding = stripes.permutation() >= length
    assert not after["weights"][:, padding].any()
    assert not after["segment_ids"][:, padding].any()
    assert not after["tokens"][:, padding].any()
    in_order = after["positions"][:, np.argsort(stripes.permutation())]
    assert (np.diff(in_order) == 1).all()


def test_one_shard_changes_nothing():
    before, stripes = batch(100), Stripes(100, 1, 16)
    assert stripes.size == 100
    for name, x in stripes.apply(before).items():
        assert x is before[name]
        np.testing.assert_array_equal(stripes.restore(x), x)
    np.testing.assert_array_equal(stripes.positions(0), np.arange(100))
