"""Sweeps the tiles of the Triton kernels; what `triton_schedule` holds comes from here.

  python -m experiments.triton_precondition.tune [--shape=INDEX …]

For each shape, about 25 candidates: of each kernel the tiles in use and those that differ from
them in one number; and with the other number of rows, or with the key gradient divided the
other way (`fused`), the same tiles alone, since those ask whether the table has the right kind
of schedule. What cannot fit registers, or is the same program, is left out.

Every candidate's outputs and gradients are checked against float32 first: Hopper's compilers
have miscompiled kernels of this kind at some settings. Kernels are compiled and timed one by
one, because the inverses of the diagonal blocks, which no candidate changes, compile for longer
than all the others together. A schedule's time is the sum of its kernels'.

Needs a GPU, and writes tuning.json after every shape; those that are not asked for are kept.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import measuring
from experiments.kernels import Shape, gate, repeated
from lucid_jax.ops.precondition import triton as pallas_triton
from lucid_jax.ops.precondition.gram import Keys
from lucid_jax.ops.precondition.triton_schedule import Schedule
from pallas_kernels.triton.tiles import Tiles

RESULTS = pathlib.Path(__file__).parent / "results"
SHAPES = (
    Shape(1, 131072, 4, 4, 64),
    Shape(8, 4096, 4, 4, 64),
    Shape(1, 32768, 16, 16, 128),
    Shape(1, 8192, 1, 1, 128),
    # The 1B model's.
    Shape(1, 32768, 4, 4, 64),
    Shape(16, 2048, 4, 4, 64),
)
# In their order; the first is a cost of the rows alone.
KERNELS = ("diagonal", "solve", "transposed", "gradient")
# They divide the key gradient one way or the other.
HALVES = KERNELS[2:]
ROWS = (64, 128)
# What a candidate may have instead.
SIZES = {"columns": (32, 64, 128), "warps": (4, 8), "stages": (2, 3, 4)}
ORDERS = {"lookahead": (0, 1, 2, 3), "head_group": (0, 2, 4)}
# A thread has 255, and needs some for addresses and operands: with more, kernels spill, take
# ptxas up to a minute and lose.
MOST_REGISTERS = 200


class Inputs(NamedTuple):
    """Of the kernels of a shape with blocks of some number of rows."""

    k: jax.Array
    v: jax.Array
    y_bar: jax.Array
    keys: Keys
    inverses: jax.Array
    # In place of what the transposed solve adds up: the time does not depend on the numbers.
    upper: jax.Array


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One of KERNELS with the tiles that a schedule has for it."""

    kernel: str
    schedule: Schedule

    def record(self) -> dict[str, object]:
        """What tells its program from others of the shape."""
        fused = self.schedule.fused and self.kernel in HALVES
        return {"kernel": self.kernel, "tiles": dataclasses.asdict(self.tiles), "fused": fused}

    @property
    def tiles(self) -> Tiles:
        """Those of its kernel; of the diagonal blocks those of the solve, which give the rows."""
        return getattr(self.schedule, "solve" if self.kernel == "diagonal" else self.kernel)

    def call(self, x: Inputs) -> tuple[Callable, tuple]:
        """The kernel as `scheduled` runs it, and its arguments."""
        run, fused = pallas_triton._Run(self.schedule, pallas_triton.INTERPRET), self.schedule.fused
        tiles = self.tiles
        if self.kernel == "diagonal":
            return lambda k: run.diagonal(k, None, tiles.rows), (x.k,)
        if self.kernel == "solve":

            def solve(v, keys, inverses):
                return run.solve(keys, inverses, v, v.dtype)

            return solve, (x.v, x.keys, x.inverses)
        if self.kernel == "transposed":

            def transposed(y_bar, keys, inverses, y):
                return run.solve(keys, inverses, y_bar, y_bar.dtype, reverse=True, y=y)

            return transposed, (x.y_bar, x.keys, x.inverses, x.v if fused else None)

        def gradient(k, keys, y, v_bar, upper):
            return pallas_triton.key_gradient(
                k, keys.k_hat, y, v_bar, None, *run.bounds(keys, keys, tiles), tiles=tiles,
                dtype=k.dtype, upper=upper, interpret=run.interpret,
            )  # fmt: skip

        return gradient, (x.k, x.keys, x.v, x.y_bar, x.upper if fused else None)


def in_use(shape: Shape) -> Schedule:
    """What the table has for the shape on this device."""
    return Schedule.choose(
        jax.devices()[0].device_kind, jnp.dtype(jnp.bfloat16),
        shape.batch, shape.length, shape.kv_heads, shape.head_dim,
    )  # fmt: skip


def registers(kernel: str, tiles: Tiles, fused: bool, d: int) -> float:
    """Float32 numbers of a thread: a tile of `A`, the sums `[R,D]`, and the blocks prepared."""
    sums = 2 if kernel == "transposed" and fused else 1
    prepared = 0 if kernel == "gradient" else tiles.lookahead * tiles.rows / 2
    return tiles.rows * (tiles.columns + sums * d + prepared) / (32 * tiles.warps)


def neighbours(tiles: Tiles, values: Mapping[str, tuple[int, ...]]) -> list[Tiles]:
    """The tiles, and those that differ from them in one number, which is the next of the values."""
    found = [tiles]
    for field, allowed in values.items():
        own = getattr(tiles, field)
        below, above = [x for x in allowed if x < own], [x for x in allowed if x > own]
        for value in (*below[-1:], *above[:1]):
            if field != "columns" or value <= tiles.rows:
                found.append(dataclasses.replace(tiles, **{field: value}))
    return found


def kinds(used: Schedule) -> Iterator[Schedule]:
    """The schedule in use, and those of other rows or with the gradient divided the other way."""
    yield used
    for rows, fused in itertools.product(ROWS, (False, True)):
        of = {kernel: _with_rows(getattr(used, kernel), rows) for kernel in KERNELS[1:]}
        kind = dataclasses.replace(used, **of, fused=fused)
        if kind != used:
            yield kind


def _with_rows(tiles: Tiles, rows: int) -> Tiles:
    # As many rows a warp, so that a thread has as much.
    warps = min(8, max(4, tiles.warps * rows // tiles.rows))
    return dataclasses.replace(tiles, rows=rows, columns=min(tiles.columns, rows), warps=warps)


def candidates(shape: Shape, used: Schedule) -> list[Candidate]:
    """Those of each kernel; the first of a kernel is the one in use."""
    heads = shape.batch * shape.kv_heads
    found: dict[tuple, Candidate] = {}
    for kernel in KERNELS:
        for kind in kinds(used):
            if kernel == "diagonal":
                found.setdefault((kernel, kind.solve.rows), Candidate(kernel, kind))
                continue
            values = SIZES if kernel == "gradient" else SIZES | ORDERS
            tiles, fused = getattr(kind, kernel), kind.fused and kernel in HALVES
            for t in neighbours(tiles, values) if kind == used else [tiles]:
                needed = registers(kernel, t, fused, shape.head_dim)
                if needed > MOST_REGISTERS and t != getattr(used, kernel):
                    continue
                # As many heads in a group as there are, and all of them, are the same program.
                head_group = math.gcd(t.head_group, heads)
                program = kernel, dataclasses.replace(t, head_group=head_group), fused
                changed: dict[str, Any] = {kernel: t}
                schedule = dataclasses.replace(kind, **changed)
                found.setdefault(program, Candidate(kernel, schedule))
    return list(found.values())


def check(shape: Shape, schedule: Schedule) -> float:
    """The error of outputs and gradients with these tiles, or GateError.

    Outside of `jit` each kernel is a program, compiled once for all candidates that share it.
    """
    interpret = pallas_triton.INTERPRET
    op = functools.partial(pallas_triton.scheduled, schedule, interpret)
    return gate(shape, lambda k, v: op(k, v, None, None))


def draw(shape: Shape, kind: Schedule) -> Inputs:
    """What all candidates of a shape and number of rows share."""
    arrays = shape.draw()
    k, v, y_bar = (arrays[name] for name in ("k", "v", "y_bar"))
    run = pallas_triton._Run(kind, pallas_triton.INTERPRET)
    keys, inverses = run.diagonal(k, None, kind.solve.rows)
    return Inputs(k, v, y_bar, keys, inverses, v.astype(jnp.float32))


def prepare(shape: Shape, candidate: Candidate, x: Inputs) -> Callable[[], object] | str:
    """Checks and compiles; a call that runs on the device, or why there is none."""
    try:
        check(shape, candidate.schedule)
        return repeated(*candidate.call(x), shape.repeats("forward"))
    except Exception as error:  # The compiler's too: out of registers or shared memory, say.
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"


Sweep = dict[Candidate, Callable[[], object] | str]


def prepare_all(shapes: Sequence[Shape]) -> dict[Shape, Sweep]:
    """Every candidate of every shape.

    Nothing is timed meanwhile, because compilation takes the host's attention from the device.
    """
    of = {shape: candidates(shape, in_use(shape)) for shape in shapes}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        # The long ones, and what others share, first: two threads would compile it twice.
        kinds_of = [(s, c.schedule) for s in shapes for c in of[s] if c.kernel == "diagonal"]
        checked = [pool.submit(check, *each) for each in kinds_of]
        drawn = {(s, kind.solve.rows): pool.submit(draw, s, kind) for s, kind in kinds_of}
        # An error comes again, and is told, where the candidate is prepared.
        concurrent.futures.wait(checked)
        runs = {
            shape: {
                c: pool.submit(prepare, shape, c, drawn[shape, c.schedule.solve.rows].result())
                for c in of[shape]
            }
            for shape in shapes
        }
        return {s: {c: run.result() for c, run in sweep.items()} for s, sweep in runs.items()}


def measure(shape: Shape, sweep: Sweep, rounds: int) -> list[dict]:
    """One record for each candidate: milliseconds, and over the one in use in the same round."""
    records = []
    for kernel in KERNELS:
        group = {c: run for c, run in sweep.items() if c.kernel == kernel}
        runs = {c: run for c, run in group.items() if not isinstance(run, str)}
        times = measuring.interleaved(runs, seconds=0, fewest=rounds)
        used = next(iter(group))
        for candidate, run in group.items():
            record = {"shape": str(shape), **candidate.record(), "in_use": candidate == used}
            if isinstance(run, str):
                record["error"] = run
            else:
                of = times[candidate]
                record["median_ms"] = 1e3 * statistics.median(of) / shape.repeats("forward")
                if used in times:
                    ratios = (t / u for t, u in zip(of, times[used]))
                    record["over_in_use"] = statistics.median(ratios)
            records.append(record)
    return records


def merged(old: Sequence[Mapping], new: Sequence[Mapping]) -> list[Mapping]:
    """The new records instead of those of the same shapes."""
    shapes = {x["shape"] for x in new}
    return [*(x for x in old if x["shape"] not in shapes), *new]


def described(record: Mapping) -> str:
    """A record's tiles."""
    t = record["tiles"]
    if record["kernel"] == "diagonal":
        return f"{t['rows']} rows"
    order = (
        ""
        if record["kernel"] == "gradient"
        else f" {t['lookahead']} lookahead {t['head_group']} heads a group"
    )
    fused = " fused" if record["fused"] else ""
    return f"{t['rows']}×{t['columns']} {t['warps']} warps {t['stages']} stages{order}{fused}"


def table(records: Sequence[Mapping]) -> str:
    """For each shape the fastest of each kernel and kind, and the kinds' sums, over those in use.

    A kernel that does half of the key gradient, or leaves it, is not judged by its own time:
    the sums tell.
    """
    lines = [
        "| B×S, H/K, D | kernel | fastest | ms | over the one in use |",
        "|---|---|---|---|---|",
    ]
    for shape in dict.fromkeys(x["shape"] for x in records):
        timed = [x for x in records if x["shape"] == shape and "median_ms" in x]
        used = {x["kernel"]: x for x in timed if x["in_use"]}

        def fastest(kernel: str, rows: int | None, fused: bool, timed=timed) -> Mapping | None:
            of = [
                x
                for x in timed
                if x["kernel"] == kernel
                and rows in (None, x["tiles"]["rows"])
                and x["fused"] == (fused and kernel in HALVES)
            ]
            return min(of, key=lambda x: x["median_ms"], default=None)

        for kernel in KERNELS[1:]:
            if kernel in used:
                best = fastest(kernel, None, used[kernel]["fused"])
                assert best is not None
                lines.append(
                    f"| {shape} | {kernel} | {described(best)} | {best['median_ms']:.3f}"
                    f" | {best['over_in_use']:.3f} |"
                )
        whole = sum(x["median_ms"] for x in used.values())
        for rows, fused in itertools.product(ROWS, (False, True)):
            # Apart, the key gradient may have rows of its own.
            free = {"gradient"} if not fused else set()
            parts = [fastest(k, None if k in free else rows, fused) for k in KERNELS]
            if len(used) == len(KERNELS) and all(parts):
                total = sum(x["median_ms"] for x in parts if x)
                kind = f"{rows} rows{', fused' if fused else ''}"
                lines.append(f"| {shape} | all | {kind} | {total:.3f} | {total / whole:.3f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Sweeps the shapes, prints as it goes and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape",
        type=int,
        action="append",
        choices=range(len(SHAPES)),
        help="by default all: " + "; ".join(f"{i}: {x}" for i, x in enumerate(SHAPES)),
    )
    parser.add_argument("--rounds", type=int, default=5, help="of timing, a candidate")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    flags = parser.parse_args(argv)
    if jax.default_backend() != "gpu" and not pallas_triton.INTERPRET:
        parser.error(f"it needs a GPU; the default backend is {jax.default_backend()}")
    flags.out.mkdir(parents=True, exist_ok=True)
    path = flags.out / "tuning.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    records = old.get("records", [])
    shapes = [SHAPES[i] for i in flags.shape] if flags.shape else SHAPES
    environments, environment = old.get("environments", {}), measuring.environment()
    for shape, sweep in prepare_all(shapes).items():
        new = measure(shape, sweep, flags.rounds)
        for x in new:
            result = x.get("error") or f"{x['median_ms']:.3f} ms"
            print(f"{shape}  {x['kernel']:10}  {described(x)}  {result}", flush=True)
        records, environments[str(shape)] = merged(records, new), environment
        result = {
            "command": "python -m experiments.triton_precondition.tune",
            "environments": environments,
            "dtype": "bfloat16",
            "records": records,
        }
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
