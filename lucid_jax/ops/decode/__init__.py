"""Attention of one new token to a cache: one op, one public function, several backends."""

from lucid_jax.ops.decode.api import decode_attention

__all__ = ["decode_attention"]
