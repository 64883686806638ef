"""What rematerialisation should rather keep: attention's results, small and dear."""

from __future__ import annotations

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

KEPT = "attention"
# Libraries whose backward pass reads what these give, and that name nothing.
_LIBRARY_PRIMITIVES = ("dot_product_attention_fwd_wrapper",)  # cuDNN's flash attention.


def save_for_backward(x: jax.Array) -> jax.Array:
    """Marks a result, in a forward rule, that the backward pass needs and that costs S² to redo."""
    return checkpoint_name(x, KEPT)


def saves_attention(primitive: Primitive, *_: Any, **params: Any) -> bool:
    """A policy for `jax.checkpoint`: of all intermediate values keeps only marked ones."""
    if primitive.name == "name":
        return params["name"] == KEPT
    return primitive.name in _LIBRARY_PRIMITIVES
