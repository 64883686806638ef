"""LUCID attention in JAX: softmax attention over preconditioned values (arXiv 2602.10410)."""

from lucid_jax.ops.attention import softmax_attention
from lucid_jax.ops.dot_product_attention import dot_product_attention
from lucid_jax.ops.lucid_attention import lucid_attention
from lucid_jax.ops.precondition import Prefix, precondition
from lucid_jax.ops.transitions import Transitions

__all__ = [
    "Prefix",
    "Transitions",
    "dot_product_attention",
    "lucid_attention",
    "precondition",
    "softmax_attention",
]
