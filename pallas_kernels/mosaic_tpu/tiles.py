"""Sizes of a kernel's tiles, and the VMEM that they take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu.tile import BLOCK, Interpret, width

# What the compiler grants a kernel that asks for nothing.
_DEFAULT_LIMIT = 16 * 2**20

# The largest tiles first. At R = 1024 rows a tile of columns is read once for 1024 rows, which
# keeps HBM well behind the matrix unit on every chip (experiments/tpu_roofline); the float32
# stack of that height would not fit the smallest VMEM.
_SIZES = ((1024, 512), (512, 512), (512, 256), (256, 256), (128, 128))

# Of a rectangle in blocks of few rows: a step of the grid has to be worth its start, about a
# third of a microsecond, in columns.
_RECTANGLE_ROWS, _RECTANGLE_COLUMNS = 1024, 2048
_RECTANGLES = ("lucid_product", "lucid_cross_key_gradient")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """R rows and C columns.

    Attributes:
      rows: R, a multiple of 128; a step of the grid takes as many.
      columns: C, a multiple of 128; what a copy from HBM brings. For a solve it divides R.
    """

    rows: int
    columns: int

    def __post_init__(self):
        if self.rows % BLOCK or self.columns % BLOCK:
            raise ValueError(
                f"rows and columns of a tile must be multiples of {BLOCK}; got {self.rows} and"
                f" {self.columns}"
            )

    @classmethod
    def choose(cls, dtype: jnp.dtype, s: int, d: int, capacity: int) -> Tiles:
        """The largest tiles that fit VMEM and pad the length by no more than an eighth.

        Args:
          dtype: Of the operands.
          s: QueryPositions of the sequence.
          d: D.
          capacity: VMEM of a core in bytes.
        """
        blocks = -(-s // BLOCK)
        for rows, columns in _SIZES:
            tiles = cls(rows, columns)
            padding = -blocks % (rows // BLOCK)
            fits = all(need(tiles, dtype, d) <= capacity for need in KERNELS.values())
            if fits and 8 * padding <= blocks:
                return tiles
        return cls(BLOCK, BLOCK)

    @classmethod
    def for_rectangle(
        cls, dtype: jnp.dtype, width: int, columns: int, d: int, capacity: int
    ) -> Tiles:
        """The largest tiles that fit VMEM, and divide a rectangle.

        Args:
          dtype: Of the operands.
          width: QueryPositions that share a range of columns; 128 divides it.
          columns: Of the rectangle, likewise.
          d: D.
          capacity: VMEM of a core in bytes.
        """

        def divisors(n: int, most: int) -> list[int]:
            return [size for size in range(most, 0, -BLOCK) if n % size == 0]

        for r in divisors(width, _RECTANGLE_ROWS):
            for c in divisors(columns, _RECTANGLE_COLUMNS):
                tiles = cls(r, c)
                if all(KERNELS[name](tiles, dtype, d) <= capacity for name in _RECTANGLES):
                    return tiles
        return cls(BLOCK, BLOCK)


def compiler_params(
    kernel: str,
    tiles: Tiles,
    dtype: jnp.dtype,
    d: int,
    *,
    parallel: int,
    sequential: int,
    interpret: Interpret,
) -> pltpu.CompilerParams:
    """What `pallas_call` tells the compiler.

    Args:
      kernel: A name of `KERNELS`.
      tiles: R and C.
      dtype: Of the operands.
      d: D.
      parallel: Leading dimensions of the grid, which cores may share out.
      sequential: Its other dimensions.
      interpret: As in `pallas_call`.

    Raises:
      ValueError: the tiles do not fit the VMEM of the chip that is compiled for, or the
        columns do not divide the rows of a kernel that needs it.
    """
    if kernel not in _RECTANGLES and tiles.rows % tiles.columns:
        raise ValueError(
            f"the columns of a tile of {kernel} must divide its rows; got {tiles.rows} and"
            f" {tiles.columns}"
        )
    need = KERNELS[kernel](tiles, dtype, d)
    if not interpret and need > vmem_capacity():
        raise ValueError(
            f"{kernel} with tiles of {tiles.rows}×{tiles.columns} at D = {d} in"
            f" {jnp.dtype(dtype).name} needs {need / 2**20:.1f} MiB of VMEM; this chip has"
            f" {vmem_capacity() / 2**20:.1f} MiB"
        )
    return pltpu.CompilerParams(
        dimension_semantics=(pltpu.PARALLEL,) * parallel + (pltpu.ARBITRARY,) * sequential,
        vmem_limit_bytes=max(need, _DEFAULT_LIMIT),
    )


def vmem_capacity() -> int:
    """VMEM of a core of the chip that is compiled for, in bytes."""
    return pltpu.get_tpu_info().vmem_capacity_bytes


class _Terms:
    """Bytes of the arrays that kernels hold, as VMEM lays them out."""

    def __init__(self, tiles: Tiles, dtype: jnp.dtype, d: int):
        self.r, self.c, self.size = tiles.rows, tiles.columns, jnp.dtype(dtype).itemsize
        lanes = max(BLOCK, width(d))
        self.row, self.sum = lanes * self.size, lanes * 4  # Of a row in the dtype, in float32.
        # What the compiler keeps on its stack, as measured: so many bytes for each of R·C
        # entries of A, and in float32 the three bfloat16 parts of a row of each operand.
        self.entries = self.r * self.c
        self.parts = 0 if self.size == 2 else 3 * 2 * width(d)


def _diagonal(tiles: Tiles, dtype: jnp.dtype, d: int) -> int:
    t = _Terms(tiles, dtype, d)
    windows = 2 * t.r * (t.row + BLOCK * 4)  # k̃, inverses
    return windows + 24 * BLOCK * BLOCK * 4  # A, X and their parts


def _solve(tiles: Tiles, dtype: jnp.dtype, d: int) -> int:
    t = _Terms(tiles, dtype, d)
    windows = 2 * t.r * (t.row + t.sum + BLOCK * 4)  # k̃, v (float32 after a prefix), inverses
    streamed = 2 * t.c * 2 * t.row  # k̃, y
    kept = t.r * (2 * t.sum + t.row)  # total, its next summand, y
    parts = (t.r + 2 * t.c) * t.parts
    return windows + streamed + kept + parts + t.entries * (4 if t.size == 2 else 16)


def _solve_transposed(tiles: Tiles, dtype: jnp.dtype, d: int) -> int:
    t = _Terms(tiles, dtype, d)
    windows = 2 * t.r * (3 * t.row + BLOCK * 4)  # k̃, y, ȳ, inverses
    streamed = t.c * (2 * 2 * t.row + 3 * t.sum)  # k̃, v̄; sums of k̄
    kept = t.r * (6 * t.sum + t.row)  # two totals, k̄, next summands; v̄
    parts = (8 * t.r + 2 * t.c) * t.parts
    return windows + streamed + kept + parts + t.entries * (8 if t.size == 2 else 28)


def _product(tiles: Tiles, dtype: jnp.dtype, d: int) -> int:
    t = _Terms(tiles, dtype, d)
    windows = 2 * (t.r * (t.row + t.sum) + t.c * 2 * t.row)  # k̃, sum; k̃, x
    parts = (t.r + 2 * t.c) * t.parts
    return windows + parts + t.entries * (4 if t.size == 2 else 16)


def _cross_key_gradient(tiles: Tiles, dtype: jnp.dtype, d: int) -> int:
    t = _Terms(tiles, dtype, d)
    windows = 2 * (t.r * (2 * t.row + t.sum) + t.c * 2 * t.row)  # k̃, x, sum; k̃, x
    parts = 2 * (t.r + t.c) * t.parts
    return windows + parts + t.entries * (8 if t.size == 2 else 28)


# Bytes of VMEM by kernel. The segment ids, a row of lanes each, vanish beside these.
KERNELS: dict[str, Callable[[Tiles, jnp.dtype, int], int]] = {
    "lucid_diagonal_inverses": _diagonal,
    "lucid_solve": _solve,
    "lucid_solve_transposed": _solve_transposed,
    "lucid_product": _product,
    "lucid_cross_key_gradient": _cross_key_gradient,
}
