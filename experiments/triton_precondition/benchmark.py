"""LUCID's kernels beside softmax attention on one GPU: time and memory.

  python -m experiments.triton_precondition.benchmark

Side by side in one process, interleaved: `precondition` and `lucid_attention` by the Triton
kernels, causal softmax attention by cuDNN on the same inputs, the blockwise XLA path, and
the paper's dense float32 solve (torch, where it is installed). Results and gradients are
checked first. Needs a GPU, takes about 2 minutes, and writes benchmark.json.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import pathlib
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from experiments import measuring
from experiments.kernels import Backends, Shape, prepare, table
from lucid_jax.ops.precondition import triton as pallas_triton
from lucid_jax.ops.precondition.triton_schedule import Schedule

RESULTS = pathlib.Path(__file__).parent / "results"
LONG, FULL = Shape(1, 131072, 4, 4, 64), Shape(1, 131072, 32, 4, 64)
# Shape, LUCID's op, its pass; the op it is compared with takes the same arrays.
ROWS = (
    (LONG, "precondition", "forward"),
    (FULL, "lucid_attention", "forward"),
    (FULL, "lucid_attention", "forward+backward"),
    (Shape(1, 32768, 32, 4, 64), "lucid_attention", "forward+backward"),
    (Shape(8, 4096, 32, 4, 64), "lucid_attention", "forward+backward"),
    (Shape(1, 32768, 16, 16, 128), "precondition", "forward+backward"),
    (Shape(1, 8192, 1, 1, 128), "precondition", "forward"),
)


def gated(shape: Shape) -> Callable:
    """`precondition` with the tiles of the whole shape."""
    schedule = Schedule.choose(
        jax.devices()[0].device_kind, jnp.dtype(jnp.bfloat16),
        shape.batch, shape.length, shape.kv_heads, shape.head_dim,
    )  # fmt: skip
    return lambda k, v: pallas_triton.scheduled(schedule, False, k, v, None, None)


def backends() -> Backends:
    """Tokamax too, where it is installed."""
    others = ("tokamax",) if importlib.util.find_spec("tokamax") else ()
    return Backends("triton", "cudnn", gated, others)


def dense_solve(shape: Shape) -> float | None:
    """Milliseconds of the paper's solve: a dense float32 triangular system, built beforehand."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    k, v = (
        torch.randn(shape.kv_heads, shape.length, shape.head_dim, device="cuda") for _ in range(2)
    )
    k = k / k.norm(dim=-1, keepdim=True)
    root = shape.head_dim**0.5
    a = torch.empty(shape.kv_heads, shape.length, shape.length, device="cuda")
    for head in range(shape.kv_heads):
        torch.matmul(k[head], k[head].T, out=a[head])
    a.sub_(1).mul_(root).exp_()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times = []
    for _ in range(5):
        events[0].record()
        torch.linalg.solve_triangular(a, v, upper=False, unitriangular=True)
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]))
    return statistics.median(times[1:])


def main(argv: Sequence[str] | None = None) -> None:
    """Benchmarks every row, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5, help="of timing, a row")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    flags = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        parser.error(f"it needs a GPU; the default backend is {jax.default_backend()}")
    # Compilers run on the host's cores, all rows at once; the device is then timed alone.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        rows = list(pool.map(lambda row: prepare(backends(), *row), ROWS))
    records = []
    for measure in rows:
        records.append(measure(flags.seconds))
        print(table(records[-1:], "cuDNN").splitlines()[-1], flush=True)
    dense = {str(s): dense_solve(s) for s in (Shape(1, n, 4, 4, 64) for n in (8192, 32768))}
    print(table(records, "cuDNN"))
    print("dense float32 solve:", dense)
    flags.out.mkdir(parents=True, exist_ok=True)
    result = {
        "command": "python -m experiments.triton_precondition.benchmark",
        "environment": measuring.environment(),
        "dtype": "bfloat16",
        "records": records,
        "dense_solve_ms": dense,
    }
    (flags.out / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
