"""Rows that are already solved: what a chunk, a cache or another device stands on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Solved rows that come before the rows of a call.

    Attributes:
      k: Keys `[B,P,K,D]` (rotated, not normalised), dtype of the call's keys.
      y: Their preconditioned values `[B,P,K,D]`, dtype of the call's values.
      segment_ids: int32 `[B,P]`; given if and only if the call has segment ids.
      length: int32 `[B]`, how many leading rows are valid where the buffers are
        longer, as a static cache is; None means all `P`. What stands behind is
        never read into the result, not even a NaN.
    """

    k: jax.Array
    y: jax.Array
    segment_ids: jax.Array | None = None
    length: jax.Array | None = None

    def valid(self, dtype: jax.typing.DTypeLike) -> Prefix:
        """The same rows in `dtype`, zeros where not valid, and without a length.

        Zero rows of `y` contribute nothing and get no gradient.
        """
        k, y = self.k.astype(dtype), self.y.astype(dtype)
        if self.length is not None:
            rows = jnp.arange(y.shape[1]) < self.length[:, None]
            k, y = (jnp.where(rows[:, :, None, None], x, 0) for x in (k, y))
        return Prefix(k, y, self.segment_ids)
