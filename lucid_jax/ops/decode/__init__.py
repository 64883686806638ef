"""Attention of one new token to a cache: one op, one public function, several backends."""

from lucid_jax.ops.decode.api import decode_attention
from lucid_jax.ops.decode.new_token import CachedRows

__all__ = ["CachedRows", "decode_attention"]
