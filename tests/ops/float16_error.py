"""The check that a solve of bfloat16 inputs has the error of float16, in every document."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ops import oracle
from ops.cases import Case
from ops.conformance import assert_close, rounding

# Documents of 1e4 beside documents of 1e-4, and both in one document, in either order. Documents
# whose ids do not ascend count as one, so that float16 limits how small they may be.
SIZES = {
    "alike": ((None, 1.0),),
    "documents": ((0, 1e4), (100, 1e-4), (150, 1e4), (160, 1e-4)),
    "falling": ((None, 1e4), (200, 1e-4)),
    "rising": ((None, 1e-4), (200, 1e4)),
    "descending": ((0, 1.0), (100, 2.0**-12), (300, 2.0**-12)),
}


def check_float16_errors(op: Callable[..., jax.Array], keys: str, sizes: str) -> None:
    """Checks `op(k, v, segment_ids)` and its gradients against float64.

    Args:
      op: The solve.
      keys: The kind of keys of a `Case`.
      sizes: The name of the sizes of values.
    """
    # Seven blocks of 64 rows, the last one partial.
    case = Case("float16", length=400, head_dim=64, keys=keys)
    drawn, s = case.draw(), case.length
    starts = [start or 0 for start, _ in SIZES[sizes]]
    part = np.searchsorted(starts, np.arange(s), side="right") - 1
    ids = None if SIZES[sizes][0][0] is None else part[None].astype(np.int32)
    if sizes == "descending":
        ids = -ids
    drawn["v"] *= np.array([size for _, size in SIZES[sizes]])[part][None, :, None, None]
    bf16, f16 = rounding("bfloat16"), rounding("float16")
    k, v, y_bar = (bf16(drawn[name]) for name in ("k", "v", "y_bar"))
    segment_ids = None if ids is None else jnp.asarray(ids)

    @jax.jit
    def run(k, v, y_bar):
        y, pull_back = jax.vjp(lambda k, v: op(k, v, segment_ids), k, v)
        return y, *pull_back(y_bar)

    y, k_bar, v_bar = run(*(jnp.asarray(x, jnp.bfloat16) for x in (k, v, y_bar)))

    def relative_rounding(x):
        # Float16 values have exponents of their own block, so that none is subnormal.
        scale = 2.0 ** np.floor(np.log2(np.where(x == 0, 1, np.abs(x))))
        return f16(x / scale) * scale

    ref = oracle.precondition(k, v, ids)
    low = oracle.precondition(k, v, ids, relative_rounding)
    gradients, _ = oracle.precondition_gradients(k, v, y_bar, ids)
    low_gradients, _ = oracle.precondition_gradients(k, v, y_bar, ids, relative_rounding)
    found = {"y": y, "k": k_bar, "v": v_bar}
    exact = {"y": ref, **gradients}
    rough = {"y": low, **low_gradients}
    # Each document by itself; in one document, the parts together.
    for document in np.unique(part) if ids is not None else [None]:
        rows = slice(None) if document is None else part == document
        for name, x in found.items():
            out, want = np.asarray(x, np.float64)[:, rows], exact[name][:, rows]
            size = np.linalg.norm(want)
            error = np.linalg.norm(rough[name][:, rows] - want) / size
            # Twice the error of float16, beside one rounding of the result.
            assert_close(f"{name} of document {document}", out, want, 2 * error + 2**-8)
