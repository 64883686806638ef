"""A sequence on two GPUs: what inverses of large blocks and divided columns are worth, by width.

  python -m experiments.sequence_scaling.two_gpus

Times `precondition` and `lucid_attention` of 131072 tokens in bfloat16, with 8 query heads and one
key/value head of dimension 64, as `mesh.tensor=4` leaves of `lucid_1b`: with the rules of the
Triton backend and without them, in turns. Outputs and gradients of every program are first checked
at fewer tokens against float32 on one device. Takes about a minute on two H200s and writes
two_gpus.json.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments import measuring, reporting
from experiments.kernels import TOLERANCE, Shape
from lucid_jax import lucid_attention
from lucid_jax.ops.precondition import triton as pallas_triton
from lucid_jax.parallel import context_attention
from lucid_jax.parallel.stripes import Stripes

SHAPE = Shape(1, 131072, 8, 1, 64)
CHECKED = 16384  # Tokens at which all programs are checked.
DEVICES = 2
WIDTHS = (256, 2048)
TOKENS = PartitionSpec(None, "context")
_ATTENTION = ("q", "k", "v", "o_bar")
# Op, pass, and its arguments with the cotangent.
PROGRAMS = (
    ("precondition", "forward", ("k", "v", "y_bar")),
    ("precondition", "forward+backward", ("k", "v", "y_bar")),
    ("lucid_attention", "forward+backward", _ATTENTION),
)


def rules(apply: bool) -> contextlib.AbstractContextManager:
    """Applies the Triton backend's rules, or none, to what is traced in this context."""
    if apply:
        return contextlib.nullcontext()
    return mock.patch.multiple(
        pallas_triton, column_parts=lambda *_: 1, inverse_rows=lambda *_: None
    )


@functools.cache
def mesh() -> jax.sharding.Mesh:
    """Returns a mesh of the devices that share the sequence."""
    devices = jax.devices()[:DEVICES]
    return jax.make_mesh((DEVICES,), ("context",), (AxisType.Auto,), devices=devices)


def lower(op: str, passes: str, width: int, arrays: Sequence[jax.Array]) -> jax.stages.Lowered:
    """Lowers a pass of an op on a sequence in stripes; the last of the arrays is the cotangent."""
    run = functools.partial(getattr(context_attention, op), axis_name="context", stripe=width)
    sharded = jax.shard_map(run, mesh=mesh(), in_specs=TOKENS, out_specs=TOKENS, check_vma=False)
    if passes == "forward":
        return jax.jit(lambda *arrays: sharded(*arrays[:-1])).lower(*arrays)
    return jax.jit(measuring.forward_and_backward(sharded)).lower(*arrays)


def draw(shape: Shape, length: int, width: int) -> dict[str, jax.Array]:
    """Returns arrays in the order of the stripes, on the devices that hold them."""
    order = Stripes(length, DEVICES, width).permutation()
    sharding = NamedSharding(mesh(), TOKENS)
    return {n: jax.device_put(x[:, order], sharding) for n, x in shape.draw(length).items()}


def exact(shape: Shape, length: int) -> dict[str, jax.Array]:
    """Returns the output of LUCID attention and its gradients in float32, on one device."""
    arrays = {name: x.astype(jnp.float32) for name, x in shape.draw(length).items()}
    run = jax.jit(measuring.forward_and_backward(lucid_attention))
    o, gradients = run(*(arrays[x] for x in _ATTENTION))
    return dict(zip(("o", "q_bar", "k_bar", "v_bar"), (o, *gradients)))


def benchmark(
    shape: Shape, checked: int, widths: Sequence[int], seconds: float
) -> list[dict[str, object]]:
    """Checks, then times all programs in turns; returns milliseconds of each."""
    programs: dict[tuple, tuple[jax.stages.Lowered, tuple]] = {}
    gates: dict[tuple, tuple[jax.stages.Lowered, tuple]] = {}
    for width, ruled in itertools.product(widths, (False, True)):
        arrays, fewer = draw(shape, shape.length, width), draw(shape, checked, width)
        judged = tuple(fewer[x] for x in _ATTENTION)
        with rules(ruled):
            lowered = lower("lucid_attention", "forward+backward", width, judged)
            gates[width, ruled] = lowered, judged
            for op, passes, names in PROGRAMS:
                given = tuple(arrays[x] for x in names)
                programs[op, passes, width, ruled] = lower(op, passes, width, given), given
    # One compilation leaves most cores idle.
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        judges = pool.map(lambda x: x[0].compile(), gates.values())
        compiled = pool.map(lambda x: x[0].compile(), programs.values())
    reference = exact(shape, checked)
    for ((width, ruled), (_, judged)), run in zip(gates.items(), judges):
        order = Stripes(checked, DEVICES, width).permutation()
        o, gradients = run(*judged)
        name = f"lucid_attention, stripes of {width}, {'with' if ruled else 'without'} rules"
        found = dict(zip(reference, (o, *gradients)))
        striped = {name: x[:, order] for name, x in reference.items()}
        error = measuring.judge(name, found, striped, TOLERANCE)
        print(f"{name}: error {error:.1e}", flush=True)

    def timed(run: Callable, arrays: tuple) -> Callable[[], object]:
        return lambda: jax.block_until_ready(run(*arrays))

    runs = {key: timed(run, x) for (key, (_, x)), run in zip(programs.items(), compiled)}
    names = "op", "pass", "width", "rules"
    return [
        {**dict(zip(names, key)), "median_ms": 1e3 * statistics.median(x)}
        for key, x in measuring.interleaved(runs, seconds).items()
    ]


def table(records: Sequence[dict]) -> str:
    """Returns a Markdown table of milliseconds without the rules and with them."""
    by_key = {(x["op"], x["pass"], x["width"], x["rules"]): x["median_ms"] for x in records}
    rows = []
    for (op, passes, width, ruled), before in by_key.items():
        if not ruled:
            after = by_key[op, passes, width, True]
            times = f"{before:.2f} ms", f"{after:.2f} ms", f"{after / before:.3f}"
            rows.append((f"`{op}`", passes, width, *times))
    header = ("op", "pass", "width", "without rules", "with rules", "ratio")
    return reporting.markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, times, prints the table and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    parser.add_argument("--widths", type=reporting.integers, default=WIDTHS)
    parser.add_argument("--seconds", type=float, default=10, help="of timing")
    flags = parser.parse_args(argv)
    measuring.require_gpus(parser, DEVICES)
    header = measuring.provenance(flags)
    header |= {"shape": str(SHAPE), "devices": DEVICES, "dtype": "bfloat16"}
    records = benchmark(SHAPE, CHECKED, flags.widths, flags.seconds)
    print(table(records))
    reporting.write_json(flags.out / "two_gpus.json", **header, records=records)


if __name__ == "__main__":
    main()
