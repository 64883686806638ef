"""Sweeps the tiles of the Triton kernels; the tables of `triton_schedule` come from here.

  python -m experiments.triton_precondition.tune [--shape=INDEX …]

A shape, of all or those named, has about 25 candidates. For each kernel they are the tiles in use,
and the tiles that differ from them in one number. The tiles in use are also tried with the other
number of rows, and with the key gradient divided the other way (`fused`), which tells whether the
table has the right kind of schedule. Candidates that cannot fit the registers, or are the same
program as another, are left out.

Outputs and gradients of every candidate are checked against float32 first, because Hopper's
compilers have miscompiled kernels of this kind at some settings. Kernels are compiled and timed
one by one; the time of a schedule is the sum over its kernels. Needs a GPU. Writes tuning.json
after every shape, and keeps the records of other shapes.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import measuring, reporting
from experiments.kernels import Shape, gate, repeated
from experiments.triton_precondition.benchmark import schedule_in_use
from lucid_jax.ops.precondition import triton as pallas_triton
from lucid_jax.ops.precondition.api import precondition_with
from lucid_jax.ops.precondition.gram import Keys
from lucid_jax.ops.precondition.triton_schedule import Schedule
from pallas_kernels.triton.scaled import Scaled
from pallas_kernels.triton.tiles import Tiles

SHAPES = (
    Shape(1, 131072, 4, 4, 64),
    Shape(8, 4096, 4, 4, 64),
    Shape(1, 32768, 16, 16, 128),
    Shape(1, 8192, 1, 1, 128),
    # The 1B model's shapes.
    Shape(1, 32768, 4, 4, 64),
    Shape(16, 2048, 4, 4, 64),
)
# In the order in which they run. The cost of the first depends on the rows alone.
KERNELS = ("diagonal", "solve", "transposed", "gradient")
# The kernels among which the key gradient is divided.
HALVES = KERNELS[2:]
ROWS = (64, 128)
# Values that a candidate may have instead of those in use.
SIZES = {"columns": (32, 64, 128), "warps": (4, 8), "stages": (2, 3, 4)}
ORDERS = {"lookahead": (0, 1, 2, 3), "head_group": (0, 2, 4)}
# Of a thread's 255 registers. Kernels that need more spill, are slow, and compile for a minute.
MOST_REGISTERS = 200


class Inputs(NamedTuple):
    """Inputs of the kernels of one shape and number of rows."""

    k: jax.Array
    v: jax.Array
    y_bar: jax.Array
    keys: Keys
    inverses: jax.Array
    # Stands in for the scaled copies of `y` and `v̄`.
    scaled: Scaled | None
    # Stands in for the half of the key gradient that the transposed solve adds up; its values do
    # not change the time.
    upper: jax.Array


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One of KERNELS, with the tiles that a schedule has for it."""

    kernel: str
    schedule: Schedule

    def record(self) -> dict[str, object]:
        """Returns what distinguishes the candidate's program from others of the shape."""
        fused = self.schedule.fused and self.kernel in HALVES
        return {"kernel": self.kernel, "tiles": dataclasses.asdict(self.tiles), "fused": fused}

    @property
    def tiles(self) -> Tiles:
        """The kernel's tiles; the diagonal blocks have as many rows as the solve's."""
        return getattr(self.schedule, "solve" if self.kernel == "diagonal" else self.kernel)

    @property
    def backend(self) -> pallas_triton.TritonBackend:
        """The backend with the candidate's schedule."""
        return pallas_triton.TritonBackend(self.schedule, interpret=pallas_triton.INTERPRET)

    def call(self, x: Inputs) -> tuple[Callable, tuple]:
        """Returns the kernel as the backend runs it, and its arguments."""
        backend, schedule, tiles = self.backend, self.schedule, self.tiles

        def diagonal(k):
            return backend.operands(schedule, k)

        def solve(k, v, keys, inverses):
            return backend.solve(schedule, keys, inverses, v, k=k)

        def transposed(k, y_bar, keys, inverses, y):
            return backend.solve(schedule, keys, inverses, y_bar, reverse=True, k=k, y=y)

        def gradient(k, keys, y, v_bar, scaled, upper):
            return pallas_triton.key_gradient(
                k, keys.k_hat, y, v_bar, None, None, None, tiles=tiles, dtype=k.dtype,
                y_scaled=scaled, v_bar_scaled=scaled, upper=upper, interpret=backend.interpret,
            )  # fmt: skip

        y, upper = (x.scaled or x.v, x.upper) if schedule.fused else (None, None)
        calls: dict[str, tuple[Callable, tuple]] = {
            "diagonal": (diagonal, (x.k,)),
            "solve": (solve, (x.k, x.v, x.keys, x.inverses)),
            "transposed": (transposed, (x.k, x.y_bar, x.keys, x.inverses, y)),
            "gradient": (gradient, (x.k, x.keys, x.v, x.y_bar, x.scaled, upper)),
        }
        return calls[self.kernel]


def registers(kernel: str, tiles: Tiles, fused: bool, d: int) -> float:
    """Returns the float32 numbers a thread holds: a tile of `A`, sums `[R,D]`, prepared blocks."""
    sums = 2 if kernel == "transposed" and fused else 1
    prepared = 0 if kernel == "gradient" else tiles.lookahead * tiles.rows / 2
    return tiles.rows * (tiles.columns + sums * d + prepared) / (32 * tiles.warps)


def neighbours(tiles: Tiles, values: Mapping[str, tuple[int, ...]]) -> list[Tiles]:
    """Returns the tiles, and those with one number replaced by the next smaller or larger value."""
    found = [tiles]
    for field, allowed in values.items():
        own = getattr(tiles, field)
        below, above = [x for x in allowed if x < own], [x for x in allowed if x > own]
        for value in (*below[-1:], *above[:1]):
            if field != "columns" or value <= tiles.rows:
                found.append(dataclasses.replace(tiles, **{field: value}))
    return found


def schedules(used: Schedule) -> Iterator[Schedule]:
    """Yields the schedule in use, then those with other rows or the other key gradient."""
    yield used
    for rows, fused in itertools.product(ROWS, (False, True)):
        tiles = {kernel: _with_rows(getattr(used, kernel), rows) for kernel in KERNELS[1:]}
        other = dataclasses.replace(used, **tiles, fused=fused)
        if other != used:
            yield other


def _with_rows(tiles: Tiles, rows: int) -> Tiles:
    # The rows of a warp stay the same, and with them the registers of a thread.
    warps = min(8, max(4, tiles.warps * rows // tiles.rows))
    return dataclasses.replace(tiles, rows=rows, columns=min(tiles.columns, rows), warps=warps)


def candidates(shape: Shape, used: Schedule) -> list[Candidate]:
    """Returns the candidates of each kernel, first the one in use."""
    heads = shape.batch * shape.kv_heads
    found: dict[tuple, Candidate] = {}
    for kernel, schedule in itertools.product(KERNELS, schedules(used)):
        if kernel == "diagonal":
            found.setdefault((kernel, schedule.solve.rows), Candidate(kernel, schedule))
            continue
        values = SIZES if kernel == "gradient" else SIZES | ORDERS
        tiles, fused = getattr(schedule, kernel), schedule.fused and kernel in HALVES
        for t in neighbours(tiles, values) if schedule == used else [tiles]:
            needed = registers(kernel, t, fused, shape.head_dim)
            if needed <= MOST_REGISTERS or t == getattr(used, kernel):
                # One group of all heads is the same program as no groups.
                head_group = math.gcd(t.head_group, heads)
                program = kernel, dataclasses.replace(t, head_group=head_group), fused
                changed: dict[str, Any] = {kernel: t}
                candidate = Candidate(kernel, dataclasses.replace(schedule, **changed))
                found.setdefault(program, candidate)
    return list(found.values())


def check(shape: Shape, candidate: Candidate) -> float:
    """Returns the error of outputs and gradients; raises GateError if too large."""
    # Without `jit` each kernel is a program of its own, compiled once for all candidates.
    return gate(shape, lambda k, v: precondition_with(candidate.backend, k, v, None, None))


def draw(shape: Shape, candidate: Candidate) -> Inputs:
    """Returns the inputs of all candidates of a shape and number of rows."""
    arrays = shape.draw()
    k, v, y_bar = (arrays[name] for name in ("k", "v", "y_bar"))
    schedule = candidate.schedule
    keys, inverses = candidate.backend.operands(schedule, k)
    _, scaled, _ = candidate.backend.solve(schedule, keys, inverses, v, k=k)
    return Inputs(k, v, y_bar, keys, inverses, scaled, v.astype(jnp.float32))


def prepare(shape: Shape, candidate: Candidate, x: Inputs) -> Callable[[], object] | str:
    """Checks and compiles a candidate; returns a call that runs it, or an error message."""
    try:
        check(shape, candidate)
        return repeated(*candidate.call(x), shape.repeats("forward"))
    except Exception as error:  # For example the compiler's, when registers run out.
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"


Sweep = dict[Candidate, Callable[[], object] | str]


def prepare_all(shapes: Sequence[Shape]) -> dict[Shape, Sweep]:
    """Prepares every candidate of every shape before any is timed, since compilation disturbs."""
    by_shape = {shape: candidates(shape, schedule_in_use(shape)) for shape in shapes}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        # First the inverses: they compile longest, and two threads that need the same ones at once
        # would compile them twice.
        first = [(s, c) for s in shapes for c in by_shape[s] if c.kernel == "diagonal"]
        checked = [pool.submit(check, *each) for each in first]
        inputs = {(s, c.tiles.rows): pool.submit(draw, s, c) for s, c in first}
        # An error is raised again, and recorded, where the candidate is prepared.
        concurrent.futures.wait(checked)
        runs = {
            shape: {
                c: pool.submit(prepare, shape, c, inputs[shape, c.schedule.solve.rows].result())
                for c in by_shape[shape]
            }
            for shape in shapes
        }
        return {s: {c: run.result() for c, run in sweep.items()} for s, sweep in runs.items()}


def measure(shape: Shape, sweep: Sweep, rounds: int) -> list[dict]:
    """Returns a record of each candidate: its milliseconds, and its time over the one in use."""
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
                seconds = times[candidate]
                record["median_ms"] = 1e3 * statistics.median(seconds) / shape.repeats("forward")
                if used in times:
                    ratios = (t / u for t, u in zip(seconds, times[used]))
                    record["over_in_use"] = statistics.median(ratios)
            records.append(record)
    return records


def described(record: Mapping) -> str:
    """Returns a record's tiles in words."""
    t = record["tiles"]
    if record["kernel"] == "diagonal":
        return f"{t['rows']} rows"
    text = f"{t['rows']}×{t['columns']} {t['warps']} warps {t['stages']} stages"
    if record["kernel"] != "gradient":
        text += f" {t['lookahead']} lookahead {t['head_group']} heads a group"
    return text + (" fused" if record["fused"] else "")


def fastest(timed: Sequence[Mapping], kernel: str, rows: int | None, fused: bool) -> Mapping | None:
    """Returns the fastest record of a kernel, of so many rows or of any."""
    matching = (
        x
        for x in timed
        if x["kernel"] == kernel
        and rows in (None, x["tiles"]["rows"])
        and x["fused"] == (fused and kernel in HALVES)
    )
    return min(matching, key=lambda x: x["median_ms"], default=None)


def table(records: Sequence[Mapping]) -> str:
    """Returns for each shape the fastest of each kernel, and sums over kernels by kind of schedule.

    A kernel that computes or leaves half of the key gradient is judged by the sums only.
    """
    rows = []
    for shape in dict.fromkeys(x["shape"] for x in records):
        timed = [x for x in records if x["shape"] == shape and "median_ms" in x]
        used = {x["kernel"]: x for x in timed if x["in_use"]}
        for kernel in KERNELS[1:]:
            if kernel in used and (best := fastest(timed, kernel, None, used[kernel]["fused"])):
                times = f"{best['median_ms']:.3f}", f"{best['over_in_use']:.3f}"
                rows.append((shape, kernel, described(best), *times))
        whole = sum(x["median_ms"] for x in used.values())
        for block, fused in itertools.product(ROWS, (False, True)):
            # A separate key gradient may have another number of rows.
            blocks = {k: None if k == "gradient" and not fused else block for k in KERNELS}
            parts = [fastest(timed, k, of, fused) for k, of in blocks.items()]
            if len(used) == len(KERNELS) and all(parts):
                total = sum(x["median_ms"] for x in parts if x)
                kind = f"{block} rows{', fused' if fused else ''}"
                rows.append((shape, "all", kind, f"{total:.3f}", f"{total / whole:.3f}"))
    header = ("B×S, H/K, D", "kernel", "fastest", "ms", "over the one in use")
    return reporting.markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Sweeps the shapes, prints as it goes and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    known, choices = "; ".join(f"{i}: {x}" for i, x in enumerate(SHAPES)), range(len(SHAPES))
    parser.add_argument("--shape", type=int, action="append", choices=choices, help=known)
    parser.add_argument("--rounds", type=int, default=5, help="of timing for each candidate")
    flags = parser.parse_args(argv)
    if not pallas_triton.INTERPRET:
        measuring.require_gpus(parser)
    path = flags.out / "tuning.json"
    old = json.loads(path.read_text()) if path.exists() else {"environments": [], "records": []}
    environments, records = old["environments"], old["records"]
    shapes = [SHAPES[i] for i in flags.shape] if flags.shape else SHAPES
    environment = measuring.environment()
    for shape, sweep in prepare_all(shapes).items():
        new = measure(shape, sweep, flags.rounds)
        for x in new:
            time = x.get("error") or f"{x['median_ms']:.3f} ms"
            print(f"{shape}  {x['kernel']:10}  {described(x)}  {time}", flush=True)
        environments = [x for x in environments if x["shape"] != str(shape)]
        environments.append({"shape": str(shape), **environment})
        records = [*(x for x in records if x["shape"] != str(shape)), *new]
        header = {"command": parser.prog, "environments": environments, "dtype": "bfloat16"}
        reporting.write_json(path, **header, records=records)
    print(table(records))


if __name__ == "__main__":
    main()
