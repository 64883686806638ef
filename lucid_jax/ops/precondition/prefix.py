"""The solved part of a sequence: what a chunk, a cache or another device builds on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lucid_jax.ops.transitions import Transitions


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
      transitions: The transitions of these tokens; given if and only if the call has transitions.
    """

    k: jax.Array
    y: jax.Array
    segment_ids: jax.Array | None = None
    length: jax.Array | None = None
    transitions: Transitions | None = None

    def masked(self, dtype: jax.typing.DTypeLike) -> Prefix:
        """Returns the prefix in `dtype`, with zeros for the tokens that are not valid.

        Zero rows of `y` contribute nothing and get no gradient; transitions of zero are identities.
        """
        floats = jax.tree.map(lambda x: x.astype(dtype), (self.k, self.y, self.transitions))
        if self.length is not None:
            valid = jnp.arange(self.y.shape[1])[None] < self.length[:, None]
            floats = jax.tree.map(
                lambda x: jnp.where(jnp.expand_dims(valid, range(2, x.ndim)), x, 0), floats
            )
        k, y, transitions = floats
        return Prefix(k, y, self.segment_ids, transitions=transitions)

    def join(
        self,
        k: jax.Array,
        v: jax.Array,
        segment_ids: jax.Array | None,
        transitions: Transitions | None,
    ) -> tuple:
        """Returns the arguments, those of the prefix before those of a call and `y` before `v`."""
        own = self.k, self.y, self.segment_ids, self.transitions
        return jax.tree.map(lambda *x: jnp.concatenate(x, 1), own, (k, v, segment_ids, transitions))
