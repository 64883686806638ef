"""A step by the Triton kernels: what they support, and how the cache is split."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.ops.decode.new_token import LayerCache, NewToken
from lucid_jax.ops.decode.partial_softmax import PartialSoftmax, attend_by
from lucid_jax.ops.precondition import triton as solve_kernels
from pallas_kernels.triton.decode import Splits, finish, partial_sums
from pallas_kernels.triton.tile import width

# Whether a call can be taken is asked of the kernels of the solve: their limits are the same.
unsupported = solve_kernels.unsupported

# Programs that keep a large GPU busy: 132 multiprocessors of an H200, a few on each.
_PROGRAMS = 512
# Numbers of the parts of a row, all of which the second kernel has in registers.
_MOST_NUMBERS = 64 * 64


def attend(
    new: NewToken,
    cached: LayerCache,
    length: jax.Array,
    scale: float,
    axis_name: str | None,
) -> tuple[jax.Array, LayerCache]:
    """As `xla.attend`, by two kernels where no other device has a share in the row."""
    splits, interpret = choose_splits(cached.k), solve_kernels.INTERPRET
    group = new.q.shape[2]

    def sum_parts(cached: LayerCache) -> tuple[jax.Array, jax.Array, jax.Array]:
        return partial_sums(
            new.q, new.k, cached.k, cached.y, cached.inverse_norms, length,
            scale=scale, splits=splits, interpret=interpret,
        )  # fmt: skip

    def sum_up(cached: LayerCache) -> PartialSoftmax:
        largest, norm, total = sum_parts(cached)
        sums = PartialSoftmax(
            largest[..., :group], norm[..., :group], total[..., :group, :],
            None if cached.inverse_norms is None else total[..., group, :],
        )  # fmt: skip
        return sums.added(2).added_over(axis_name)

    if axis_name is not None:
        return attend_by(sum_up, new, cached, length, scale)
    o, k, y, norms = finish(
        *new, cached.k, cached.y, cached.inverse_norms, length, *sum_parts(cached),
        scale=scale, interpret=interpret,
    )  # fmt: skip
    return o, LayerCache(k, y, norms)


def choose_splits(k: jax.Array) -> Splits:
    """For a cache of keys `[B,K,P,D]`."""
    b, heads, p, d = k.shape
    wide = d > 128 or k.dtype == jnp.float32
    columns = 32 if wide else 64
    most = min(_MOST_NUMBERS // width(d), _PROGRAMS // (b * heads), -(-p // columns))
    # A power of two, at most that many.
    return Splits(1 << max(0, most.bit_length() - 1), columns, warps=4, stages=2 if wide else 3)
