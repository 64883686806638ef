"""Predicts on paper what the Mosaic kernels cost on TPUs; nothing is measured.

  python -m experiments.tpu_roofline.roofline

For each pass of each kernel the time is the largest of three, from the chip's data sheet, plus the
latency, which nothing hides:

    matrix unit   every product at the width that the unit takes: narrower heads cost as much as
                  heads of its width
    exponentials  one register of 1024 a cycle of a core
    HBM           tiles of columns once for every R rows, and the inputs and outputs
    latency       every step of a system and every block of 128 rows in it, one after the other,
                  since rows depend on those before them

The first three assume units that are always busy, which they never are: the times are lower bounds,
and ratios of them mean more. Writes roofline.json.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from experiments import reporting
from pallas_kernels.mosaic_tpu.diagonal import products
from pallas_kernels.mosaic_tpu.tile import BLOCK, width
from pallas_kernels.mosaic_tpu.tiles import Tiles

# Version, cores, and cycles a second of a core: peak operations over operations a cycle.
CHIPS = {
    "v5e": (pltpu.ChipVersion.TPU_V5E, 1, 1.5e9),
    "v5p": (pltpu.ChipVersion.TPU_V5P, 2, 1.75e9),
    "v6e": (pltpu.ChipVersion.TPU_V6E, 1, 1.75e9),
}
# Tokens, query heads, key/value heads and head dimension, for one sequence on one device.
SHAPES = tuple((s, *heads) for heads in ((32, 4, 64), (16, 16, 128)) for s in (8192, 32768, 131072))
EXPONENTIALS = 1024  # A cycle.
STEP = 2e-6  # Seconds until the first tile of a step has come from HBM: assumed.
SUBSTITUTION = 0.7e-6  # Seconds of the dependent products of a block of 128 rows: assumed.
ITEM = 2  # Bytes of bfloat16.


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, with totals over its cores."""

    name: str
    cores: int
    clock: float
    flops: float
    bandwidth: float
    mxu: int
    vmem: int

    @classmethod
    def from_name(cls, name: str) -> Chip:
        """Takes the numbers from jax's table of data sheets."""
        version, cores, clock = CHIPS[name]
        info = pltpu.get_tpu_info_for_chip(version, cores)
        flops, bandwidth = info.bf16_ops_per_second * cores, info.mem_bw_bytes_per_second * cores
        sizes = info.mxu_column_size, info.vmem_capacity_bytes
        return cls(name, cores, clock, flops, bandwidth, *sizes)

    def products(self, pairs: float, count: int, d: int) -> float:
        """Returns seconds of `count` products over pairs of rows and columns, of width `d`."""
        return count * 2 * pairs * max(d, self.mxu) / self.flops

    def exponentials(self, count: float) -> float:
        """Returns seconds of `count` exponentials."""
        return count / (EXPONENTIALS * self.clock * self.cores)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of one pass: by unit, and what is added to the largest of them."""

    terms: dict[str, float]
    latency: float = 0.0
    inverses: float = 0.0

    @property
    def seconds(self) -> float:
        """Time of the pass."""
        return max(self.terms.values()) + self.latency + self.inverses

    def record(self) -> dict:
        """Returns the milliseconds of each part and of all, and the name of the largest part."""
        parts = self.terms | {"latency": self.latency, "inverses": self.inverses}
        ms = {name: 1e3 * seconds for name, seconds in parts.items()}
        return {"ms": ms, "total_ms": 1e3 * self.seconds, "bound": max(ms, key=ms.__getitem__)}


def solve(chip: Chip, s: int, systems: int, d: int, tiles: Tiles, *, backward: bool) -> Prediction:
    """Predicts the solve of `systems` heads, or its transpose with the key gradient."""
    pairs = systems * s * s / 2
    lanes = max(BLOCK, width(d))
    column = 2 * lanes * ITEM + (2 * lanes * 4 if backward else 0)
    rows = systems * s * ((4 if backward else 3) * lanes * ITEM + BLOCK * 4)
    in_turn = math.ceil(systems / chip.cores)
    inverses = systems * s * 2 * BLOCK * max(BLOCK, chip.mxu) * products(jnp.bfloat16)
    return Prediction(
        {
            "matrix unit": chip.products(pairs, 5 if backward else 2, d),
            "exponentials": chip.exponentials(pairs),
            "HBM": (pairs / tiles.rows * column + rows) / chip.bandwidth,
        },
        latency=in_turn * (s / tiles.rows * STEP + s / BLOCK * SUBSTITUTION),
        inverses=inverses / chip.flops,
    )


def splash(chip: Chip, s: int, heads: int, d: int, *, backward: bool) -> Prediction:
    """Predicts splash attention, whose backward pass visits every pair twice beyond 4096 tokens."""
    twice = backward and s > 4096
    pairs = heads * s * s / 2
    column = 2 * max(BLOCK, d) * ITEM
    return Prediction(
        {
            "matrix unit": chip.products(pairs, 7 if twice else 5 if backward else 2, d),
            "exponentials": chip.exponentials(pairs * (2 if twice else 1)),
            "HBM": pairs / 512 * column / chip.bandwidth,
        }
    )


def predict(chip: Chip, s: int, heads: int, kv_heads: int, d: int) -> dict:
    """Returns a record of both passes of LUCID's solve and of softmax attention."""
    tiles = Tiles.choose(jnp.dtype(jnp.bfloat16), s, d, chip.vmem)
    record: dict = {
        "chip": chip.name,
        "shape": f"1×{s}, {heads}/{kv_heads}, {d}",
        "tiles": f"{tiles.rows}×{tiles.columns}",
    }
    lucid, softmax = 0.0, 0.0
    for name, backward in (("forward", False), ("backward", True)):
        x = solve(chip, s, kv_heads, d, tiles, backward=backward)
        record[name] = x.record()
        lucid += x.seconds
        softmax += splash(chip, s, heads, d, backward=backward).seconds
    return record | {"softmax_ms": 1e3 * softmax, "overhead": lucid / softmax}


def by_tile(chip: Chip, s: int, heads: int, kv_heads: int, d: int) -> dict:
    """Returns a record of both passes by tile, which is what `Tiles.choose` follows."""
    ms = {}
    for tiles in (Tiles(n, min(n, 512)) for n in (128, 256, 512, 1024)):
        passes = (solve(chip, s, kv_heads, d, tiles, backward=b) for b in (False, True))
        ms[f"{tiles.rows}×{tiles.columns}"] = 1e3 * sum(x.seconds for x in passes)
    return {"chip": chip.name, "length": s, "kv_heads": kv_heads, "head_dim": d, "ms": ms}


def table(records: Sequence[dict]) -> str:
    """Returns a Markdown table."""
    header = (
        "chip", "B×S, H/K, D", "tiles", "forward", "bound by", "backward", "bound by",
        "softmax, both", "overhead",
    )  # fmt: skip
    rows = [
        (
            x["chip"], x["shape"], x["tiles"],
            f"{x['forward']['total_ms']:.2f} ms", x["forward"]["bound"],
            f"{x['backward']['total_ms']:.2f} ms", x["backward"]["bound"],
            f"{x['softmax_ms']:.1f} ms", f"{x['overhead']:.0%}",
        )
        for x in records
    ]  # fmt: skip
    return reporting.markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    flags = parser.parse_args(argv)
    cases = list(itertools.product(map(Chip.from_name, CHIPS), SHAPES))
    records = [predict(chip, *shape) for chip, shape in cases]
    tiles = [by_tile(chip, *shape) for chip, shape in cases]
    print(table(records))
    print("\nMilliseconds of both passes by tile\n")
    rows = [(*list(x.values())[:4], *(f"{ms:.2f}" for ms in x["ms"].values())) for x in tiles]
    print(reporting.markdown(("chip", "S", "K", "D", *tiles[0]["ms"]), rows))
    assumed = {"step_latency_s": STEP, "substitution_s": SUBSTITUTION}
    reporting.write_json(
        flags.out / "roofline.json",
        command=flags.command,
        prediction="from data sheets; nothing here was measured",
        assumed=assumed | {"exponentials_a_cycle": EXPONENTIALS},
        records=records,
        ms_by_tile=tiles,
    )


if __name__ == "__main__":
    main()
