"""Tile sizes of the Mosaic kernels, and the VMEM that they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu.tile import BLOCK, Interpret, width

# The VMEM limit of a kernel that sets none.
_DEFAULT_LIMIT = 16 * 2**20

# The largest tiles first. At R = 1024 a tile of columns is read once for 1024 rows, so HBM traffic
# takes far less time than the products on every chip (experiments/tpu_roofline). In float32 the
# compiler's stack at that height would not fit the smallest VMEM.
_SIZES = ((1024, 512), (512, 512), (512, 256), (256, 256), (128, 128))

# The largest tile of a rectangle. Blocks of few rows need many columns, because starting a step of
# the grid takes about a third of a microsecond.
_RECTANGLE_ROWS, _RECTANGLE_COLUMNS = 1024, 2048
_RECTANGLES = ("lucid_product", "lucid_cross_key_gradient")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The rows and columns of a tile.

    Attributes:
      rows: R, the rows of a grid step; a multiple of 128.
      columns: C, the columns of a copy from HBM; a multiple of 128, which divides R for a solve.
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
        """Returns the largest tiles that fit VMEM and pad the length by at most an eighth.

        Args:
          dtype: The dtype of the operands.
          s: S, before padding.
          d: D.
          capacity: VMEM of a core in bytes.
        """
        blocks = -(-s // BLOCK)
        for rows, columns in _SIZES:
            tiles = cls(rows, columns)
            padding = -blocks % (rows // BLOCK)
            fits = all(need(tiles, dtype, d) <= capacity for need in VMEM_BYTES.values())
            if fits and 8 * padding <= blocks:
                return tiles
        return cls(BLOCK, BLOCK)

    @classmethod
    def for_rectangle(
        cls, dtype: jnp.dtype, width: int, columns: int, d: int, capacity: int
    ) -> Tiles:
        """Returns the largest tiles that fit VMEM and divide a rectangle.

        Args:
          dtype: The dtype of the operands.
          width: Rows that share a range of columns; a multiple of 128.
          columns: Columns of the rectangle; a multiple of 128.
          d: D.
          capacity: VMEM of a core in bytes.
        """

        def divisors(n: int, largest: int) -> list[int]:
            return [size for size in range(largest, 0, -BLOCK) if n % size == 0]

        for r in divisors(width, _RECTANGLE_ROWS):
            for c in divisors(columns, _RECTANGLE_COLUMNS):
                tiles = cls(r, c)
                if all(VMEM_BYTES[name](tiles, dtype, d) <= capacity for name in _RECTANGLES):
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
    """Returns the compiler parameters of a kernel.

    Args:
      kernel: A name of `VMEM_BYTES`.
      tiles: Tile sizes.
      dtype: The dtype of the operands.
      d: D.
      parallel: The number of leading grid dimensions, which cores may share out.
      sequential: The number of the other grid dimensions.
      interpret: As in `pallas_call`.

    Raises:
      ValueError: The tiles do not fit the VMEM of the target chip, or C does not divide R in a
        kernel that requires it.
    """
    if kernel not in _RECTANGLES and tiles.rows % tiles.columns:
        raise ValueError(
            f"the columns of a tile of {kernel} must divide its rows; got {tiles.rows} and"
            f" {tiles.columns}"
        )
    need = VMEM_BYTES[kernel](tiles, dtype, d)
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
    """Returns the VMEM of a core of the target chip in bytes."""
    return pltpu.get_tpu_info().vmem_capacity_bytes


class _Bytes:
    """Sizes of a kernel's arrays in bytes, as VMEM lays them out."""

    def __init__(self, tiles: Tiles, dtype: jnp.dtype, d: int):
        self.r, self.c, itemsize = tiles.rows, tiles.columns, jnp.dtype(dtype).itemsize
        lanes = max(BLOCK, width(d))
        # A row in the dtype of the operands, and in float32.
        self.row, self.sum = lanes * itemsize, lanes * 4
        self.is_16_bit = itemsize == 2
        # The compiler's stack, as measured: some bytes for each of the R·C entries of A, and in
        # float32 the three bfloat16 terms of each operand's rows.
        self.entries = self.r * self.c
        self.terms = 0 if self.is_16_bit else 3 * 2 * width(d)


def _diagonal(tiles: Tiles, dtype: jnp.dtype, d: int) -> int:
    n = _Bytes(tiles, dtype, d)
    pipelined = 2 * n.r * (n.row + BLOCK * 4)  # k̃, inverses
    return pipelined + 27 * BLOCK * BLOCK * 4  # A, X and their terms; √β √βᵀ


def _solve(tiles: Tiles, dtype: jnp.dtype, d: int) -> int:
    n = _Bytes(tiles, dtype, d)
    pipelined = 2 * n.r * (n.row + n.sum + BLOCK * 4)  # k̃, v (float32 after a prefix), inverses
    streamed = 2 * n.c * 2 * n.row  # k̃, y
    scratch = n.r * (2 * n.sum + n.row)  # total, its next summand, y
    terms = (n.r + 2 * n.c) * n.terms
    return pipelined + streamed + scratch + terms + n.entries * (4 if n.is_16_bit else 16)


def _solve_transposed(tiles: Tiles, dtype: jnp.dtype, d: int) -> int:
    n = _Bytes(tiles, dtype, d)
    pipelined = 2 * n.r * (3 * n.row + BLOCK * 4)  # k̃, y, ȳ, inverses
    streamed = n.c * (2 * 2 * n.row + 3 * n.sum)  # k̃, v̄; sums of k̄
    scratch = n.r * (6 * n.sum + n.row)  # two totals, k̄, next summands; v̄
    terms = (8 * n.r + 2 * n.c) * n.terms
    return pipelined + streamed + scratch + terms + n.entries * (8 if n.is_16_bit else 28)


def _product(tiles: Tiles, dtype: jnp.dtype, d: int) -> int:
    n = _Bytes(tiles, dtype, d)
    pipelined = 2 * (n.r * (n.row + n.sum) + n.c * 2 * n.row)  # k̃, sum; k̃, x
    terms = (n.r + 2 * n.c) * n.terms
    return pipelined + terms + n.entries * (4 if n.is_16_bit else 16)


def _cross_key_gradient(tiles: Tiles, dtype: jnp.dtype, d: int) -> int:
    n = _Bytes(tiles, dtype, d)
    pipelined = 2 * (n.r * (2 * n.row + n.sum) + n.c * 2 * n.row)  # k̃, x, sum; k̃, x
    terms = 2 * (n.r + n.c) * n.terms
    return pipelined + terms + n.entries * (8 if n.is_16_bit else 28)


# The VMEM need in bytes by kernel. Segment ids and √β, a row of lanes a tile, are negligible.
VMEM_BYTES: dict[str, Callable[[Tiles, jnp.dtype, int], int]] = {
    "lucid_diagonal_inverses": _diagonal,
    "lucid_solve": _solve,
    "lucid_solve_transposed": _solve_transposed,
    "lucid_product": _product,
    "lucid_cross_key_gradient": _cross_key_gradient,
}
