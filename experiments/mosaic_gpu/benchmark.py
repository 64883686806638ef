"""The Mosaic GPU kernels beside the Triton kernels and cuDNN on one Hopper GPU.

  python -m experiments.mosaic_gpu.benchmark

One process times in turns, forward and both passes: `precondition` by both kernels, beside causal
softmax attention by cuDNN on as many heads where a sequence is one document; and softmax attention
by all three. Outputs and gradients are checked first, and that a hundred runs give the same
results. Each case is a process of its own: a few compile at once, and then they are timed one by
one. Writes benchmark.json.
"""

import functools
import json
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import apart, kernels, measuring, reporting
from experiments.kernels import Shape
from experiments.triton_precondition.packed import MOST_DOCUMENTS, cudnn_packed
from lucid_jax import precondition, softmax_attention

# Shapes by op, and the mean length of packed documents, or None for one document a sequence.
CASES: tuple[tuple[str, Shape, int | None], ...] = (
    ("precondition", Shape(1, 131072, 4, 4, 64), None),
    ("precondition", Shape(1, 32768, 16, 16, 128), None),
    ("precondition", Shape(1, 8192, 1, 1, 128), None),
    ("precondition", Shape(16, 2048, 4, 4, 64), None),
    ("precondition", Shape(1, 131072, 4, 4, 64), 4000),
    ("precondition", Shape(1, 131072, 4, 4, 128), 4000),
    ("precondition", Shape(1, 131072, 4, 4, 68), 4000),
    ("precondition", Shape(1, 131072, 4, 4, 128), 600),
    ("precondition", Shape(16, 2048, 4, 4, 64), 600),
    ("softmax_attention", Shape(1, 131072, 32, 4, 64), 16000),
    ("softmax_attention", Shape(1, 131072, 32, 4, 64), 4000),
    ("softmax_attention", Shape(1, 131072, 32, 4, 68), 4000),
    ("softmax_attention", Shape(1, 131072, 16, 4, 128), 4000),
    ("softmax_attention", Shape(1, 131072, 32, 4, 64), 600),
    ("softmax_attention", Shape(1, 131072, 16, 4, 128), 600),
    ("softmax_attention", Shape(8, 16384, 32, 4, 64), 16000),
    ("softmax_attention", Shape(8, 8192, 32, 4, 68), 2000),
    ("softmax_attention", Shape(8, 8192, 16, 4, 128), 2000),
    ("softmax_attention", Shape(16, 2048, 32, 4, 64), 600),
    ("softmax_attention", Shape(16, 2048, 32, 4, 68), 600),
    ("softmax_attention", Shape(16, 2048, 16, 4, 128), 600),
    ("softmax_attention", Shape(1, 32768, 32, 4, 64), None),
    ("softmax_attention", Shape(1, 32768, 16, 4, 128), None),
)
NAMES = "Mosaic GPU", "Triton", "cuDNN"
IMPLEMENTATIONS = "mosaic_gpu", "triton", "cudnn"


def make_ops(op: str, shape: Shape, mean: int | None) -> dict[str, tuple[Callable, str]]:
    """Returns the ops of a case by name, and the names of their arguments."""
    softmax = functools.partial(softmax_attention, implementation=IMPLEMENTATIONS[2])
    ops_of: dict[str, tuple[Callable, str]] = {
        "precondition": (precondition, "kv"), "softmax_attention": (softmax_attention, "qkv"),
    }  # fmt: skip
    function, names = ops_of[op]
    contestants = [functools.partial(function, implementation=x) for x in IMPLEMENTATIONS[:2]]
    if mean is None:
        return dict(zip(NAMES, [*((f, names) for f in contestants), (softmax, "qkv")]))
    most = MOST_DOCUMENTS if op == "softmax_attention" and mean >= 2000 else None
    ids = kernels.draw_segments(shape.batch, shape.length, mean, most)

    def packed(f: Callable) -> Callable:
        # Ids that depend on the arrays, so that no loop prepares the documents once.
        return lambda *x: f(*x, segment_ids=ids + jnp.isnan(x[0].ravel()[0]).astype(jnp.int32))

    ops = dict(zip(NAMES, ((packed(f), names) for f in contestants)))
    fits_cudnn = shape.batch == 1 and shape.head_dim % 8 == 0 and ids.max() <= MOST_DOCUMENTS
    if op == "softmax_attention" and fits_cudnn:
        ops[NAMES[2]] = functools.partial(cudnn_packed, ids), names
    return ops


def check_whole(op: str, shape: Shape, mean: int | None, runs: int = 100) -> float:
    """Returns the largest difference from the Triton kernels, at full length.

    Raises GateError if it is too large, if `A y` is not `v`, or if a run has other results.
    """
    drawn, ops = shape.draw(), make_ops(op, shape, mean)
    names = ops[NAMES[0]][1]
    arrays = *(drawn[name] for name in names), drawn["y_bar" if names == "kv" else "o_bar"]
    run, run_triton = (jax.jit(measuring.forward_and_backward(ops[name][0])) for name in NAMES[:2])
    first, exact = (jax.tree.leaves(f(*arrays)) for f in (run, run_triton))
    if op == "precondition" and mean is None:
        kernels.check_rows(shape, arrays[0], arrays[1], first[0])
    for n in range(1, runs):
        if not all(map(jnp.array_equal, first, jax.tree.leaves(run(*arrays)))):
            raise measuring.GateError(f"{op} at {shape}: run {n} has other results")
    results = "out", *(f"gradient of {name}" for name in names)
    found, expected = (dict(zip(results, map(np.float64, x))) for x in (first, exact))
    return measuring.judge(f"{op} at {shape}", found, expected, kernels.TOLERANCE)


def measure(case: int, seconds: float, wait: Callable[[], object] = lambda: None) -> list[dict]:
    """Returns records of the times and checks of a case; calls `wait` before it times."""
    op, shape, mean = CASES[case]
    checks = {"difference_from_triton": check_whole(op, shape, mean)}
    if op == "precondition" and mean is None:
        solve = functools.partial(precondition, implementation=IMPLEMENTATIONS[0])
        checks["relative_error"] = kernels.gate(shape, solve)
    time = kernels.prepare_ops(make_ops(op, shape, mean), shape.draw(), lambda name: shape)
    wait()
    header = {"op": op, "shape": str(shape), "mean_document": mean, **checks}
    return [header | record for record in time(seconds)]


def table(records: Sequence[dict]) -> str:
    """Returns a Markdown table in ms."""
    cases: dict[tuple, dict[str, float]] = {}
    for x in records:
        case = f"`{x['op']}`", x["shape"], x["mean_document"] or "one", x["pass"]
        cases.setdefault(case, {})[x["name"]] = x["median_ms"]
    rows = (
        [*case, *(f"{ms[name]:.3g}" if name in ms else "–" for name in NAMES)]
        + [f"{ms[NAMES[0]] / ms[n]:.2f}" if n in ms else "–" for n in NAMES[1:]]
        for case, ms in cases.items()
    )
    ratios = [f"{NAMES[0]} / {name}" for name in NAMES[1:]]
    return reporting.markdown(["op", "B×S, H/K, D", "documents of", "pass", *NAMES, *ratios], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Checks and times every case, prints the table and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    parser.add_argument("--seconds", type=float, default=5, help="of timing for each case")
    parser.add_argument("--run", type=int, help="measure this case alone: its number")
    flags = parser.parse_args(argv)
    apart.share_gpus()
    measuring.require_gpus(parser)
    if flags.run is not None:
        print(json.dumps(measure(flags.run, flags.seconds, apart.report_and_wait)))
        return
    header = measuring.provenance(flags)
    records: list[dict] = []
    found = apart.measure_apart(__spec__.name, range(len(CASES)), f"--seconds={flags.seconds}")
    for of_case in found:
        records += of_case
        # A killed run leaves what it has measured.
        reporting.write_json(
            flags.out / "benchmark.json", **header, dtype="bfloat16", records=records
        )
    print(table(records))


if __name__ == "__main__":
    main()
