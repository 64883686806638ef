"""Tiles of the Triton kernels: a table by device, bits of the dtype, head width and work."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from pallas_kernels.triton.tiles import Tiles


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Tiles of the kernels of one call.

    Attributes:
      solve: Tiles of the solve; the diagonal blocks have as many rows.
      transposed: Tiles of the transposed solve, with as many rows.
      product: Tiles of the product with a prefix.
      gradient: Tiles of the key gradient.
      fused: Whether the transposed solve adds up half of the key gradient on its way; both
        then have the same rows.
    """

    solve: Tiles
    transposed: Tiles
    product: Tiles
    gradient: Tiles
    fused: bool = False

    def __post_init__(self):
        assert self.solve.rows == self.transposed.rows, self
        assert not self.fused or self.transposed.rows == self.gradient.rows, self

    @classmethod
    def choose(cls, device: str, dtype: jnp.dtype, b: int, s: int, heads: int, d: int) -> Schedule:
        """Looks up the tiles for keys `[B,S,K,D]`.

        Args:
          device: The kind of device, as jax names it.
          dtype: Dtype of keys and values.
          b: Sequences, B.
          s: Tokens of a sequence, S.
          heads: KV heads, K.
          d: Head width, D.
        """
        table = _HOPPER if _is_measured(device) else _OTHER
        bits = 8 * jnp.dtype(dtype).itemsize
        width = next(w for w in (64, 128, 256) if d <= w)
        # With little work blocks of 64 rows halve the time that a block waits; with much work
        # blocks of 128 rows halve the traffic. The blocks of a single head each have a whole
        # multiprocessor. Short chains wait so little that a lookahead of one block is enough.
        work = "one" if b * heads == 1 else "short" if s <= _SHORT_LENGTH else "little"
        if b * heads * s >= _MUCH_ROWS or s >= _MUCH_LENGTH:
            work = "much"
        return table[bits, width][work]

    @property
    def multiple(self) -> int:
        """The multiple that lengths are padded to; the rows of every kernel divide it."""
        return max(t.rows for t in (self.solve, self.product, self.gradient))


def column_parts(programs: int, columns: int) -> int:
    """Returns into how many parts the columns of a product are split, to have enough programs.

    Args:
      programs: Programs that the rows make, each with all columns.
      columns: The number of columns, P.
    """
    return max(1, min(_MOST_PROGRAMS // programs, columns // _FEWEST_COLUMNS))


def inverse_rows(
    device: str, dtype: jnp.dtype, rows: int, heads: int, length: int, d: int
) -> int | None:
    """Returns the rows of the blocks whose inverses solve stripes, None if the chain is faster.

    Each head needs inverses of its own, while the solve's kernel takes the heads side by side and
    hides the products between blocks behind their chain, so more than two heads gain little.

    Args:
      device: The kind of device; the chain is taken where times were not measured.
      dtype: Dtype of keys. Making float32 inverses takes longer than the chain.
      rows: Rows of a stripe.
      heads: Sequences times KV heads, B·K.
      length: Tokens of all stripes, S.
      d: Head width D; the kernel that applies an inverse has room for 128.
    """
    size = jnp.dtype(dtype).itemsize
    if size != 2 or d > 128 or not _is_measured(device):
        return None
    microseconds: dict[int | None, float] = {None: _CHAIN_START + rows * _CHAIN_ROW}
    for block, (step, inverse) in _INVERSES.items():
        if rows % block == 0 and heads * length * block * size <= _MOST_BYTES:
            between = rows * (rows - block) / 2 * _ENTRY
            microseconds[block] = rows // block * step + heads * (rows * inverse + between)
    return min(microseconds, key=lambda block: microseconds[block])


def _is_measured(device: str) -> bool:
    return device.startswith(("NVIDIA H100", "NVIDIA H200"))


def _all_work(schedule: Schedule) -> dict[str, Schedule]:
    return dict.fromkeys(("one", "short", "little", "much"), schedule)


def _alike(
    tiles: Tiles, *, product: Tiles | None = None, gradient: Tiles | None = None
) -> Schedule:
    return Schedule(tiles, tiles, product or tiles, gradient or tiles)


# Eight programs for each multiprocessor of an H100 or H200; with fewer, most wait for the last.
_MOST_PROGRAMS = 8 * 132
# Columns of a part: 5 µs of work, which is worth the sum over parts.
_FEWEST_COLUMNS = 512
# Microseconds on one H200 (experiments/sequence_scaling/results/h200.json): the solve's kernel
# before its first block, and for each row; one entry of a product; and by rows of a block, one
# step (the product with its inverse, and starting the product with the rows solved before), and
# making the inverse, for each row of a head.
_CHAIN_START, _CHAIN_ROW, _ENTRY = 17.1, 0.0321, 6.5e-7
_INVERSES = {512: (18.9, 0.0027), 1024: (18.4, 0.0048), 2048: (22.9, 0.0094)}
# Bytes of all inverses, which live while a layer is solved.
_MOST_BYTES = 2**31
_MUCH_ROWS = 2**18
_MUCH_LENGTH = 2**16
_SHORT_LENGTH = 2048
_PRODUCT = Tiles(128, 64, warps=8, stages=3)
_CHAIN = Tiles(64, 64, warps=4, stages=3, lookahead=2)
_SHORT_CHAIN = dataclasses.replace(_CHAIN, lookahead=1)
# Each float32 operand is three bfloat16 parts, so only small tiles fit the registers.
_FLOAT32 = Tiles(64, 32, warps=4, stages=2)
_WIDE = Tiles(64, 32, warps=4, stages=2, lookahead=0)
_WIDE_FLOAT32 = Tiles(64, 32, warps=4, stages=1)
_NARROW = Tiles(64, 16, warps=4, stages=1)
_LOW = Tiles(32, 32, warps=4, stages=1)
_NARROW_HEADS = Schedule(
    solve=dataclasses.replace(_CHAIN, stages=4),
    transposed=_SHORT_CHAIN,
    product=_PRODUCT,
    gradient=Tiles(64, 64, warps=4, stages=3),
    fused=True,
)
# Tuned by experiments/triton_precondition/tune.py on one H100; an H200 has the same cores.
_HOPPER = {
    (16, 64): {
        **_all_work(_NARROW_HEADS),
        "short": dataclasses.replace(
            _NARROW_HEADS, solve=dataclasses.replace(_SHORT_CHAIN, stages=4)
        ),
        "much": Schedule(
            solve=Tiles(128, 64, warps=8, stages=4, lookahead=0, head_group=4),
            transposed=Tiles(128, 128, warps=8, stages=4, lookahead=0, head_group=2),
            product=_PRODUCT,
            gradient=Tiles(128, 64, warps=4, stages=4),
            fused=True,
        ),
    },
    (16, 128): {
        "one": _alike(
            Tiles(64, 64, warps=8, stages=2, lookahead=3),
            product=_PRODUCT,
            gradient=Tiles(64, 64, warps=4, stages=4),
        ),
        "short": _alike(_SHORT_CHAIN, product=_PRODUCT, gradient=Tiles(128, 64, warps=8, stages=4)),
        "little": _alike(_CHAIN, product=_PRODUCT, gradient=Tiles(128, 64, warps=8, stages=4)),
        "much": Schedule(
            solve=Tiles(128, 64, warps=8, stages=4, lookahead=0),
            transposed=Tiles(128, 64, warps=8, stages=4, lookahead=0, head_group=8),
            product=_PRODUCT,
            gradient=Tiles(128, 64, warps=8, stages=3),
            fused=True,
        ),
    },
    (16, 256): _all_work(_alike(_WIDE)),
    (32, 64): _all_work(_alike(_FLOAT32)),
    (32, 128): _all_work(_alike(_WIDE_FLOAT32)),
    (32, 256): _all_work(_alike(_WIDE_FLOAT32, gradient=_NARROW)),
}
# Not tuned: tiles that fit the 99 KB of shared memory of a program on the smallest GPUs whose
# matrix units Triton uses (tests/gpu_compile_test.py).
_OTHER = {
    (16, 64): _all_work(_alike(_WIDE)),
    (16, 128): _all_work(_alike(_WIDE)),
    (16, 256): _all_work(_alike(_WIDE, gradient=_LOW)),
    (32, 64): _all_work(_alike(_WIDE_FLOAT32)),
    (32, 128): _all_work(_alike(_WIDE_FLOAT32, gradient=_LOW)),
    (32, 256): _all_work(
        _alike(
            dataclasses.replace(_WIDE_FLOAT32, lookahead=0),
            product=Tiles(32, 16, warps=4, stages=1),
            gradient=Tiles(16, 16, warps=4, stages=1),
        )
    ),
}
