"""The solved part of a sequence: what a chunk, a cache or another device builds on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Tokens that come before those of a call, with their preconditioned values.

    Attributes:
      k: Keys `[B,P,K,D]` (rotated, not normalised), dtype of the call's keys.
      y: Their preconditioned values `[B,P,K,D]`, dtype of the call's values.
      segment_ids: Integers `[B,P]`; given if and only if the call has segment ids.
      length: Integers `[B]`, the number of valid leading tokens where the buffers are longer, as
        in a static cache; None means all `P`. Whatever the buffers hold behind it never reaches
        the result, not even a NaN.
    """

    k: jax.Array
    y: jax.Array
    segment_ids: jax.Array | None = None
    length: jax.Array | None = None

    def masked(self, dtype: jax.typing.DTypeLike) -> Prefix:
        """Returns the prefix in `dtype`, with zeros for the tokens that are not valid.

        Zero rows of `y` contribute nothing and get no gradient.
        """
        k, y = self.k.astype(dtype), self.y.astype(dtype)
        if self.length is not None:
            valid = jnp.arange(y.shape[1])[None] < self.length[:, None]
            k, y = (jnp.where(valid[:, :, None, None], x, 0) for x in (k, y))
        return Prefix(k, y, self.segment_ids)
