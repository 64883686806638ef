"""Attention of one new token to a KV cache: one public function, several backends."""

from lucid_jax.ops.decode.api import decode_attention
from lucid_jax.ops.decode.new_token import LayerCache

__all__ = ["LayerCache", "decode_attention"]
