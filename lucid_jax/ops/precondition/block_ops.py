"""What a solve across devices is put together from, and which backend provides it.

Rows lie in blocks of `width`, the same everywhere, and every array is a whole number of
blocks. A backend gives the solve of a few blocks (a stripe), and rectangles of `A`: rows of
one sequence against columns of another, each block of rows with its own range of columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax

from lucid_jax.ops import check
from lucid_jax.ops.precondition import mosaic_tpu as pallas_mosaic_tpu
from lucid_jax.ops.precondition import triton as pallas_triton
from lucid_jax.ops.precondition import xla
from lucid_jax.ops.precondition.gram import Keys


class BlockOps(Protocol):
    """The pieces of one backend. Ranges are int32 `[N]`, in columns, multiples of the width."""

    def keys(self, k: jax.Array, segment_ids: jax.Array | None) -> Keys:
        """Rows or columns of rectangles, from keys `[B,S,K,D]` and int32 `[B,S]` or None."""
        ...

    def inverses(self, k: jax.Array, segment_ids: jax.Array | None, rows: int) -> Any:
        """What solving stripes of so many rows takes beside keys, and is made of keys alone.

        Args:
          k: Keys of N stripes `[B,S,K,D]`, not normalised.
          segment_ids: int32 `[B,S]`, or None.
          rows: Of a stripe, S/N.

        """
        ...

    def solve(
        self,
        keys: Keys,
        inverses: Any,
        stripe: jax.Array,
        rhs: jax.Array,
        *,
        reverse: bool = False,
    ) -> jax.Array:
        """`A⁻¹ rhs`, or `A⁻ᵀ rhs` with `reverse`, of a stripe.

        Args:
          keys: Its keys.
          inverses: What `inverses` gives, of all stripes.
          stripe: int32 `[]`: which of them.
          rhs: `[B,S,K,D]` in the accumulator dtype.
          reverse: Solves the transposed system.

        Returns:
          `[B,S,K,D]` in the dtype of the keys.
        """
        ...

    def product(
        self, rows: Keys, columns: Keys, x: jax.Array, first: jax.Array, end: jax.Array
    ) -> jax.Array:
        """`A_rc x [B,S,K,D]` in the accumulator dtype.

        Args:
          rows: N blocks of keys.
          columns: P keys.
          x: `[B,P,K,D]`.
          first: The first column of each block of rows.
          end: One past its last.
        """
        ...

    def key_gradient(
        self,
        k: jax.Array,
        rows: Keys,
        x: jax.Array,
        columns: Keys,
        x_columns: jax.Array,
        first: jax.Array,
        end: jax.Array,
    ) -> jax.Array:
        """`k̄ [B,S,K,D]` of the rows of `−A_rc`, whose cotangent at (i, j) is `x_i·x_j`.

        Args:
          k: The keys of the rows `[B,S,K,D]`, not normalised.
          rows: N blocks of them.
          x: `[B,S,K,D]`.
          columns: P keys.
          x_columns: `[B,P,K,D]`.
          first: The first column of each block of rows.
          end: One past its last.
        """
        ...


_BACKENDS: dict[str, Callable[[int], BlockOps]] = {
    "xla": xla.BlockOps,
    "triton": pallas_triton.BlockOps,
    "mosaic_tpu": pallas_mosaic_tpu.BlockOps,
}


def choose_block_ops(implementation: str | None, k: jax.Array, width: int) -> BlockOps:
    """The backend that `implementation` names, or the best for the device.

    Args:
      implementation: As in `precondition`; `"reference"` has no pieces.
      k: Keys `[B,S,K,D]`.
      width: Rows of a block.

    Raises:
      ValueError: an implementation that is unknown or cannot run the call.
    """
    reasons = {
        "triton": pallas_triton.unsupported(k) or pallas_triton.unsupported_width(width),
        "mosaic_tpu": pallas_mosaic_tpu.unsupported(k)
        or pallas_mosaic_tpu.unsupported_width(width),
    }
    return check.backend(implementation, _BACKENDS, reasons)(width)
