"""The Mosaic GPU kernels beside the Triton kernels and cuDNN on one Hopper GPU.

  python -m experiments.mosaic_gpu.benchmark

One process times in turns: `precondition` by both kernels, forward and both passes, and causal
softmax attention by cuDNN on as many heads. Outputs and gradients are checked first, and that a
hundred runs give the same results. Writes benchmark.json.
"""

import concurrent.futures
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from experiments import kernels, measuring, reporting
from experiments.kernels import Shape
from experiments.mosaic_gpu import trial
from lucid_jax import precondition, softmax_attention

SHAPES = (
    Shape(1, 131072, 4, 4, 64),
    Shape(1, 32768, 16, 16, 128),
    Shape(16, 2048, 4, 4, 64),
    Shape(1, 8192, 1, 1, 128),
)
OPS: dict[str, tuple[Callable, str]] = {
    "Mosaic GPU": (trial.precondition, "kv"),
    "Triton": (functools.partial(precondition, implementation="triton"), "kv"),
    "cuDNN": (functools.partial(softmax_attention, implementation="cudnn"), "qkv"),
}


def check_whole(shape: Shape, runs: int = 100) -> None:
    """Raises GateError unless rows of `A y = v` are right at full length, and all runs equal."""
    arrays = shape.draw()
    k, v, y_bar = (arrays[name] for name in ("k", "v", "y_bar"))
    run = jax.jit(measuring.forward_and_backward(trial.precondition))
    first = run(k, v, y_bar)
    kernels.check_rows(shape, k, v, first[0])
    for n in range(1, runs):
        found = run(k, v, y_bar)
        if not all(map(jnp.array_equal, *map(jax.tree.leaves, (first, found)))):
            raise measuring.GateError(f"precondition at {shape}: run {n} has other results")


def prepare(shape: Shape) -> Callable[[float], list[dict]]:
    """Compiles all programs of a shape; returns a function that times them and gives records."""
    measure = kernels.prepare_ops(OPS, shape.draw(), lambda name: shape)
    return lambda seconds: [{"shape": str(shape)} | record for record in measure(seconds)]


def table(records: Sequence[dict]) -> str:
    """Returns a Markdown table in ms."""
    cases: dict[tuple[str, str], dict[str, float]] = {}
    for x in records:
        cases.setdefault((x["shape"], x["pass"]), {})[x["name"]] = x["median_ms"]
    rows = (
        [*case, *(f"{ms[name]:.3g}" for name in OPS)]
        + [f"{ms['Mosaic GPU'] / ms[name]:.2f}" for name in ("Triton", "cuDNN")]
        for case, ms in cases.items()
    )
    header = ["B×S, H/K, D", "pass", *OPS, "Mosaic GPU / Triton", "Mosaic GPU / cuDNN"]
    return reporting.markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Checks and times every shape, prints the table and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    parser.add_argument("--seconds", type=float, default=5, help="of timing for each shape")
    flags = parser.parse_args(argv)
    measuring.require_gpus(parser)
    header = measuring.provenance(flags)
    # Everything compiles and is checked at once; then the device is timed alone.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        whole = pool.map(check_whole, SHAPES)
        errors = pool.map(functools.partial(kernels.gate, op=trial.precondition), SHAPES)
        prepared = list(pool.map(prepare, SHAPES))
        relative_errors = dict(zip(map(str, SHAPES), errors))
        list(whole)
    records = [record for measure in prepared for record in measure(flags.seconds)]
    print(table(records))
    path = flags.out / "benchmark.json"
    reporting.write_json(
        path, **header, dtype="bfloat16", relative_errors=relative_errors, records=records
    )


if __name__ == "__main__":
    main()
