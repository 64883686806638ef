"""The error of the kernels on bfloat16 inputs, beside that of bfloat16 products.

  python -m experiments.triton_precondition.accuracy

`y` and the gradients of one head by the Triton kernels, whose products of 16-bit inputs take
float16 operands, and by the blockwise XLA path, whose products take bfloat16 ones, against the
blockwise XLA path in float64. Keys have a mean cosine; results are rounded to bfloat16, an error of
0.17% by itself. Needs a GPU, takes about 2 minutes, and writes accuracy.json.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import measuring, reporting
from lucid_jax import precondition

KERNELS = "triton"
# Tokens and head width.
SHAPES = ((4096, 64), (4096, 128), (131072, 64))
COSINES = (0.0, 0.7, 0.9, 0.99)


def draw(length: int, d: int, cosine: float) -> tuple[jax.Array, ...]:
    """Draws bfloat16 `k` of a mean cosine, `v` and the cotangent `ȳ`: `[1,S,1,D]`."""
    rng = np.random.default_rng(0)
    noise, common = rng.normal(size=(length, d)), rng.normal(size=d)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    k = np.sqrt(cosine) * common / np.linalg.norm(common) + np.sqrt(1 - cosine) * noise
    arrays = k, *rng.normal(size=(2, length, d))
    return tuple(jnp.asarray(x[None, :, None], jnp.bfloat16) for x in arrays)


@functools.cache
def solver(implementation: str) -> Callable:
    """Returns a compiled function of `k`, `v` and `ȳ` that gives `y` and the gradients."""
    op = functools.partial(precondition, implementation=implementation)
    return jax.jit(measuring.forward_and_backward(op))


def errors(length: int, d: int, cosine: float) -> dict[str, list[float]]:
    """Returns the relative errors of `y`, `k̄` and `v̄` by implementation."""
    arrays = draw(length, d, cosine)
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(x, np.float64)) for x in arrays)
        exact = jax.device_get(jax.tree.leaves(solver("xla")(*wide)))
    found = {}
    for implementation in (KERNELS, "xla"):
        results = jax.device_get(jax.tree.leaves(solver(implementation)(*arrays)))
        found[implementation] = [
            float(np.linalg.norm(x.astype(np.float64) - ref) / np.linalg.norm(ref))
            for x, ref in zip(results, exact)
        ]
    return found


def table(records: Sequence[dict]) -> str:
    """Returns a Markdown table: a row for each case, errors in percent."""
    rows = []
    for x in records:
        pairs = zip(x["errors"][KERNELS], x["errors"]["xla"])
        cells = (f"{100 * ours:.2f}, {100 * bf16:.2f}" for ours, bf16 in pairs)
        rows.append([str(x["tokens"]), str(x["head_dim"]), str(x["cosine"]), *cells])
    names = (f"{name}: float16, bfloat16 (%)" for name in ("y", "gradient of k", "gradient of v"))
    return reporting.markdown(["tokens", "D", "mean cosine", *names], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every case, prints the table and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    flags = parser.parse_args(argv)
    measuring.require_gpus(parser)
    header = measuring.provenance(flags)
    records = [
        {"tokens": s, "head_dim": d, "cosine": cosine, "errors": errors(s, d, cosine)}
        for s, d in SHAPES
        for cosine in COSINES
    ]
    print(table(records))
    reporting.write_json(flags.out / "accuracy.json", **header, records=records)


if __name__ == "__main__":
    main()
