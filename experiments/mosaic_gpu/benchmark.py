"""The Mosaic GPU kernels beside the Triton kernels and cuDNN on one Hopper GPU.

  python -m experiments.mosaic_gpu.benchmark

One process times in turns: `precondition` by both kernels, forward and both passes, and, where a
sequence is one document, causal softmax attention by cuDNN on as many heads. Outputs and gradients
are checked first, and that a hundred runs give the same results. Writes benchmark.json.
"""

import concurrent.futures
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import kernels, measuring, reporting
from experiments.kernels import Shape
from lucid_jax import precondition, softmax_attention

# Shapes, and the mean length of packed documents, or None for one document a sequence.
CASES: tuple[tuple[Shape, int | None], ...] = (
    (Shape(1, 131072, 4, 4, 64), None),
    (Shape(1, 32768, 16, 16, 128), None),
    (Shape(1, 8192, 1, 1, 128), None),
    (Shape(16, 2048, 4, 4, 64), None),
    (Shape(1, 131072, 4, 4, 64), 4000),
    (Shape(1, 131072, 4, 4, 128), 4000),
    (Shape(1, 131072, 4, 4, 68), 4000),
    (Shape(16, 2048, 4, 4, 64), 600),
)
NAMES = "Mosaic GPU", "Triton", "cuDNN"
IMPLEMENTATIONS = "mosaic_gpu", "triton", "cudnn"


def make_ops(shape: Shape, mean: int | None) -> dict[str, tuple[Callable, str]]:
    """Returns the ops of a case by name, and the names of their arguments."""
    solve, triton = (
        functools.partial(precondition, implementation=name) for name in IMPLEMENTATIONS[:2]
    )
    softmax = functools.partial(softmax_attention, implementation=IMPLEMENTATIONS[2])
    if mean is None:
        return dict(zip(NAMES, ((solve, "kv"), (triton, "kv"), (softmax, "qkv"))))
    ids = kernels.draw_segments(shape.batch, shape.length, mean)

    def packed(op: Callable) -> Callable:
        # Ids that depend on the arrays, so that no loop prepares the documents once.
        return lambda k, v: op(k, v, segment_ids=ids + jnp.isnan(k.ravel()[0]).astype(jnp.int32))

    return dict(zip(NAMES, ((packed(solve), "kv"), (packed(triton), "kv"))))


def check_whole(shape: Shape, mean: int | None, runs: int = 100) -> float:
    """Returns the largest difference from the Triton kernels, at full length.

    Raises GateError if it is too large, if `A y` is not `v`, or if a run has other results.
    """
    arrays, ops = shape.draw(), make_ops(shape, mean)
    k, v, y_bar = (arrays[name] for name in ("k", "v", "y_bar"))
    run, run_triton = (
        jax.jit(measuring.forward_and_backward(ops[name][0])) for name in ("Mosaic GPU", "Triton")
    )
    names = "out", "gradient of k", "gradient of v"
    first, exact = (jax.tree.leaves(f(k, v, y_bar)) for f in (run, run_triton))
    if mean is None:
        kernels.check_rows(shape, k, v, first[0])
    for n in range(1, runs):
        if not all(map(jnp.array_equal, first, jax.tree.leaves(run(k, v, y_bar)))):
            raise measuring.GateError(f"precondition at {shape}: run {n} has other results")
    found, expected = (dict(zip(names, map(np.float64, x))) for x in (first, exact))
    return measuring.judge(f"precondition at {shape}", found, expected, kernels.TOLERANCE)


def prepare(shape: Shape, mean: int | None) -> Callable[[float], list[dict]]:
    """Compiles all programs of a case; returns a function that times them and gives records."""
    measure = kernels.prepare_ops(make_ops(shape, mean), shape.draw(), lambda name: shape)
    case = {"shape": str(shape), "mean_document": mean}
    return lambda seconds: [case | record for record in measure(seconds)]


def table(records: Sequence[dict]) -> str:
    """Returns a Markdown table in ms."""
    cases: dict[tuple, dict[str, float]] = {}
    for x in records:
        case = x["shape"], x["mean_document"] or "one", x["pass"]
        cases.setdefault(case, {})[x["name"]] = x["median_ms"]
    rows = (
        [*case, *(f"{ms[name]:.3g}" if name in ms else "–" for name in NAMES)]
        + [f"{ms[NAMES[0]] / ms[n]:.2f}" if n in ms else "–" for n in NAMES[1:]]
        for case, ms in cases.items()
    )
    ratios = [f"{NAMES[0]} / {name}" for name in NAMES[1:]]
    return reporting.markdown(["B×S, H/K, D", "documents of", "pass", *NAMES, *ratios], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Checks and times every case, prints the table and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    parser.add_argument("--seconds", type=float, default=5, help="of timing for each case")
    flags = parser.parse_args(argv)
    measuring.require_gpus(parser)
    header = measuring.provenance(flags)
    # Everything compiles and is checked at once; then the device is timed alone.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        differences = pool.map(check_whole, *zip(*CASES))
        shapes = [shape for shape, mean in CASES if mean is None]
        solve = functools.partial(precondition, implementation=IMPLEMENTATIONS[0])
        errors = pool.map(functools.partial(kernels.gate, op=solve), shapes)
        prepared = list(pool.map(prepare, *zip(*CASES)))
        checks = {
            "relative_errors": dict(zip(map(str, shapes), errors)),
            "differences_from_triton": list(differences),
        }
    records = [record for measure in prepared for record in measure(flags.seconds)]
    print(table(records))
    path = flags.out / "benchmark.json"
    reporting.write_json(path, **header, dtype="bfloat16", **checks, records=records)


if __name__ == "__main__":
    main()
