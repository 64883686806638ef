"""Floating-point operations of a training step, and the peak rates of devices."""

import time

import jax
import jax.numpy as jnp

from lucid_jax.config import ModelConfig
from lucid_jax.models.inputs import CONVOLUTION_WIDTH

# Peak FLOP/s of one jax device for dense bf16 products, from the vendors' data sheets.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def model_flops(config: ModelConfig, tokens: float, pairs: float) -> float:
    """Returns the operations of the forward and backward pass for some tokens.

    A multiply and an add are two operations. The backward pass takes two products for each one
    of the forward pass, hence the factor 6; recomputed products are not counted:

        products      6 · tokens · (L·(2·E·H·D + 2·E·K·D + 3·E·F) + E·V)
        softmax       6 · pairs · L · 2·H·D         q kᵀ and weights·v: 4·D a pair and head
        LUCID         6 · pairs · L_lucid · 2·K·D   k̂ k̂ᵀ and A·y: the same on K heads
        differential  6 · pairs · L_diff · H·D      its values are twice as wide
        path          6 · tokens · L·(E·K·D + E·K + 3·K·D)
        lucid_beta    6 · tokens · L·E·K

    The embedding lookup, norms, biases and exponentials are left out, as in the usual definition of
    model FLOPs (Chowdhery et al., PaLM, appendix B). So is what carries rows and columns through
    transitions: a few percent of the pairs, which depend on the blocks of the implementation
    (`ops/precondition/carry.py`).

    Args:
      tokens: Tokens that are not padding.
      pairs: Pairs of a token and one that it sees, in its own document.
    """
    e, d, h, k = config.embed_dim, config.head_dim, config.num_heads, config.num_kv_heads
    layer = 2 * e * h * d + 2 * e * k * d + 3 * e * config.mlp_dim
    if config.positions == "path":
        layer += e * k * d + e * k + CONVOLUTION_WIDTH * k * d
    if config.lucid_beta:
        layer += e * k
    products = config.num_layers * layer + e * config.vocab_size
    lucid, differential = map(config.layer_kinds.count, ("lucid", "differential"))
    attention = d * (2 * config.num_layers * h + 2 * lucid * k + differential * h)
    return 6.0 * (products * tokens + attention * pairs)


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Returns `model_flops` of a token in a sequence of one document, which sees half of it."""
    return model_flops(config, 1, sequence_length / 2)


def peak_flops(device: jax.Device) -> float:
    """Returns the peak FLOP/s of a device: the data sheet's, or that of a product timed now."""
    kind = device.device_kind
    for name, peak in sorted(_PEAK_FLOPS.items(), key=lambda item: -len(item[0])):
        if kind.startswith(name):
            return peak
    return _measured_flops(device)


def _measured_flops(device: jax.Device, n: int = 1024, repeats: int = 3) -> float:
    with jax.default_device(device):
        a = jnp.ones((n, n), jnp.float32)
        product = jax.jit(jnp.matmul)
        product(a, a).block_until_ready()
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            product(a, a).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
