"""LUCID's kernels beside softmax attention on one GPU: time and memory.

  python -m experiments.triton_precondition.benchmark

Side by side in one process, interleaved: `precondition` and `lucid_attention` by the Triton
kernels, causal softmax attention by cuDNN on the same inputs, the blockwise XLA path, and
the paper's dense float32 solve (torch, where it is installed). Results and gradients are
checked first. Needs a GPU, takes about 3 minutes, and writes benchmark.json.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence

import jax

from experiments import measuring
from experiments.triton_precondition.measure import Shape, check_rows, gate, repeated
from lucid_jax import lucid_attention, precondition, softmax_attention

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
OPS = {
    "precondition": (functools.partial(precondition, implementation="triton"), ("k", "v"), "y_bar"),
    "lucid_attention": (lucid_attention, ("q", "k", "v"), "o_bar"),
    "softmax": (
        functools.partial(softmax_attention, implementation="cudnn"),
        ("q", "k", "v"),
        "o_bar",
    ),
    "xla": (functools.partial(precondition, implementation="xla"), ("k", "v"), "y_bar"),
}
# The XLA path takes seconds beyond.
LONGEST_PEER = 8192


def program(name: str, passes: str, arrays: dict) -> tuple[Callable, tuple]:
    """One op's pass and its arguments."""
    op, names, cotangent = OPS[name]
    arguments = tuple(arrays[n] for n in names)
    if passes == "forward":
        return op, arguments
    both = measuring.forward_and_backward(op)
    return lambda *x: both(x[:-1], x[-1]), (*arguments, arrays[cotangent])


def benchmark(shape: Shape, name: str, passes: str, seconds: float) -> dict:
    """Checks, then times LUCID, softmax attention and the XLA path; times in milliseconds."""
    solve = OPS["precondition"][0]
    error = gate(shape, solve)
    arrays = shape.draw()
    rows = check_rows(shape, arrays["k"], arrays["v"], jax.jit(solve)(arrays["k"], arrays["v"]))
    contestants = [name, "softmax"]
    if name == "precondition" and shape.length <= LONGEST_PEER:
        contestants.append("xla")
    runs, repeats, memory = {}, {}, {}
    for contestant in contestants:
        op, arguments = program(contestant, passes, arrays)
        compiled = jax.jit(op).lower(*arguments).compile()
        memory[contestant] = compiled.memory_analysis().temp_size_in_bytes
        jax.block_until_ready(compiled(*arguments))
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        # 50 ms on the device leave no trace of the host's milliseconds.
        repeats[contestant] = max(1, round(0.05 / (time.perf_counter() - start)))
        runs[contestant] = repeated(op, arguments, repeats[contestant])
    times = measuring.interleaved(runs, seconds)
    ms = {c: 1e3 * statistics.median(times[c]) / repeats[c] for c in runs}
    kv = sum(arrays[x].nbytes for x in ("k", "v", "v"))
    return {
        "shape": str(shape),
        "op": name,
        "pass": passes,
        "gate_error": error,
        "residual_in_roundings": rows,
        "median_ms": ms,
        "rounds": len(times[name]),
        "over_softmax": ms[name] / ms["softmax"],
        "temporaries_over_k_v_y": memory[name] / kv,
    }


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


def table(records: Sequence[dict]) -> str:
    """Markdown."""
    lines = [
        "| B×S, H/K, D | op | pass | LUCID | softmax (cuDNN) | ratio | XLA path"
        " | temporaries / (k+v+y) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for x in records:
        ms = x["median_ms"]
        xla = f"{ms['xla']:.2f} ms" if "xla" in ms else "–"
        lines.append(
            f"| {x['shape']} | `{x['op']}` | {x['pass']} | {ms[x['op']]:.3f} ms"
            f" | {ms['softmax']:.3f} ms | {x['over_softmax']:.3f} | {xla}"
            f" | {x['temporaries_over_k_v_y']:.2f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Benchmarks every row, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5, help="of timing, a row")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    flags = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        parser.error(f"it needs a GPU; the default backend is {jax.default_backend()}")
    records = []
    for shape, name, passes in ROWS:
        records.append(benchmark(shape, name, passes, flags.seconds))
        print(table(records[-1:]).splitlines()[-1], flush=True)
    dense = {str(s): dense_solve(s) for s in (Shape(1, n, 4, 4, 64) for n in (8192, 32768))}
    print(table(records))
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
