"""Rows on two GPUs: what inverses of large blocks and shared columns are worth, by width.

  python -m experiments.sequence_scaling.two_gpus

`precondition` and `lucid_attention` of 131072 tokens in bfloat16, 8 query heads and one
key/value head of 64, as `mesh.tensor=4` leaves of `lucid_1b`, with the rules of the Triton
backend and without them, interleaved. Outputs and gradients of every program are first
checked at fewer tokens against float32 on one device. Takes about a minute on two
H200s and writes two_gpus.json.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import json
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments import measuring
from experiments.kernels import TOLERANCE, Shape
from lucid_jax import lucid_attention
from lucid_jax.ops.precondition import triton as pallas_triton
from lucid_jax.parallel import context_attention
from lucid_jax.parallel.stripes import Stripes

RESULTS = pathlib.Path(__file__).parent / "results"
SHAPE = Shape(1, 131072, 8, 1, 64)
CHECKED = 16384  # Tokens at which all programs are judged.
DEVICES = 2
WIDTHS = (256, 2048)
ROWS = PartitionSpec(None, "context")
# Op, pass, its arguments and its cotangent.
PROGRAMS = (
    ("precondition", "forward", ("k", "v"), "y_bar"),
    ("precondition", "forward+backward", ("k", "v"), "y_bar"),
    ("lucid_attention", "forward+backward", ("q", "k", "v"), "o_bar"),
)


@contextlib.contextmanager
def rules(apply: bool) -> Iterator[None]:
    """Those of the Triton backend, or none, for what is traced meanwhile."""
    if apply:
        yield
        return
    without = mock.patch.multiple(
        pallas_triton, column_parts=lambda *_: 1, rows_of_inverses=lambda *_: None
    )
    with without:
        yield


@functools.cache
def mesh() -> jax.sharding.Mesh:
    """Of the devices that share the rows."""
    devices = jax.devices()[:DEVICES]
    return jax.make_mesh((DEVICES,), ("context",), (AxisType.Auto,), devices=devices)


def lowered(op: str, passes: str, width: int, arrays: Sequence[jax.Array]) -> jax.stages.Lowered:
    """A pass of an op on rows in stripes; the last of the arrays is the cotangent."""
    run = functools.partial(getattr(context_attention, op), axis_name="context", stripe=width)
    sharded = jax.shard_map(run, mesh=mesh(), in_specs=ROWS, out_specs=ROWS, check_vma=False)

    def one_pass(*arrays):
        if passes == "forward":
            return sharded(*arrays[:-1])
        return measuring.forward_and_backward(sharded)(arrays[:-1], arrays[-1])

    return jax.jit(one_pass).lower(*arrays)


def drawn(shape: Shape, length: int, width: int) -> dict[str, jax.Array]:
    """Arrays in the order of the stripes, on the devices that hold them."""
    order = Stripes(length, DEVICES, width).permutation()
    sharding = NamedSharding(mesh(), ROWS)
    return {n: jax.device_put(x[:, order], sharding) for n, x in shape.draw(length).items()}


def exact(shape: Shape, length: int) -> dict[str, jax.Array]:
    """The output of LUCID attention and its gradients in float32, on one device."""
    arrays = {name: x.astype(jnp.float32) for name, x in shape.draw(length).items()}
    run = jax.jit(measuring.forward_and_backward(lucid_attention))
    o, gradients = run(tuple(arrays[x] for x in "qkv"), arrays["o_bar"])
    return dict(zip(("o", "q_bar", "k_bar", "v_bar"), (o, *gradients)))


def benchmark(
    shape: Shape, checked: int, widths: Sequence[int], seconds: float
) -> list[dict[str, object]]:
    """Judges, then times all programs in turns; milliseconds by op, pass, width and rules."""
    programs: dict[tuple, tuple[jax.stages.Lowered, tuple]] = {}
    gates: dict[tuple, jax.stages.Lowered] = {}
    for width in widths:
        arrays, fewer = drawn(shape, shape.length, width), drawn(shape, checked, width)
        judged = tuple(fewer[x] for x in ("q", "k", "v", "o_bar"))
        for ruled in (False, True):
            with rules(ruled):
                args = ("lucid_attention", "forward+backward", width)
                gates[width, ruled] = lowered(*args, judged)
                for op, passes, names, cotangent in PROGRAMS:
                    given = tuple(arrays[x] for x in (*names, cotangent))
                    found = lowered(op, passes, width, given)
                    programs[op, passes, width, ruled] = found, given
    # Compilers leave most cores idle.
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        judges = pool.map(lambda x: x.compile(), gates.values())
        compiled = pool.map(lambda x: x[0].compile(), programs.values())
    reference = exact(shape, checked)
    for (width, ruled), run in zip(gates, judges):
        order = Stripes(checked, DEVICES, width).permutation()
        fewer = drawn(shape, checked, width)
        o, gradients = run(*(fewer[x] for x in ("q", "k", "v", "o_bar")))
        name = f"lucid_attention, stripes of {width}, {'with' if ruled else 'without'} rules"
        error = measuring.judge(
            name,
            dict(zip(reference, (o, *gradients))),
            {name: x[:, order] for name, x in reference.items()},
            TOLERANCE,
        )
        print(f"{name}: error {error:.1e}", flush=True)

    def timed(run: Callable, arrays: tuple) -> Callable[[], object]:
        return lambda: jax.block_until_ready(run(*arrays))

    runs = {
        json.dumps(key): timed(run, arrays)
        for (key, (_, arrays)), run in zip(programs.items(), compiled)
    }
    times = measuring.interleaved(runs, seconds)
    return [
        {
            **dict(zip(("op", "pass", "width", "rules"), json.loads(key))),
            "median_ms": 1e3 * statistics.median(x),
            "min_ms": 1e3 * min(x),
            "rounds": len(x),
        }
        for key, x in times.items()
    ]


def table(records: Sequence[dict]) -> str:
    """Markdown: milliseconds without the rules and with them."""
    by_key = {(x["op"], x["pass"], x["width"], x["rules"]): x["median_ms"] for x in records}
    lines = [
        "| op | pass | width | without rules | with rules | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for (op, passes, width, ruled), before in by_key.items():
        if not ruled:
            after = by_key[op, passes, width, True]
            times = f"{before:.2f} ms | {after:.2f} ms | {after / before:.3f}"
            lines.append(f"| `{op}` | {passes} | {width} | {times} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Judges, times, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=lambda x: [int(w) for w in x.split(",")], default=WIDTHS)
    parser.add_argument("--seconds", type=float, default=10, help="of rounds")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    flags = parser.parse_args(argv)
    if jax.default_backend() != "gpu" or jax.device_count() < DEVICES:
        found = f"{jax.device_count()} of {jax.default_backend()}"
        parser.error(f"it needs {DEVICES} GPUs; the devices are {found}")
    environment = measuring.environment()
    records = benchmark(SHAPE, CHECKED, flags.widths, flags.seconds)
    print(table(records))
    result = {
        "command": "python -m experiments.sequence_scaling.two_gpus",
        "environment": environment,
        "shape": str(SHAPE),
        "devices": DEVICES,
        "dtype": "bfloat16",
        "records": records,
    }
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "two_gpus.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
