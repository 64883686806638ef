"""Checksums of the bits of arrays on a mesh."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Returns the checksum of each array, computed one at a time to bound the memory."""
    return {name: int(checksum(x)) for name, x in arrays.items()}


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """Returns a uint32: the sum over the elements of a hash of position and bits.

    A sum has no order, so the result does not depend on the sharding. The hash is a bijection
    of the bits, so a change of one element always changes the result. On an accelerator XLA
    fuses all of it into one reduction that stores no array; a CPU may store the hashes.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    # 64-bit elements become a last axis of two words.
    word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position * jnp.uint32(size) + iota
    # MurmurHash3's finaliser, on bits offset by the position. Multiplications by odd numbers
    # alone would miss two flips of a top bit.
    h = bits ^ (position * jnp.uint32(0x9E3779B9))
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)
