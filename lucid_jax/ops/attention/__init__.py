"""Causal softmax attention: thin adapters of libraries, and a blockwise fallback."""

from lucid_jax.ops.attention.api import softmax_attention

__all__ = ["softmax_attention"]
