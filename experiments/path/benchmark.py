"""Time and memory of ops with PaTH's transitions, beside the same ops without them.

  python -m experiments.path.benchmark

One process compares `precondition` and `softmax_attention` with and without transitions, forward
and backward, bfloat16, by the blockwise XLA path and on a GPU by the Triton kernels too. Outputs
and gradients are checked against the dense float64 reference before anything is timed. Writes
benchmark.json.
"""

import concurrent.futures
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


def implementations() -> list[str]:
    """Returns the implementations that this device has for calls with transitions."""
    return ["xla", "triton"] if jax.default_backend() == "gpu" else ["xla"]


def compile_passes(contestant: Contestant, arrays: dict, implementation: str) -> tuple:
    """Compiles forward and backward together; returns the program and its arguments."""
    arguments = [arrays[name] for name in (*contestant.inputs, "o_bar")]
    op = functools.partial(contestant.run, implementation)
    run = measuring.forward_and_backward(op)
    return jax.jit(run).lower(*arguments).compile(), arguments


def run(program: tuple[jax.stages.Compiled, list]):
    """Runs a program and waits for it."""
    compiled, arguments = program
    return jax.block_until_ready(compiled(*arguments))


def check(contestant: Contestant) -> dict[str, float]:
    """Returns the largest relative error of output and gradients by implementation.

    Raises GateError if one is too large.
    """
    arrays = draw(GATE_TOKENS)
    names = "out", *(f"gradient of {name}" for name in contestant.inputs)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
        program = compile_passes(contestant, wide, "reference")
        exact = dict(zip(names, jax.tree.leaves(jax.device_get(run(program)))))

    def error(implementation: str) -> float:
        found = jax.tree.leaves(run(compile_passes(contestant, arrays, implementation)))
        name = f"{contestant.name} by {implementation}"
        return measuring.judge(name, dict(zip(names, found)), exact, TOLERANCE)

    return {name: error(name) for name in implementations()}


def prepare(length: int) -> Callable[[float], list[dict]]:
    """Compiles every contestant at one length; returns a function that times them."""
    arrays = draw(length)
    keys = [(c, name) for pair in PAIRS for c in pair for name in implementations()]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = dict(
            zip(keys, pool.map(lambda key: compile_passes(key[0], arrays, key[1]), keys))
        )

    def measure(seconds: float) -> list[dict]:
        runs = {key: functools.partial(run, program) for key, program in programs.items()}
        times = measuring.interleaved(runs, seconds)
        return [
            {
                "op": contestant.name,
                "implementation": name,
                "length": length,
                "temp_bytes": measuring.temp_bytes(program[0]),
                "median_s": statistics.median(times[contestant, name]),
            }
            for (contestant, name), program in programs.items()
        ]

    return measure


def table(records: Sequence[dict]) -> str:
    """Returns a Markdown table of medians, their ratio, and temporaries."""
    by_key = {(x["op"], x["implementation"], x["length"]): x for x in records}
    header = (
        "op", "S", "by", "without transitions", "with", "with / without", "temporaries: without",
        "with",
    )  # fmt: skip
    rows = []
    for length, name in dict.fromkeys((x["length"], x["implementation"]) for x in records):
        for pair in PAIRS:
            found = [by_key[c.name, name, length] for c in pair]
            ms = [1e3 * x["median_s"] for x in found]
            mib = [f"{x['temp_bytes'] / 2**20:,.1f} MiB" for x in found]
            times = [f"{x:,.1f} ms" for x in ms]
            rows.append((pair[0].name, length, name, *times, f"{ms[1] / ms[0]:.2f}", *mib))
    return reporting.markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Checks every op, times it at every length, prints the table and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    parser.add_argument("--lengths", type=reporting.integers, default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=20, help="of timing, a length")
    flags = parser.parse_args(argv)
    header = measuring.provenance(flags)
    ops = [c for pair in PAIRS for c in pair]
    # All programs compile at once on the host's cores; then the device is timed alone.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        checked, prepared = pool.map(check, ops), pool.map(prepare, flags.lengths)
        errors = {c.name: found for c, found in zip(ops, checked)}
        passes = list(prepared)
    records = [x for measure in passes for x in measure(flags.seconds)]
    for x in records:
        x["relative_error"] = errors[x["op"]][x["implementation"]]
    print(table(records))
    header |= {"shape": {"batch": 1, "heads": HEADS, "head_dim": HEAD_DIM}, "dtype": "bfloat16"}
    reporting.write_json(flags.out / "benchmark.json", **header, records=records)


if __name__ == "__main__":
    main()
