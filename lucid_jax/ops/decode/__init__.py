"""Attention of new tokens to a KV cache: of one by several backends, or of a chunk."""

from lucid_jax.ops.decode.api import decode_attention, decode_implementation
from lucid_jax.ops.decode.chunk import chunk_attention
from lucid_jax.ops.decode.new_token import LayerCache
from lucid_jax.ops.decode.path import PathCache, decode_path_attention

__all__ = [
    "LayerCache",
    "PathCache",
    "chunk_attention",
    "decode_attention",
    "decode_implementation",
    "decode_path_attention",
]
