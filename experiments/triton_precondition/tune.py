"""Sweeps the tiles of the Triton kernels; what `triton_schedule` holds comes from here.

  python -m experiments.triton_precondition.tune

For each shape, candidates that differ from the tiles in use in one number replace them, kernel
by kernel, while the others stay.
Outputs and gradients of each are checked against float32 first: Hopper's compilers have
miscompiled kernels of this kind at some settings. Needs a GPU, and writes tuning.json.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from experiments import measuring
from experiments.kernels import Shape, gate, repeated
from lucid_jax.ops.precondition import pallas_triton
from lucid_jax.ops.precondition.triton_schedule import Schedule
from pallas_kernels.triton.tiles import Tiles

RESULTS = pathlib.Path(__file__).parent / "results"
SHAPES = (
    Shape(1, 131072, 4, 4, 64),
    Shape(8, 4096, 4, 4, 64),
    Shape(1, 32768, 16, 16, 128),
    Shape(1, 8192, 1, 1, 128),
)
# What a candidate may have instead.
SIZES = {"columns": (32, 64, 128), "warps": (4, 8), "stages": (2, 3, 4)}
ORDERS = {"window": (0, 1, 2), "together": (0, 2, 4)}


def neighbours(tiles: Tiles, values: dict[str, tuple[int, ...]]) -> list[Tiles]:
    """The tiles, and those that differ from them in one number."""
    others = (
        dataclasses.replace(tiles, **{field: value})
        for field, allowed in values.items()
        for value in allowed
        if value != getattr(tiles, field)
    )
    return [tiles, *(t for t in others if t.columns <= t.rows)]


def candidates(used: Schedule) -> list[tuple[str, Schedule]]:
    """The kernel that each is about, and a schedule that differs from the used one in it."""
    replace = dataclasses.replace
    found = []
    for rows in (64, 128):
        transposed = replace(used.transposed, rows=rows, columns=64)
        for t in neighbours(replace(used.solve, rows=rows, columns=64), SIZES | ORDERS):
            found.append(("solve", replace(used, solve=t, transposed=transposed, fused=False)))
    for t in neighbours(used.transposed, SIZES | ORDERS):
        found.append(("transposed", replace(used, transposed=t)))
    other = replace(used.gradient, rows=used.transposed.rows, columns=64)
    found.append(("transposed", replace(used, gradient=other, fused=not used.fused)))
    for t in neighbours(used.gradient, SIZES):
        found.append(("gradient", replace(used, gradient=t)))
    return found


def prepare(
    shape: Shape, kernel: str, schedule: Schedule, arrays: dict, repeats: int
) -> Callable[[], object] | str:
    """Checks and compiles; a call that runs on the device, or why there is none."""

    def op(k, v):
        return pallas_triton.scheduled(schedule, False, k, v, None, None)

    try:
        gate(shape, op)
        if kernel == "solve":
            return repeated(op, (arrays["k"], arrays["v"]), repeats)
        both = measuring.forward_and_backward(op)
        arguments = tuple(arrays[name] for name in ("k", "v", "y_bar"))
        return repeated(lambda k, v, y_bar: both((k, v), y_bar), arguments, repeats)
    except Exception as error:  # The compiler's too: out of registers or shared memory, say.
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"


def tune(shape: Shape, rounds: int) -> list[dict]:
    """One record for each candidate: milliseconds, of the backward pass too but for `solve`."""
    used = Schedule.choose(
        jax.devices()[0].device_kind, jnp.dtype(jnp.bfloat16),
        shape.batch, shape.length, shape.kv_heads, shape.head_dim,
    )  # fmt: skip
    arrays = shape.draw()
    repeats = shape.repeats("forward")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = list(pool.map(lambda c: prepare(shape, *c, arrays, repeats), candidates(used)))
    records = []
    for (kernel, schedule), run in zip(candidates(used), runs):
        tiles = getattr(schedule, kernel)
        fused = kernel != "solve" and schedule.fused
        record = {
            "shape": str(shape),
            "kernel": kernel,
            "candidate": dataclasses.asdict(tiles),
            "fused": fused,
            "in_use": schedule == used or (kernel == "solve" and tiles == used.solve),
        }
        if isinstance(run, str):
            record["error"] = run
        else:
            times = measuring.interleaved({"run": run}, seconds=0, fewest=rounds)["run"]
            record["median_ms"] = 1e3 * statistics.median(times) / repeats
        records.append(record)
        print(
            f"{shape}  {kernel:10}  {tiles.rows:3}×{tiles.columns:<3} {tiles.warps} warps"
            f" {tiles.stages} stages window {tiles.window} together {tiles.together}"
            f" {'fused' if fused else ''}  "
            + (record.get("error") or f"{record['median_ms']:.3f} ms")
            + ("  in use" if record["in_use"] else ""),
            flush=True,
        )
    return records


def main(argv: Sequence[str] | None = None) -> None:
    """Sweeps every shape, prints as it goes and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of timing, a candidate")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    flags = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        parser.error(f"it needs a GPU; the default backend is {jax.default_backend()}")
    records = [record for shape in SHAPES for record in tune(shape, flags.rounds)]
    flags.out.mkdir(parents=True, exist_ok=True)
    result = {
        "command": "python -m experiments.triton_precondition.tune",
        "environment": measuring.environment(),
        "dtype": "bfloat16",
        "records": records,
    }
    (flags.out / "tuning.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
