"""What the Mosaic kernels should cost on TPUs: a prediction on paper, not a measurement.

  python -m experiments.tpu_roofline.roofline

For each pass of each kernel it adds up four times from the data sheet of the chip, and takes
the largest; latency comes on top, as nothing hides it:

    matrix unit   every product at the width that the unit takes: heads narrower than it
                  cost as much as heads of its width
    exponentials  one register of 1024 a cycle of a core
    HBM           tiles of columns once for every R rows, and what goes in and out
    latency       of every step of a system and of every block of 128 rows in it, one after
                  the other, as rows depend on those before them

The first three assume units that are always busy, which they never are: the times are lower
bounds, and their ratios mean more than they do. Writes results/roofline.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu.diagonal import products
from pallas_kernels.mosaic_tpu.tile import BLOCK, width
from pallas_kernels.mosaic_tpu.tiles import Tiles

RESULTS = pathlib.Path(__file__).parent / "results"
# Cycles a second of a core: peak operations over those a cycle, of v6e as of v5p.
CHIPS = {
    "v5e": (pltpu.ChipVersion.TPU_V5E, 1, 1.5e9),
    "v5p": (pltpu.ChipVersion.TPU_V5P, 2, 1.75e9),
    "v6e": (pltpu.ChipVersion.TPU_V6E, 1, 1.75e9),
}
# Tokens, query heads, key/value heads, head width: of one device, one row.
SHAPES = tuple((s, *heads) for heads in ((32, 4, 64), (16, 16, 128)) for s in (8192, 32768, 131072))
EXPONENTIALS = 1024  # A cycle.
STEP = 2e-6  # Seconds before the first tile of a step has come from HBM: assumed.
SUBSTITUTION = 0.7e-6  # Seconds of the dependent products of a block of 128 rows: assumed.
ITEM = 2  # Bytes of bfloat16.


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device: totals over its cores."""

    name: str
    cores: int
    clock: float
    flops: float
    bandwidth: float
    mxu: int
    vmem: int

    @classmethod
    def of(cls, name: str) -> Chip:
        """From jax's table of data sheets."""
        version, cores, clock = CHIPS[name]
        info = pltpu.get_tpu_info_for_chip(version, cores)
        return cls(
            name,
            cores,
            clock,
            info.bf16_ops_per_second * cores,
            info.mem_bw_bytes_per_second * cores,
            info.mxu_column_size,
            info.vmem_capacity_bytes,
        )

    def products(self, pairs: float, count: int, d: int) -> float:
        """Seconds of `count` products over pairs of rows and columns, at head width D."""
        return count * 2 * pairs * max(d, self.mxu) / self.flops

    def exponentials(self, count: float) -> float:
        """Seconds."""
        return count / (EXPONENTIALS * self.clock * self.cores)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds by term of one pass."""

    terms: dict[str, float]
    latency: float = 0.0
    inverses: float = 0.0

    @property
    def seconds(self) -> float:
        """The largest term, and what comes on top."""
        return max(self.terms.values()) + self.latency + self.inverses

    @property
    def bound(self) -> str:
        """The name of the largest."""
        everything = self.terms | {"latency": self.latency, "inverses": self.inverses}
        return max(everything, key=everything.__getitem__)


def solve(chip: Chip, s: int, systems: int, d: int, tiles: Tiles, *, backward: bool) -> Prediction:
    """The solve of `systems` heads, or its transpose with the key gradient."""
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
    """Splash attention; its backward visits every pair twice beyond 4096 rows."""
    pairs = heads * s * s / 2
    products = (7 if s > 4096 else 5) if backward else 2
    column = 2 * max(BLOCK, d) * ITEM
    return Prediction(
        {
            "matrix unit": chip.products(pairs, products, d),
            "exponentials": chip.exponentials(pairs * (2 if backward and s > 4096 else 1)),
            "HBM": pairs / 512 * column / chip.bandwidth,
        }
    )


def predict(chip: Chip, s: int, heads: int, kv_heads: int, d: int) -> dict:
    """Both passes of LUCID's part and of softmax attention."""
    tiles = Tiles.choose(jnp.dtype(jnp.bfloat16), s, d, chip.vmem)
    passes = {
        name: (
            solve(chip, s, kv_heads, d, tiles, backward=backward),
            splash(chip, s, heads, d, backward=backward),
        )
        for name, backward in (("forward", False), ("backward", True))
    }
    lucid, softmax = (sum(p[i].seconds for p in passes.values()) for i in (0, 1))
    return {
        "chip": chip.name,
        "shape": f"1×{s}, {heads}/{kv_heads}, {d}",
        "tiles": f"{tiles.rows}×{tiles.columns}",
        **{
            name: {
                "ms": {term: 1e3 * t for term, t in p[0].terms.items()}
                | {"latency": 1e3 * p[0].latency, "inverses": 1e3 * p[0].inverses},
                "total_ms": 1e3 * p[0].seconds,
                "bound": p[0].bound,
            }
            for name, p in passes.items()
        },
        "softmax_ms": 1e3 * softmax,
        "overhead": lucid / softmax,
    }


def by_tile(chip: Chip, s: int, kv_heads: int, d: int) -> dict[str, float]:
    """Milliseconds of both passes by tile, of those that fit: what `Tiles.choose` goes by."""
    return {
        f"{tiles.rows}×{tiles.columns}": 1e3
        * sum(solve(chip, s, kv_heads, d, tiles, backward=b).seconds for b in (False, True))
        for tiles in (Tiles(n, min(n, 512)) for n in (128, 256, 512, 1024))
    }


def table(records: Sequence[dict]) -> str:
    """Markdown."""
    lines = [
        "| chip | B×S, H/K, D | tiles | forward | bound by | backward | bound by"
        " | softmax, both | overhead |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for x in records:
        forward, backward = x["forward"], x["backward"]
        lines.append(
            f"| {x['chip']} | {x['shape']} | {x['tiles']}"
            f" | {forward['total_ms']:.2f} ms | {forward['bound']}"
            f" | {backward['total_ms']:.2f} ms | {backward['bound']}"
            f" | {x['softmax_ms']:.1f} ms | {x['overhead']:.0%} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    flags = parser.parse_args(argv)
    chips = [Chip.of(name) for name in CHIPS]
    records = [predict(chip, *shape) for chip in chips for shape in SHAPES]
    print(table(records))
    tiles = {
        f"{chip.name}, 1×{s}, {kv_heads} of {d}": by_tile(chip, s, kv_heads, d)
        for chip in chips
        for s, _, kv_heads, d in SHAPES
    }
    print("\nms of both passes by tile:")
    for name, times in tiles.items():
        print(f"  {name}: " + ", ".join(f"{tile} {t:.2f}" for tile, t in times.items()))
    result = {
        "command": "python -m experiments.tpu_roofline.roofline",
        "prediction": "from data sheets; nothing here was measured",
        "assumed": {
            "step_latency_s": STEP,
            "substitution_s": SUBSTITUTION,
            "exponentials_a_cycle": EXPONENTIALS,
        },
        "records": records,
        "ms_by_tile": tiles,
    }
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "roofline.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
