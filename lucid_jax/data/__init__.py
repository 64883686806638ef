"""Sources of documents, tokenizers, packing, and batches on a mesh that resume exactly."""

from lucid_jax.data.check import check_data, check_vocabulary
from lucid_jax.data.loader import BatchLoader
from lucid_jax.data.summary import log_data
from lucid_jax.data.tokenizer import load_tokenizer

__all__ = ["BatchLoader", "check_data", "check_vocabulary", "load_tokenizer", "log_data"]
