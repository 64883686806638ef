"""Data: sources, tokenizers, packing, and batches on the mesh with exact resumption."""

from lucid_jax.data.check import check_data
from lucid_jax.data.loader import BatchLoader
from lucid_jax.data.tokenizer import load_tokenizer

__all__ = ["BatchLoader", "check_data", "load_tokenizer"]
