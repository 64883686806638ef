"""The shard of a sequence that one device holds, and the collectives that move tokens or heads."""

import dataclasses
from typing import Self

import jax

from lucid_jax.ops import check
from lucid_jax.ops.blocks import take
from lucid_jax.parallel.stripes import Stripes


@dataclasses.dataclass(frozen=True)
class ContextShard:
    """One device's share of sequences that are sharded over a mesh axis, in stripes.

    Arrays are `[B,S/C,…]` on one device, or `[B,S,…]` where they are gathered.

    Attributes:
      axis: The mesh axis, of C devices.
      stripes: The order of the tokens.
    """

    axis: str
    stripes: Stripes

    @classmethod
    def from_inputs(
        cls,
        axis_name: str,
        stripe: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segment_ids: jax.Array | None,
    ) -> tuple[Self, jax.Array | None]:
        """Checks the arguments of an op; describes this device's tokens, and returns int32 ids.

        Raises:
          TypeError: a dtype that is not supported or does not match.
          ValueError: shapes that do not match, or a stripe that does not divide the tokens.
        """
        segment_ids = check.attention_inputs(q, k, v, segment_ids)
        tokens = q.shape[1]
        if not isinstance(stripe, int):
            raise TypeError(f"stripe must be an integer; got {stripe!r}")
        if stripe < 1 or tokens % stripe:
            raise ValueError(f"stripe must divide the {tokens} tokens of a device; got {stripe}")
        shards = jax.lax.axis_size(axis_name)
        return cls(axis_name, Stripes(tokens * shards, shards, stripe)), segment_ids

    def positions(self) -> jax.Array:
        """Returns the positions of this device's tokens: int32 `[S/C]`."""
        return self.stripes.positions(jax.lax.axis_index(self.axis))

    def gather(self, x: jax.Array) -> jax.Array:
        """Gathers the tokens of all devices, in the order of the sequence."""
        blocks = x.reshape(x.shape[0], self.stripes.count, self.stripes.width, *x.shape[2:])
        whole = jax.lax.all_gather(blocks, self.axis, axis=2, tiled=True)
        return whole.reshape(x.shape[0], self.stripes.size, *x.shape[2:])

    def scatter(self, x: jax.Array) -> jax.Array:
        """Sums the devices' shares `[B,S,…]`, and returns the sums of this device's tokens."""
        blocks = self._in_stripes(x)
        blocks = jax.lax.psum_scatter(blocks, self.axis, scatter_dimension=2, tiled=True)
        return blocks.reshape(x.shape[0], -1, *x.shape[2:])

    def own(self, x: jax.Array) -> jax.Array:
        """Selects the tokens of this device from all tokens."""
        start = jax.lax.axis_index(self.axis) * self.stripes.width
        return take(self._in_stripes(x), start, self.stripes.width, 2).reshape(
            x.shape[0], -1, *x.shape[2:]
        )

    def _in_stripes(self, x: jax.Array) -> jax.Array:
        stripe = self.stripes.shards * self.stripes.width
        return x.reshape(x.shape[0], self.stripes.count, stripe, *x.shape[2:])

    def to_heads(self, x: jax.Array) -> jax.Array:
        """Exchanges tokens for heads: `[B,S/C,heads,D]` to `[B,S,heads/C,D]`, in sequence order."""
        b, s, _, d = x.shape
        n, shards, width = self.stripes.count, self.stripes.shards, self.stripes.width
        x = x.reshape(b, n, width, shards, -1, d)
        x = jax.lax.all_to_all(x, self.axis, split_axis=3, concat_axis=2, tiled=True)
        return x.reshape(b, s * shards, -1, d)

    def to_tokens(self, x: jax.Array) -> jax.Array:
        """Inverts `to_heads`."""
        b, s, _, d = x.shape
        n, shards, width = self.stripes.count, self.stripes.shards, self.stripes.width
        x = x.reshape(b, n, shards * width, 1, -1, d)
        x = jax.lax.all_to_all(x, self.axis, split_axis=2, concat_axis=3, tiled=True)
        return x.reshape(b, s // shards, -1, d)

    def divides_kv_heads(self, k: jax.Array) -> bool:
        """Returns whether every device can take whole sequences of some KV heads."""
        return k.shape[2] % self.stripes.shards == 0

    def divides_query_heads(self, q: jax.Array, k: jax.Array) -> bool:
        """Returns whether every device can take whole sequences of query heads of one KV head."""
        shards = self.stripes.shards
        return q.shape[2] % shards == 0 and shards % k.shape[2] == 0
