"""Batch sizes for evaluation, and batches of sequences of similar length."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax

from lucid_jax.config import Config, MeshConfig
from lucid_jax.inference.generator import padded_batch
from lucid_jax.ops.numerics import round_up
from lucid_jax.parallel.mesh import Layout


def fit_devices(config: Config, sequences: int) -> Config:
    """Returns a trained model's configuration for all devices of this run, of any number.

    A batch has `sequences` of training's length, rounded up to a multiple of the devices.
    """
    return dataclasses.replace(
        config,
        mesh=MeshConfig(),
        batch_size=round_up(sequences, jax.device_count()),
        accumulation=1,
        data=dataclasses.replace(config.data, shards=0),
    )


def batch_size_for(config: Config, layout: Layout, length: int, num_sequences: int) -> int:
    """Returns how many sequences of `length` tokens to evaluate at a time.

    The batch holds at most as many tokens as a micro-batch of training, but at least one
    sequence for each device of `data` and `fsdp`. The number of sequences on a device is a power
    of two, as in decoding, and no larger than `num_sequences` needs.
    """
    tokens = config.batch_size // config.accumulation * config.data.sequence_length
    devices = layout.mesh.shape["data"] * layout.mesh.shape["fsdp"]
    fitting = 1 << max((tokens // (length * devices)).bit_length() - 1, 0)
    needed = padded_batch(num_sequences, devices)
    return min(fitting * devices, needed)


def batches_by_length(
    config: Config, layout: Layout, lengths: Sequence[int], keys: Sequence[int] = ()
) -> Iterator[tuple[int, int, list[int]]]:
    """Groups sequences whose lengths round up to the same power of two, longest first.

    If `keys` are given, one for each sequence, only sequences of equal keys share a batch.

    Yields:
      The padded length, the batch size, and the indices of at most as many sequences.
    """
    buckets: dict[tuple[int, int], list[int]] = {}
    for i, (length, key) in enumerate(zip(lengths, keys or itertools.repeat(0))):
        buckets.setdefault((1 << (length - 1).bit_length(), key), []).append(i)
    # With the longest batch first, an evaluation that does not fit in memory fails at once.
    for (length, _), indices in sorted(buckets.items(), reverse=True):
        batch_size = batch_size_for(config, layout, length, len(indices))
        for start in range(0, len(indices), batch_size):
            yield length, batch_size, indices[start : start + batch_size]
