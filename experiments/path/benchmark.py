"""Time and memory of ops with PaTH's transitions, beside the same ops without them.

  python -m experiments.path.benchmark

One process compares `precondition` and `softmax_attention` with and without transitions, all by the
blockwise XLA path, forward and backward, bfloat16. Outputs and gradients are checked against the
dense float64 reference before anything is timed. Writes benchmark.json.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import kernels, measuring, reporting
from lucid_jax import Transitions, precondition, softmax_attention

LENGTHS = (8192, 32768)
HEADS, HEAD_DIM = 4, 64
# Not a multiple of any tile.
GATE_TOKENS = 700
TOLERANCE = kernels.TOLERANCE


class Contestant(NamedTuple):
    """An op, with or without transitions."""

    name: str
    op: Callable
    inputs: tuple[str, ...]  # Names of the op's arrays; w and beta are those of transitions.

    def run(self, implementation: str, *arrays: jax.Array) -> jax.Array:
        """Runs the op by an implementation."""
        if "beta" not in self.inputs:
            return self.op(*arrays, implementation=implementation)
        *others, w, beta = arrays
        return self.op(*others, transitions=Transitions(w, beta), implementation=implementation)


PAIRS = (
    (
        Contestant("precondition", precondition, ("k", "v")),
        Contestant("precondition, transitions", precondition, ("k", "v", "w", "beta")),
    ),
    (
        Contestant("softmax", softmax_attention, ("q", "k", "v")),
        Contestant("softmax, transitions", softmax_attention, ("q", "k", "v", "w", "beta")),
    ),
)


def draw(length: int) -> dict[str, jax.Array]:
    """Draws bfloat16 inputs and the cotangent `o_bar`."""
    arrays = kernels.Shape(1, length, HEADS, HEADS, HEAD_DIM).draw()
    arrays["w"] = jax.random.normal(jax.random.key(10), arrays["k"].shape, jnp.bfloat16)
    beta = jax.random.uniform(jax.random.key(11), arrays["k"].shape[:3], maxval=2.0)
    return arrays | {"beta": beta.astype(jnp.bfloat16)}


def compile_passes(contestant: Contestant, arrays: dict, implementation: str = "xla") -> tuple:
    """Compiles forward and backward together; returns the program and its arguments."""
    arguments = [arrays[name] for name in (*contestant.inputs, "o_bar")]
    op = functools.partial(contestant.run, implementation)
    run = measuring.forward_and_backward(op)
    return jax.jit(run).lower(*arguments).compile(), arguments


def run(program: tuple[jax.stages.Compiled, list]):
    """Runs a program and waits for it."""
    compiled, arguments = program
    return jax.block_until_ready(compiled(*arguments))


def check(contestant: Contestant) -> float:
    """Returns the largest relative error of output and gradients; raises GateError if too large."""
    arrays = draw(GATE_TOKENS)
    names = "out", *(f"gradient of {name}" for name in contestant.inputs)
    found = jax.tree.leaves(run(compile_passes(contestant, arrays)))
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
        program = compile_passes(contestant, wide, "reference")
        exact = jax.tree.leaves(jax.device_get(run(program)))
    return measuring.judge(
        contestant.name, dict(zip(names, found)), dict(zip(names, exact)), TOLERANCE
    )


def benchmark(length: int, seconds: float, errors: dict[str, float]) -> list[dict]:
    """Times every contestant at one length; returns their records."""
    arrays = draw(length)
    programs = {c.name: compile_passes(c, arrays) for pair in PAIRS for c in pair}
    runs = {name: functools.partial(run, program) for name, program in programs.items()}
    times = measuring.interleaved(runs, seconds)
    return [
        {
            "op": name,
            "length": length,
            "relative_error": errors[name],
            "temp_bytes": measuring.temp_bytes(program[0]),
            "median_s": statistics.median(times[name]),
        }
        for name, program in programs.items()
    ]


def table(records: Sequence[dict]) -> str:
    """Returns a Markdown table of medians, their ratio, and temporaries."""
    by_key = {(x["op"], x["length"]): x for x in records}
    header = (
        "op", "S", "without transitions", "with", "with / without", "temporaries: without", "with",
    )  # fmt: skip
    rows = []
    for length in dict.fromkeys(x["length"] for x in records):
        for pair in PAIRS:
            found = [by_key[c.name, length] for c in pair]
            ms = [1e3 * x["median_s"] for x in found]
            mib = [f"{x['temp_bytes'] / 2**20:,.1f} MiB" for x in found]
            times = [f"{x:,.1f} ms" for x in ms]
            rows.append((pair[0].name, length, *times, f"{ms[1] / ms[0]:.2f}", *mib))
    return reporting.markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Checks every op, times it at every length, prints the table and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    parser.add_argument("--lengths", type=reporting.integers, default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=20, help="of timing, a length")
    flags = parser.parse_args(argv)
    header = measuring.provenance(flags)
    errors = {c.name: check(c) for pair in PAIRS for c in pair}
    records = [x for n in flags.lengths for x in benchmark(n, flags.seconds, errors)]
    print(table(records))
    header |= {"shape": {"batch": 1, "heads": HEADS, "head_dim": HEAD_DIM}, "dtype": "bfloat16"}
    reporting.write_json(flags.out / "benchmark.json", **header, records=records)


if __name__ == "__main__":
    main()
