"""Time and memory of the blockwise XLA solve against length.

  python -m experiments.xla_precondition.benchmark

One process compares `precondition` blockwise, the dense solve, and blockwise softmax attention on
the same heads. Every program is checked before any is timed. Takes about 6 minutes on 2 CPU cores;
writes benchmark.json and benchmark.png.
"""

import functools
import math
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import measuring, reporting
from experiments.kernels import Shape
from lucid_jax import precondition, softmax_attention

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEADS, HEAD_DIM = 2, 64
TOLERANCE = 1e-5
PASSES = ("forward", "forward+backward")


class Contestant(NamedTuple):
    """One op of one backend."""

    name: str
    op: Callable
    implementation: str
    inputs: tuple[str, ...]  # Names of the op's arguments.
    longest: float = math.inf  # The length beyond which it would need too much memory.


PRECONDITION = Contestant("precondition, xla", precondition, "xla", ("k", "v"))
DENSE = Contestant("precondition, dense", precondition, "reference", ("k", "v"), longest=8192)
SOFTMAX = Contestant("softmax attention, xla", softmax_attention, "xla", ("q", "k", "v"))
CONTESTANTS = (PRECONDITION, DENSE, SOFTMAX)


def compile_passes(
    contestant: Contestant, arrays: dict[str, jax.Array], dtype: str = "float32", **options: str
) -> dict[str, tuple[jax.stages.Compiled, tuple]]:
    """Compiles both passes for inputs of a dtype; returns the programs with their arguments."""
    op = functools.partial(contestant.op, implementation=contestant.implementation, **options)
    x = tuple(jnp.asarray(arrays[name], dtype) for name in contestant.inputs)
    both = *x, jnp.asarray(arrays["o_bar"], dtype)
    ops: tuple[Callable, Callable] = op, measuring.forward_and_backward(op)
    passes = zip(PASSES, ops, (x, both))
    return {name: (jax.jit(f).lower(*args).compile(), args) for name, f, args in passes}


def run(program: tuple[jax.stages.Compiled, tuple]):
    """Runs a pass and waits for it."""
    compiled, arguments = program
    return jax.block_until_ready(compiled(*arguments))


def exact_results(contestant: Contestant, arrays: dict[str, jax.Array]) -> list[np.ndarray]:
    """Returns the op's output and gradients by the blockwise backend in float64."""
    # The conformance tests hold that backend to a dense float64 oracle.
    contestant = contestant._replace(implementation="xla")
    with jax.enable_x64(True):
        programs = compile_passes(contestant, arrays, "float64", precision="highest")
        return jax.tree.leaves(jax.device_get(run(programs["forward+backward"])))


def check(contestant: Contestant, programs: dict, exact: Sequence[np.ndarray]) -> float:
    """Returns the largest relative error of both passes; raises GateError if too large."""
    names = "out", *(f"gradient of {name}" for name in contestant.inputs)
    errors = []
    for name, program in programs.items():
        found = dict(zip(names, jax.tree.leaves(run(program))))
        expected = {output: x for output, x in zip(names, exact) if output in found}
        errors.append(measuring.judge(f"{contestant.name}, {name}", found, expected, TOLERANCE))
    return max(errors)


def benchmark(length: int, seconds: float) -> list[dict]:
    """Checks, then times every contestant at one length; returns a record for each pass."""
    arrays = Shape(1, length, HEADS, HEADS, HEAD_DIM).draw()
    exact = {c.op: exact_results(c, arrays) for c in (PRECONDITION, SOFTMAX)}
    contestants = [c for c in CONTESTANTS if length <= c.longest]
    programs = {c.name: compile_passes(c, arrays) for c in contestants}
    errors = {c.name: check(c, programs[c.name], exact[c.op]) for c in contestants}
    records = []
    for name in PASSES:
        runs = {op: functools.partial(run, passes[name]) for op, passes in programs.items()}
        times = measuring.interleaved(runs, seconds)
        records += [
            {
                "op": op,
                "length": length,
                "pass": name,
                "relative_error": errors[op],
                "temp_bytes": measuring.temp_bytes(passes[name][0]),
                "median_s": statistics.median(times[op]),
            }
            for op, passes in programs.items()
        ]
    return records


def table(records: Sequence[dict]) -> str:
    """Returns a Markdown table of medians, ratios within the run, and memory."""
    by_key = {(x["op"], x["length"], x["pass"]): x for x in records}
    header = (
        "S", "pass", "blockwise", "dense", "softmax", "blockwise / softmax", "dense / blockwise",
        "temporaries: blockwise", "dense", "softmax",
    )  # fmt: skip
    rows = []
    for length in dict.fromkeys(x["length"] for x in records):
        for name in PASSES:
            found = [by_key.get((c.name, length, name)) for c in CONTESTANTS]
            ms = [1e3 * x["median_s"] if x else math.nan for x in found]
            mib = [x["temp_bytes"] / 2**20 if x else math.nan for x in found]
            cells = [f"{x:,.1f} ms" for x in ms]
            cells += [f"{ms[0] / ms[2]:.2f}", f"{ms[1] / ms[0]:.2f}"]
            cells += [f"{x:,.1f} MiB" for x in mib]
            cells = ["–" if cell.startswith("nan") else cell for cell in cells]
            rows.append((length, name, *cells))
    return reporting.markdown(header, rows)


def plot(records: Sequence[dict], path: pathlib.Path) -> None:
    """Plots time and temporaries of both passes together against S."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = {"median_s": "seconds (median)", "temp_bytes": "bytes of temporaries"}
    for axes, (field, label) in zip(panels, labels.items()):
        for contestant in CONTESTANTS:
            mine = [x for x in records if x["op"] == contestant.name and x["pass"] == PASSES[1]]
            points = [x["length"] for x in mine], [x[field] for x in mine]
            axes.loglog(*points, marker="o", ms=4, base=2, label=contestant.name)
        axes.set(xlabel="S", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log", base=10)
    panels[0].legend(frameon=False)
    panels[0].set_title("forward and backward")
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Benchmarks every length, prints the table and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    parser.add_argument("--lengths", type=reporting.integers, default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=15, help="of timing, a pass and length")
    flags = parser.parse_args(argv)
    header = measuring.provenance(flags)
    records = [x for length in flags.lengths for x in benchmark(length, flags.seconds)]
    print(table(records))
    header |= {"shape": {"batch": 1, "heads": HEADS, "head_dim": HEAD_DIM}, "dtype": "float32"}
    reporting.write_json(flags.out / "benchmark.json", **header, records=records)
    plot(records, flags.out / "benchmark.png")


if __name__ == "__main__":
    main()
