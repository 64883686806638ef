"""Time and memory of the blockwise XLA solve against length.

  python -m experiments.xla_precondition.benchmark

One process compares `precondition` blockwise, the dense solve, and blockwise softmax attention on
the same heads. Every program is checked before any is timed. Takes about 6 minutes on 2 CPU cores;
writes benchmark.json and benchmark.png.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import measuring, reporting
from lucid_jax import precondition, softmax_attention

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEADS = 2
HEAD_DIM = 64
COSINE = 0.5
TOLERANCE = 1e-5
PASSES = ("forward", "forward+backward")


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One op of one backend.

    Attributes:
      name: Its name in tables and results.
      op: The public function.
      implementation: The backend.
      inputs: Names of the op's arguments among the arrays of `draw`.
      longest: The length beyond which it would need too much memory.
    """

    name: str
    op: Callable
    implementation: str
    inputs: tuple[str, ...]
    longest: int | None = None


PRECONDITION = Contestant("precondition, xla", precondition, "xla", ("k", "v"))
DENSE = Contestant("precondition, dense", precondition, "reference", ("k", "v"), longest=8192)
SOFTMAX = Contestant("softmax attention, xla", softmax_attention, "xla", ("q", "k", "v"))
CONTESTANTS = (PRECONDITION, DENSE, SOFTMAX)


def draw(length: int) -> dict[str, np.ndarray]:
    """Returns float32 `q, k, v [1,S,K,D]` and a cotangent of the output.

    The keys share a direction, so that `A` is far from the identity (its entries are about
    `exp(√D(COSINE−1))`) and errors of the solve show.
    """
    rng = np.random.default_rng(length)
    shape = (1, length, HEADS, HEAD_DIM)
    common = rng.normal(size=(1, 1, HEADS, HEAD_DIM))
    arrays = {name: rng.normal(size=shape) for name in ("q", "k", "v", "cotangent")}
    arrays["k"] = np.sqrt(COSINE) * common + np.sqrt(1 - COSINE) * arrays["k"]
    return {name: x.astype(np.float32) for name, x in arrays.items()}


class Programs:
    """Both passes of a contestant, compiled for float32 inputs of one length."""

    def __init__(self, contestant: Contestant, arrays: dict[str, np.ndarray]):
        self._contestant = contestant
        arguments = tuple(jnp.asarray(arrays[name]) for name in contestant.inputs)
        both = arguments, jnp.asarray(arrays["cotangent"])
        self._arguments = dict(zip(PASSES, (arguments, both)))
        op = functools.partial(contestant.op, implementation=contestant.implementation)
        functions: tuple[Callable, Callable] = op, measuring.forward_and_backward(op)
        self._programs = {
            name: jax.jit(function).lower(*self._arguments[name]).compile()
            for name, function in zip(PASSES, functions)
        }

    def run(self, name: str):
        """Runs a pass and waits for it."""
        return jax.block_until_ready(self._programs[name](*self._arguments[name]))

    def temp_bytes(self, name: str) -> int:
        """Returns the peak memory of a pass beyond its arguments and results."""
        return measuring.temp_bytes(self._programs[name])

    def check(self, exact: dict[str, np.ndarray]) -> float:
        """Returns the largest relative error of both passes; raises GateError if too large."""
        forward = {"out": self.run("forward")}
        both = _named(self._contestant, *self.run("forward+backward"))
        return max(
            measuring.judge(
                f"{self._contestant.name}, {name}",
                found,
                {output: exact[output] for output in found},
                TOLERANCE,
            )
            for name, found in zip(PASSES, (forward, both))
        )


def exact_results(contestant: Contestant, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the op's output and gradients by the blockwise backend in float64.

    The conformance tests hold that backend to a dense float64 oracle.
    """
    op = functools.partial(contestant.op, implementation="xla", precision="highest")
    with jax.enable_x64(True):
        arguments = tuple(jnp.asarray(arrays[name], jnp.float64) for name in contestant.inputs)
        cotangent = jnp.asarray(arrays["cotangent"], jnp.float64)
        results = jax.jit(measuring.forward_and_backward(op))(arguments, cotangent)
        return {name: np.asarray(x) for name, x in _named(contestant, *results).items()}


def _named(contestant: Contestant, out, gradients) -> dict:
    names = [f"gradient of {name}" for name in contestant.inputs]
    return {"out": out, **dict(zip(names, gradients))}


def benchmark(length: int, seconds: float) -> list[dict]:
    """Checks, then times every contestant at one length; returns a record for each pass."""
    arrays = draw(length)
    exact = {c.op: exact_results(c, arrays) for c in (PRECONDITION, SOFTMAX)}
    programs, errors = {}, {}
    for contestant in CONTESTANTS:
        if contestant.longest is None or length <= contestant.longest:
            programs[contestant.name] = Programs(contestant, arrays)
            errors[contestant.name] = programs[contestant.name].check(exact[contestant.op])
    records = []
    for name in PASSES:
        runs = {c: lambda p=p, name=name: p.run(name) for c, p in programs.items()}
        times = measuring.interleaved(runs, seconds)
        records += [
            {
                "op": op,
                "length": length,
                "pass": name,
                "relative_error": errors[op],
                "temp_bytes": programs[op].temp_bytes(name),
                "median_s": statistics.median(times[op]),
            }
            for op in programs
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
            points = [
                (x["length"], x[field])
                for x in records
                if x["op"] == contestant.name and x["pass"] == "forward+backward"
            ]
            axes.loglog(*zip(*points), marker="o", ms=4, base=2, label=contestant.name)
        axes.set(xlabel="S", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log", base=10)
    panels[0].legend(frameon=False)
    panels[0].set_title("forward and backward")
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Benchmarks every length, prints the table and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__)
    parser.add_argument("--lengths", type=reporting.integers, default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=15, help="of timing, a pass and length")
    flags = parser.parse_args(argv)
    environment = measuring.environment()
    records = [x for length in flags.lengths for x in benchmark(length, flags.seconds)]
    print(table(records))
    result = {
        "command": reporting.command_line(parser, argv),
        "environment": environment,
        "shape": {"batch": 1, "heads": HEADS, "head_dim": HEAD_DIM},
        "dtype": "float32",
        "records": records,
    }
    reporting.write_json(flags.out / "benchmark.json", result)
    plot(records, flags.out / "benchmark.png")


if __name__ == "__main__":
    main()
