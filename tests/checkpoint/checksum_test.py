"""Checksums depend on every bit of an array and on nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import MESH_SHAPES, make_mesh, make_state

from lucid_jax.checkpoint.checksum import checksum, checksums
from lucid_jax.checkpoint.record import named_leaves


def checksum_oracle(x):
    """Computes the same hash in Python integers, element by element."""
    total = 0
    for position, bits in enumerate(np.asarray(x).view(f"u{x.dtype.itemsize}").ravel().tolist()):
        h = bits ^ (position * 0x9E3779B9 % 2**32)
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        total += h ^ (h >> 16)
    return total % 2**32


@pytest.mark.parametrize("shape", MESH_SHAPES, ids=str)
def test_checksums_depend_on_content_not_on_sharding(shape):
    arrays = named_leaves(make_state(5, make_mesh(shape)))
    for name, value in checksums(arrays).items():
        assert value == checksum_oracle(arrays[name]), name


def test_checksums_see_flips_and_swaps():
    x = jnp.zeros(4, jnp.uint32)
    changed = [x.at[i].set(1 << bit) for i in range(4) for bit in range(32)]
    changed += [x.at[:2].set(1 << 31), x.at[2:].set(1 << 31), x.at[::2].set(1 << 31)]
    sums = {int(checksum(y)) for y in [x, *changed]}
    assert len(sums) == 1 + len(changed)


def test_checksums_move_no_array_between_devices():
    text = checksum.lower(make_state().params["embed"]).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text
