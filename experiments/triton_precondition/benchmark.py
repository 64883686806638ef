"""LUCID's kernels beside softmax attention on one GPU: time and memory.

  python -m experiments.triton_precondition.benchmark

One process times in turns: `precondition` and `lucid_attention` by the Triton kernels, causal
softmax attention by cuDNN on the same inputs, the blockwise XLA path, and a dense float32
solve (torch, where it is installed). Outputs and gradients are checked first. Needs a GPU,
takes about 2 minutes, and writes benchmark.json.
"""

import concurrent.futures
import importlib.util
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from experiments import measuring, reporting
from experiments.kernels import Backends, Shape, prepare, table
from lucid_jax.ops.precondition.api import precondition_with
from lucid_jax.ops.precondition.triton import TritonBackend
from lucid_jax.ops.precondition.triton_schedule import Schedule

LONG, FULL = Shape(1, 131072, 4, 4, 64), Shape(1, 131072, 32, 4, 64)
# Shape, LUCID's op and its pass; softmax attention takes the same arrays.
BENCHMARKS = (
    (LONG, "precondition", "forward"),
    (FULL, "lucid_attention", "forward"),
    (FULL, "lucid_attention", "forward+backward"),
    (Shape(1, 32768, 32, 4, 64), "lucid_attention", "forward+backward"),
    (Shape(8, 4096, 32, 4, 64), "lucid_attention", "forward+backward"),
    (Shape(1, 32768, 16, 16, 128), "precondition", "forward+backward"),
    (Shape(1, 8192, 1, 1, 128), "precondition", "forward"),
)


def schedule_in_use(shape: Shape) -> Schedule:
    """Returns the schedule that the table has for a shape on this device."""
    return Schedule.choose(
        jax.devices()[0].device_kind, jnp.dtype(jnp.bfloat16),
        shape.batch, shape.length, shape.kv_heads, shape.head_dim,
    )  # fmt: skip


def gated(shape: Shape) -> Callable:
    """Returns `precondition` with the tiles of the whole shape."""
    backend = TritonBackend(schedule_in_use(shape))
    return lambda k, v: precondition_with(backend, k, v, None, None)


def dense_solve(shape: Shape) -> float | None:
    """Returns milliseconds of a dense float32 triangular solve of a matrix built beforehand."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    size = shape.kv_heads, shape.length, shape.head_dim
    k, v = (torch.randn(*size, device="cuda") for _ in range(2))
    k = k / k.norm(dim=-1, keepdim=True)
    a = (k @ k.mT).sub_(1).mul_(shape.head_dim**0.5).exp_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(5):
        start.record()
        torch.linalg.solve_triangular(a, v, upper=False, unitriangular=True)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every benchmark, prints the table and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    parser.add_argument("--seconds", type=float, default=5, help="of timing for each benchmark")
    flags = parser.parse_args(argv)
    measuring.require_gpus(parser)
    header = measuring.provenance(flags)
    backends = Backends("triton", "cudnn", gated)
    # All programs compile at once on the host's cores; then the device is timed alone.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        prepared = list(pool.map(lambda benchmark: prepare(backends, *benchmark), BENCHMARKS))
    records = []
    for measure in prepared:
        records.append(measure(flags.seconds))
        print(table(records[-1:], "cuDNN").splitlines()[-1], flush=True)
    dense = {str(s): dense_solve(s) for s in (Shape(1, n, 4, 4, 64) for n in (8192, 32768))}
    print(table(records, "cuDNN"))
    print("dense float32 solve:", dense)
    path = flags.out / "benchmark.json"
    reporting.write_json(path, **header, dtype="bfloat16", records=records, dense_solve_ms=dense)


if __name__ == "__main__":
    main()
