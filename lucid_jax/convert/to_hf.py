"""Converts a checkpoint to a directory that transformers loads."""

import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from lucid_jax.checkpoint.restore import restore_params, saved_config
from lucid_jax.config import Config
from lucid_jax.convert.llama_config import LUCID_CODE, require_convertible, to_llama_config
from lucid_jax.convert.llama_tensors import abstract_params, by_name, llama_tensors
from lucid_jax.convert.shards import require_finite, write_tensors
from lucid_jax.convert.tokenizer_files import copy_tokenizer
from lucid_jax.data.special_ids import SpecialIds
from lucid_jax.data.tokenizer import load_tokenizer
from lucid_jax.runtime.workdir import local_directory, new_directory, write_json


def to_hf(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 10**9,
    tokenizer: str | None = None,
) -> Config:
    """Converts a checkpoint to `config.json`, safetensors files and a tokenizer.

    A model that transformers does not know gets the code that computes it there, too.

    Memory holds the parameters in float32 and one output file at a time.

    Args:
      checkpoint: A work directory (its newest checkpoint) or the directory of one step.
      dtype: Dtype of the weights; None is the narrowest that keeps all their bits, which is the
        original's for a model that was converted and not trained.
      max_shard_bytes: The most bytes of a file, unless a single tensor is larger.
      tokenizer: A tokenizer file or `"bytes"`; None is the checkpoint's `data.tokenizer`.

    Returns:
      The configuration that the checkpoint was saved with.

    Raises:
      ConfigError: `output` exists, the tokenizer does not, transformers cannot hold the model, or
        a weight is NaN or infinite.
      CheckpointError: there is no sound checkpoint.
    """
    output = local_directory(output)
    config = Config.from_dict(saved_config(checkpoint))
    require_convertible(config.model)
    tokenizer = tokenizer or config.data.tokenizer
    # A model that was converted without a tokenizer has none.
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    with new_directory(output) as directory:
        _, params, _ = restore_params(checkpoint, abstract_params(config.model))
        dtype = dtype or _narrowest_dtype(params)
        special = (loaded.special if loaded else SpecialIds(None, None, (), None)).to_json()
        values = to_llama_config(config, dtype)
        write_json(directory / "config.json", {**values, **special})
        if "auto_map" in values:
            shutil.copyfile(pathlib.Path(__file__).with_name(LUCID_CODE), directory / LUCID_CODE)
            logging.info("transformers runs %s if it is told trust_remote_code=True", LUCID_CODE)
        write_json(directory / "generation_config.json", special)
        if tokenizer == "bytes":
            logging.warning("transformers has no byte tokenizer: none is written")
        elif tokenizer:
            copy_tokenizer(pathlib.Path(tokenizer).expanduser(), directory)
        _write_params(checkpoint, directory, params, dtype, max_shard_bytes)
    return config


def _narrowest_dtype(params) -> str:
    """Returns the first of bfloat16, float16 and float32 that holds every parameter exactly."""

    def holds(dtype: str) -> bool:
        arrays = map(np.asarray, jax.tree.leaves(params))
        with np.errstate(over="ignore"):
            return all(np.array_equal(x.astype(dtype).astype(x.dtype), x) for x in arrays)

    return next((dtype for dtype in ("bfloat16", "float16") if holds(dtype)), "float32")


def _write_params(
    checkpoint: str | os.PathLike,
    directory: pathlib.Path,
    params,
    dtype: str,
    max_shard_bytes: int,
) -> None:
    tensors = {tensor.name: tensor for tensor in llama_tensors(params)}
    arrays = {name: np.asarray(x) for name, x in by_name(params).items()}
    itemsize = jnp.dtype(dtype).itemsize

    def read(name: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            tensor = tensors[name].take(arrays[tensors[name].parameter]).astype(dtype)
        return require_finite(f"{checkpoint} in {dtype}", name, tensor)

    sizes = {name: itemsize * int(np.prod(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(directory, sizes, read, max_shard_bytes)
