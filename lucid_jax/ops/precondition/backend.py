"""The interface of a backend of the solve, and the choice of one.

`A` is one triangular system for each sequence and KV head. A backend solves whole sequences,
forward and backward. All but one also give the rectangles of `A` between two sets of keys: those
join a sequence to its prefix (`api`) and the stripes of a sequence that is sharded over devices
(`lucid_jax.parallel.context_solve`).

An instance is made either for whole sequences, whose keys it pads, or for stripes: there keys
come in blocks of `width` rows that need no padding, and each block of rows has its own range of
columns.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import jax

from lucid_jax.ops import check
from lucid_jax.ops.blocks import ColumnRanges
from lucid_jax.ops.precondition import mosaic_gpu, mosaic_tpu, triton, xla
from lucid_jax.ops.precondition.gram import Keys


class SequenceBackend(Protocol):
    """Solves whole sequences. All arrays of values are `[B,S,K,D]`; k is not normalised.

    `beta` is β `[B,S,K]` in the accumulator dtype, or None for 1. With it the systems to solve are
    `diag(1/β) + stril(A)` instead of `A`: only the inverses of the diagonal blocks differ.

    Attributes:
      isolated: Whether whole sequences take the measures of `isolation`.
    """

    isolated: ClassVar[bool]

    @classmethod
    def for_sequences(cls, k: jax.Array, precision: jax.lax.Precision | None) -> SequenceBackend:
        """Makes the backend for whole sequences with keys like `k`."""
        ...

    def forward(
        self,
        k: jax.Array,
        rhs: jax.Array,
        segment_ids: jax.Array | None,
        beta: jax.Array | None,
    ) -> tuple[jax.Array, Any]:
        """Solves `A y = rhs`; `rhs` is in the dtype of `k` or the accumulator dtype.

        Returns:
          `y [B,S,K,D]`, dtype of `k`, and what else `backward` needs, or None.
        """
        ...

    def backward(
        self,
        k: jax.Array,
        y: jax.Array,
        residual: Any,
        segment_ids: jax.Array | None,
        y_bar: jax.Array,
        dtype: jax.typing.DTypeLike,
        beta: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns `k̄` in `dtype` and `v̄ = A⁻ᵀ ȳ` in the dtype of `k`.

        `y` and `residual` are the results of `forward`.
        """
        ...


class Backend(SequenceBackend, Protocol):
    """Also gives the rectangles of `A`, and solves stripes."""

    @classmethod
    def for_stripes(cls, width: int) -> Backend:
        """Makes the backend for stripes in blocks of `width` rows."""
        ...

    def keys(
        self, k: jax.Array, segment_ids: jax.Array | None, beta: jax.Array | None = None
    ) -> Keys:
        """Normalises keys `[B,S,K,D]`, with ids int32 `[B,S]` or None, for rows or columns.

        Only `solve_stripe` needs their β.
        """
        ...

    def product(
        self, rows: Keys, columns: Keys, x: jax.Array, ranges: ColumnRanges | None = None
    ) -> jax.Array:
        """Multiplies `A_rc x`, in the accumulator dtype.

        Args:
          rows: S keys, padding included.
          columns: P keys.
          x: `[B,P,K,D]`, without padding.
          ranges: For stripes, the columns that each block of rows takes.

        Returns:
          `[B,S,K,D]`, padding included.
        """
        ...

    def cross_gradient(
        self,
        k: jax.Array,
        rows: Keys,
        x: jax.Array,
        columns: Keys,
        x_columns: jax.Array,
        ranges: ColumnRanges | None = None,
    ) -> jax.Array:
        """Returns `k̄` of the rows of `−A_rc`, whose cotangent at (i, j) is `x_i·x_j`.

        Args:
          k: The keys of the rows `[B,S,K,D]`.
          rows: The same keys, normalised.
          x: `[B,S,K,D]`.
          columns: P keys.
          x_columns: `[B,P,K,D]`.
          ranges: For stripes, the columns that each block of rows takes.

        Returns:
          `[B,S,K,D]` in the accumulator dtype.
        """
        ...

    def inverses(
        self,
        k: jax.Array,
        segment_ids: jax.Array | None,
        stripe: int,
        beta: jax.Array | None = None,
    ) -> Any:
        """Precomputes what `solve_stripe` needs of the keys of all stripes.

        Args:
          k: `[B,S,K,D]`.
          segment_ids: int32 `[B,S]`, or None.
          stripe: Rows of a stripe; divides S.
          beta: `[B,S,K]`, or None.
        """
        ...

    def solve_stripe(
        self, keys: Keys, inverses: Any, index: jax.Array, rhs: jax.Array, *, reverse: bool = False
    ) -> jax.Array:
        """Solves `A y = rhs` within one stripe, or `Aᵀ y = rhs` if `reverse`.

        Args:
          keys: The keys of the stripe.
          inverses: The result of `inverses` for all stripes.
          index: int32 `[]`, which stripe it is.
          rhs: `[B,S,K,D]` in the accumulator dtype.
          reverse: Whether to solve the transposed system.

        Returns:
          `y [B,S,K,D]` in the dtype of the keys.
        """
        ...


STRIPE_BACKENDS: dict[str, type[Backend]] = {
    "xla": xla.XlaBackend,
    "triton": triton.TritonBackend,
    "mosaic_tpu": mosaic_tpu.MosaicTpuBackend,
}
BACKENDS: dict[str, type[SequenceBackend]] = {
    **STRIPE_BACKENDS,
    "mosaic_gpu": mosaic_gpu.MosaicGpuBackend,
}


def unsupported(k: jax.Array, *, plain: bool) -> dict[str, str | None]:
    """Says for each kernel backend why it cannot take a call, or None; the fastest comes first.

    Args:
      k: Keys `[B,S,K,D]`.
      plain: Whether the call has no prefix, no β and the default precision.
    """
    reasons = {
        "triton": triton.unsupported(k),
        "mosaic_gpu": mosaic_gpu.unsupported(k),
        "mosaic_tpu": mosaic_tpu.unsupported(k),
    }
    if not plain and not reasons["mosaic_gpu"]:
        reasons["mosaic_gpu"] = "it takes no prefix, no beta and no precision"
    if mosaic_gpu.is_fastest(k):
        reasons = {"mosaic_gpu": reasons["mosaic_gpu"], **reasons}
    return reasons


def choose_stripe_backend(implementation: str | None, k: jax.Array, width: int) -> Backend:
    """Chooses the backend for stripes in blocks of `width` rows.

    Args:
      implementation: As in `precondition`; `"reference"` and `"mosaic_gpu"` have no stripes.
      k: Keys `[B,S,K,D]`.
      width: Rows of a block.

    Raises:
      ValueError: an implementation that is unknown or cannot run the call.
    """
    reasons = {
        "triton": triton.unsupported(k) or triton.unsupported_width(width),
        "mosaic_tpu": mosaic_tpu.unsupported(k) or mosaic_tpu.unsupported_width(width),
    }
    return check.backend("solve", implementation, STRIPE_BACKENDS, reasons).for_stripes(width)
