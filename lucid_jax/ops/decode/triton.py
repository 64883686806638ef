"""A decode step by the Triton kernels: what they support, and how the cache is split."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lucid_jax.ops.decode.new_token import LayerCache, NewToken
from lucid_jax.ops.decode.partial_softmax import PartialSoftmax, attend_and_append
from lucid_jax.ops.numerics import ceil_div
from lucid_jax.ops.per_device import per_device
from lucid_jax.ops.precondition import triton as solve_kernels
from pallas_kernels.triton.decode import Splits, finish, partial_sums
from pallas_kernels.triton.parts import single_width

# The kernels of the solve have the same limits.
unsupported = solve_kernels.unsupported

# Enough programs to keep a large GPU busy: a few on each of the 132 multiprocessors of an H200.
_PROGRAMS = 512
# The second kernel holds the parts of one head in registers: at most so many numbers.
_MOST_NUMBERS = 64 * 64


def attend(
    token: NewToken,
    cached: LayerCache,
    length: jax.Array,
    scale: float,
    axis_name: str | None,
) -> tuple[jax.Array, LayerCache]:
    """Attends as `xla.attend` does, in two kernels if one device holds the whole cache."""
    splits, interpret = choose_splits(cached.k), solve_kernels.INTERPRET
    group = token.q.shape[2]

    def sum_parts(cached: LayerCache) -> tuple[jax.Array, jax.Array, jax.Array]:
        run = functools.partial(partial_sums, scale=scale, splits=splits, interpret=interpret)
        # Devices that share a cache call the kernel outside of the region of `decode_attention`.
        return per_device(
            run, ("BKGD", "BKD", "BKPD", "BKPD", "BKP", "B"), ("BKNM", "BKNM", "BKNMD"),
            token.q, token.k, cached.k, cached.y, cached.inverse_norms, length,
        )  # fmt: skip

    def sum_up(cached: LayerCache) -> PartialSoftmax:
        largest, norm, total = sum_parts(cached)
        sums = PartialSoftmax(
            largest[..., :group], norm[..., :group], total[..., :group, :],
            None if cached.inverse_norms is None else total[..., group, :],
        )  # fmt: skip
        return sums.combine(2).combine_devices(axis_name)

    if axis_name is not None:
        return attend_and_append(sum_up, token, cached, length, scale)
    o, k, y, norms = finish(
        *token, cached.k, cached.y, cached.inverse_norms, length, *sum_parts(cached),
        scale=scale, interpret=interpret,
    )  # fmt: skip
    return o, LayerCache(k, y, norms)


def choose_splits(k: jax.Array) -> Splits:
    """Chooses how a cache of keys `[B,K,P,D]` is split among programs."""
    b, heads, p, d = k.shape
    wide = d > 128 or k.dtype == jnp.float32
    columns = 32 if wide else 64
    most = min(_MOST_NUMBERS // single_width(d), _PROGRAMS // (b * heads), ceil_div(p, columns))
    # The number of parts is a power of two.
    return Splits(1 << max(0, most.bit_length() - 1), columns, warps=4, stages=2 if wide else 3)
