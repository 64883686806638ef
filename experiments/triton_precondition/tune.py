"""Sweeps the tiles of the Triton kernels; what `triton_schedule` holds comes from here.

  python -m experiments.triton_precondition.tune

For each shape, every candidate of a kernel replaces the one in use while the others stay.
Outputs and gradients of each are checked against float32 first: Hopper's compilers have
miscompiled kernels of this kind at some settings. Needs a GPU, and writes tuning.json.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
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
# Rows, columns, warps, stages.
SIZES = ((64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 3))
SOLVES = tuple(
    Tiles(*size, window=window)
    for size, window in itertools.product(SIZES, (0, 1, 2, 3))
    # A window of 128 rows holds four times the registers.
    if size[0] == 64 or window < 2
)
GRADIENTS = tuple(Tiles(*size) for size in ((64, 64, 4, 2), *SIZES))


def candidates(used: Schedule) -> list[tuple[str, Schedule]]:
    """The kernel that each is about, and a schedule that differs from the used one in it."""
    found = [
        ("solve", dataclasses.replace(used, solve=t, transposed=t, fused=False)) for t in SOLVES
    ]
    for fused, t in itertools.product((False, True), SOLVES):
        gradient = dataclasses.replace(used.gradient, rows=t.rows) if fused else used.gradient
        if t.rows == used.solve.rows:
            schedule = dataclasses.replace(used, transposed=t, gradient=gradient, fused=fused)
            found.append(("transposed", schedule))
    for t in GRADIENTS:
        if not used.fused or t.rows == used.transposed.rows:
            found.append(("gradient", dataclasses.replace(used, gradient=t)))
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
    repeats = max(1, 2**31 // (shape.batch * shape.kv_heads * shape.length**2))
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
            f" {tiles.stages} stages window {tiles.window} {'fused' if fused else ''}  "
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
