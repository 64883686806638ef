"""The kernels over packed sequences on one GPU: what they gain by skipping what segments hide.

  python -m experiments.triton_precondition.packed

One process times in turns, on the same arrays: `precondition` and softmax attention by the kernels,
packed and with one document a sequence, and softmax attention by cuDNN. That takes packed sequences
only through a private function of JAX, one sequence at a time, and needs memory for each document.
Needs a GPU, and writes packed.json.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

from experiments import measuring, reporting
from experiments.kernels import Shape, draw_segments, prepare_ops
from lucid_jax import precondition, softmax_attention

# A shape, and the mean length of documents, which is exponentially distributed.
CASES = (
    (Shape(1, 131072, 32, 4, 64), 4000),
    (Shape(1, 131072, 32, 4, 64), 16000),
    (Shape(1, 131072, 16, 4, 128), 4000),
    (Shape(16, 2048, 32, 4, 64), 600),
    # The paper's width of heads.
    (Shape(1, 131072, 32, 4, 68), 4000),
    (Shape(16, 2048, 32, 4, 68), 600),
)
# More documents in a sequence would take cuDNN's workspace beyond the device's memory.
MOST_DOCUMENTS = 28
KERNELS = "triton"


def cudnn_packed(ids: np.ndarray, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Computes softmax attention of one packed sequence by cuDNN."""
    starts = np.flatnonzero(np.diff(ids[0], prepend=0))
    bounds = np.append(starts, ids.shape[1])
    lengths, offsets = (jnp.asarray(x[None], jnp.int32) for x in (np.diff(bounds), bounds))
    return dot_product_attention(
        q, k, v, None, None, lengths, lengths, offsets, offsets,
        scale=q.shape[-1] ** -0.5, mask_type=MaskType.PADDING_CAUSAL,
    )  # fmt: skip


def packed(op: Callable, ids: np.ndarray, *arrays: jax.Array) -> jax.Array:
    """Calls `op` with segment ids that depend on the arrays, so that no loop prepares them once."""
    moved = jnp.isnan(arrays[0].ravel()[0]).astype(jnp.int32)
    return op(*arrays, segment_ids=jnp.asarray(ids) + moved, implementation=KERNELS)


def contestants(shape: Shape, ids: np.ndarray) -> dict[str, tuple[Callable, str]]:
    """Returns ops by name, and the arguments that they take."""
    ops: dict[str, tuple[Callable, str]] = {
        "precondition": (functools.partial(packed, precondition, ids), "kv"),
        "precondition, one document": (
            functools.partial(precondition, implementation=KERNELS), "kv",
        ),
        "softmax": (functools.partial(packed, softmax_attention, ids), "qkv"),
        "softmax, one document": (
            functools.partial(softmax_attention, implementation=KERNELS), "qkv",
        ),
    }  # fmt: skip
    # cuDNN takes heads of a multiple of 8.
    if KERNELS == "triton" and shape.head_dim % 8 == 0:
        cudnn = functools.partial(softmax_attention, implementation="cudnn")
        ops["cuDNN, one document"] = cudnn, "qkv"
        if shape.batch == 1:
            ops["cuDNN"] = functools.partial(cudnn_packed, ids), "qkv"
    return ops


def prepare(shape: Shape, mean: int) -> Callable[[float], list[dict[str, object]]]:
    """Compiles all programs of a case; returns a function that times them and gives records."""
    ids = draw_segments(shape.batch, shape.length, mean, MOST_DOCUMENTS)
    documents = dataclasses.replace(shape, batch=shape.batch * shape.length // mean, length=mean)

    def work(name: str) -> Shape:
        return shape if "one document" in name else documents

    measure = prepare_ops(contestants(shape, ids), shape.draw(), work)
    case = {"shape": str(shape), "mean_document": mean, "most_documents": int(ids.max())}
    return lambda seconds: [case | record for record in measure(seconds)]


def table(records: Sequence[dict]) -> str:
    """Returns a Markdown table: a row for each case and pass, a column for each contestant."""
    names = list(dict.fromkeys(x["name"] for x in records))
    cases: dict[tuple, dict[str, float]] = {}
    for x in records:
        case = x["shape"], f"{x['mean_document']} ({x['most_documents']})", x["pass"]
        cases.setdefault(case, {})[x["name"]] = x["median_ms"]

    def ratio(ms: dict[str, float]) -> str:
        return f"{ms['softmax'] / ms['cuDNN']:.2f}" if "cuDNN" in ms else "–"

    rows = (
        [*case, *(f"{ms[n]:.3g}" if n in ms else "–" for n in names), ratio(ms)]
        for case, ms in cases.items()
    )
    header = ["B×S, H/K, D", "documents of", "pass", *names, "softmax / cuDNN"]
    return reporting.markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every case, prints the table in ms and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    parser.add_argument("--seconds", type=float, default=5, help="of timing for each case")
    flags = parser.parse_args(argv)
    measuring.require_gpus(parser)
    header = measuring.provenance(flags)
    # All programs compile at once on the host's cores; then the device is timed alone.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        prepared = list(pool.map(lambda case: prepare(*case), CASES))
    records = [record for measure in prepared for record in measure(flags.seconds)]
    print(table(records))
    reporting.write_json(flags.out / "packed.json", **header, dtype="bfloat16", records=records)


if __name__ == "__main__":
    main()
