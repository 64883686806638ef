"""The Triton kernels of softmax attention: what they support, their tiles, and their gradient."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lucid_jax.ops import target
from lucid_jax.ops.documents import entering_documents, entering_runs, pad_segments
from lucid_jax.ops.precondition import triton as solve_kernels
from lucid_jax.ops.remat import save_for_backward
from pallas_kernels.triton.attention import Visible, attend
from pallas_kernels.triton.attention_gradient import key_value_gradient, query_gradient
from pallas_kernels.triton.parts import width as tile_width
from pallas_kernels.triton.tiles import Tiles

# The kernels of the solve have the same limits.
unsupported = solve_kernels.unsupported


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Tiles of the kernels.

    Attributes:
      forward: Tiles of the result, whose rows are queries.
      queries: Tiles of the gradient of queries; its rows divide those of `forward`.
      keys: Tiles of the gradient of keys and values, whose rows are keys.
    """

    forward: Tiles
    queries: Tiles
    keys: Tiles

    def __post_init__(self):
        assert self.forward.rows % self.queries.rows == 0, self
        assert self.forward.rows % self.keys.columns == 0, self

    @classmethod
    def choose(cls, device: str, q: jax.Array) -> Schedule:
        """Looks up the tiles for a kind of device and queries like `q [B,S,H,D]`."""
        width = next(w for w in (64, 128, 256) if q.shape[-1] <= w)
        bits = 8 * q.dtype.itemsize
        if not device.startswith(("NVIDIA H100", "NVIDIA H200")):
            return _OTHER[bits, width]
        # Heads of 65 to 80 take 80 columns, and are faster with the tiles of 64.
        if bits == 16 and tile_width(q.shape[-1]) <= 80:
            width = 64
        if (bits, width) == (16, 64) and q.shape[1] < _LONG:
            return _SHORT
        return _HOPPER[bits, width]


def _alike(tiles: Tiles) -> Schedule:
    return Schedule(tiles, tiles, tiles)


# With blocks of 64 rows short documents have less to mask, with 128 long ones less traffic.
_LONG = 8192
_SHORT = _alike(Tiles(64, 64, warps=4, stages=3))
_HOPPER = {
    (16, 64): Schedule(
        Tiles(128, 64, warps=4, stages=3),
        Tiles(128, 64, warps=4, stages=3),
        Tiles(64, 64, warps=4, stages=3),
    ),
    (16, 128): Schedule(
        Tiles(128, 64, warps=8, stages=3),
        Tiles(128, 64, warps=8, stages=3),
        Tiles(64, 64, warps=4, stages=2),
    ),
    (16, 256): _alike(Tiles(64, 32, warps=4, stages=2)),
    (32, 64): _alike(Tiles(64, 32, warps=4, stages=2)),
    (32, 128): _alike(Tiles(64, 32, warps=4, stages=1)),
    (32, 256): _alike(Tiles(16, 16, warps=4, stages=1)),
}
# Not tuned: tiles that fit the 99 KB of shared memory of a program on the smallest GPUs whose
# matrix units Triton uses (tests/gpu_compile_test.py).
_OTHER = {
    (16, 64): _alike(Tiles(64, 32, warps=4, stages=2)),
    (16, 128): _alike(Tiles(64, 32, warps=4, stages=2)),
    (16, 256): _alike(Tiles(32, 32, warps=4, stages=1)),
    (32, 64): _alike(Tiles(64, 32, warps=4, stages=1)),
    (32, 128): _alike(Tiles(32, 32, warps=4, stages=1)),
    (32, 256): _alike(Tiles(16, 16, warps=4, stages=1)),
}


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    precision: jax.lax.Precision | None,
) -> jax.Array:
    """Computes `softmax(scale·q kᵀ + causal) v`; shapes as in the public op."""
    del precision  # The products keep the operands' precision.
    return _attention(scale, q, k, v, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scale, q, k, v, segment_ids):
    return _attention_fwd(scale, q, k, v, segment_ids)[0]


def _attention_fwd(scale, q, k, v, segment_ids):
    tiles = Schedule.choose(target.device_kind(), q).forward
    options = {"scale": scale, "tiles": tiles, "interpret": solve_kernels.INTERPRET}
    results = attend(q, k, v, *find_visible(segment_ids, tiles.rows), **options)
    o, largest, inverse = (save_for_backward(x) for x in results)
    return o, (q, k, v, segment_ids, o, largest, inverse)


def _attention_bwd(scale, residuals, o_bar):
    q, k, v, segment_ids, o, largest, inverse = residuals
    schedule = Schedule.choose(target.device_kind(), q)
    options = {"scale": scale, "interpret": solve_kernels.INTERPRET}
    o_bar = o_bar.astype(q.dtype)
    q_bar, delta = query_gradient(
        q, k, v, *find_visible(segment_ids, schedule.queries.rows), o, o_bar, largest, inverse,
        tiles=schedule.queries, **options,
    )  # fmt: skip
    visible = find_visible(segment_ids, schedule.keys.rows, reverse=True)
    k_bar, v_bar = key_value_gradient(
        q, k, v, *visible, o_bar, largest, inverse, delta, tiles=schedule.keys, **options
    )
    return q_bar, k_bar, v_bar, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def find_visible(
    segment_ids: jax.Array | None, rows: int, *, reverse: bool = False
) -> tuple[jax.Array | None, Visible | None]:
    """Returns ids and what blocks of queries see or, if `reverse`, who sees blocks of keys.

    All tokens of a block see a run of one segment only if the run also fills the block.
    """
    if segment_ids is None:
        return None, None
    ids = pad_segments(segment_ids, rows)
    bound, size = entering_documents(ids, rows, reverse=reverse)
    run = entering_runs(ids, rows, reverse=reverse)
    block = jnp.arange(bound.shape[1], dtype=jnp.int32)[None]
    unmasked = jnp.where(run.size == rows, run.start, block * rows)
    if reverse:
        bound, unmasked = (ids.shape[1] - jnp.flip(x, 1) for x in (bound, unmasked))
        size = jnp.flip(size, 1)
    return ids, Visible(bound, unmasked, size)
