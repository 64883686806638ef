"""The order of the tokens of a row that is spread over devices.

A row is cut into blocks of `width` tokens, dealt to the shards in turn: block `g` lies on
shard `g mod shards`, and `shards` blocks in a row are a stripe. Under a causal mask every
shard then has early and late rows alike, and a solve that proceeds by stripes needs all
shards at every step. The batch is put into this order once, on the host; as an array it is
the rows of shard 0, then those of shard 1, and so on, which a plain sharding splits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Stripes:
    """Rows of `length` tokens on `shards` devices, in blocks of `width`.

    One shard keeps rows as they are: no padding, no permutation, whatever the width.
    """

    length: int
    shards: int
    width: int

    @property
    def size(self) -> int:
        """Tokens of a row with its padding, which makes the stripes whole."""
        stripe = 1 if self.shards == 1 else self.shards * self.width
        return -(-self.length // stripe) * stripe

    @property
    def count(self) -> int:
        """Stripes of a row of several shards: blocks of each."""
        return self.size // (self.shards * self.width)

    def permutation(self) -> np.ndarray:
        """int64 `[size]`: which token of the padded row stands at each place."""
        places = np.arange(self.size)
        if self.shards == 1:
            return places
        return places.reshape(self.count, self.shards, self.width).swapaxes(0, 1).reshape(-1)

    def positions(self, shard: jax.Array | int) -> jax.Array:
        """int32 `[size/shards]`: the places in the row of the tokens of one shard, ascending."""
        if self.shards == 1:
            return jnp.arange(self.size, dtype=jnp.int32)
        block = jnp.arange(self.count, dtype=jnp.int32)[:, None] * self.shards + shard
        return (block * self.width + jnp.arange(self.width, dtype=jnp.int32)).reshape(-1)

    def apply(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All arrays `[B,length]` of a batch, padded and in the order of the shards: `[B,size]`.

        Padding is zero, as that of packing is; `positions` go on, so that no two of
        its keys are rotated alike.
        """
        if self.shards == 1:
            return dict(batch)
        padding, order = self.size - self.length, self.permutation()
        after = np.arange(1, padding + 1)

        def arrange(name: str, x: np.ndarray) -> np.ndarray:
            tail = x[:, -1:] + after if name == "positions" else np.zeros((len(x), padding))
            return np.concatenate([x, tail.astype(x.dtype)], 1)[:, order]

        return {name: arrange(name, x) for name, x in batch.items()}

    def restore(self, x: np.ndarray) -> np.ndarray:
        """`[B,size,…]` in the order of the shards to `[B,length,…]` in that of the row."""
        return x[:, np.argsort(self.permutation())[: self.length]]
