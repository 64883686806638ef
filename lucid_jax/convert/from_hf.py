"""Converts a Hugging Face directory to a work directory that runs start from."""

import dataclasses
import json
import os
import pathlib
import shlex
from typing import Any

import jax
import numpy as np
from absl import logging

from lucid_jax.checkpoint.manager import save_params
from lucid_jax.checkpoint.reader import describe_differences
from lucid_jax.config import Config, ConfigError
from lucid_jax.convert.llama_config import read_llama_config, to_config
from lucid_jax.convert.llama_tensors import (
    LlamaTensor,
    abstract_params,
    by_name,
    llama_tensors,
)
from lucid_jax.convert.shards import TensorDirectory
from lucid_jax.convert.tokenizer_files import copy_tokenizer, find_tokenizer
from lucid_jax.data.tokenizer import load_tokenizer
from lucid_jax.runtime.workdir import local_directory, new_directory, write_json

# Dtypes that float32 represents exactly.
_DTYPES = ("F32", "BF16", "F16")
# Ends the names of tables that old checkpoints contain and nothing reads.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"

_CONFIG_FILE = '''"""{name}, as converted by `python -m lucid_jax.convert from-hf`.

    python run.py --config={output}/config.py --mode=eval --workdir={output} \\\\
        --config.data.eval=heldout.jsonl

To fine-tune it with LUCID attention, which has the same parameters:

    python run.py --config={output}/config.py --workdir=runs/{name}_lucid \\\\
        --config.model.attention=lucid --config.data.train=corpus.jsonl
"""

import pathlib

from configs.common import base

HERE = pathlib.Path(__file__).resolve().parent


def get_config():
    config = base()
    config.model.update(
{model}
    )
    config.data.update(
        sequence_length={sequence_length},
        tokenizer={tokenizer},
    )
    config.checkpoint.init_from = str(HERE)
    return config
'''


def from_hf(
    source: str | os.PathLike, output: str | os.PathLike, sequence_length: int | None = None
) -> Config:
    """Converts a local directory of `config.json`, safetensors files and a tokenizer.

    Memory holds one float32 copy of the parameters and one tensor of the files at a time.

    Args:
      source: The directory, as `save_pretrained` of transformers writes it.
      output: The work directory to create, with a checkpoint of step 0 (the parameters alone),
        `config.py` for run.py, and the tokenizer.
      sequence_length: As in `to_config`.

    Returns:
      The configuration that the checkpoint was saved with.

    Raises:
      ConfigError: `output` exists, lucid_jax does not support the model in `source`, or a weight
        is NaN or infinite; the message names the keys or tensors.
    """
    source, output = pathlib.Path(source).expanduser(), local_directory(output)
    tokenizer = find_tokenizer(source)
    config = _read_config(source, sequence_length)
    if not tokenizer:
        logging.warning("%s holds no tokenizer: set data.tokenizer before you train", source)
    path = str(output.absolute() / tokenizer.name) if tokenizer else ""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=path))
    files = TensorDirectory(source)
    abstract = abstract_params(config.model)
    tensors = llama_tensors(abstract)
    _check_fits(source, files, tensors, config.model.tie_embeddings)
    with new_directory(output) as directory:
        params = _read_params(files, tensors, abstract)
        save_params(directory, config, 0, params)
        (directory / "config.py").write_text(_config_file(output, config))
        if tokenizer:
            copy_tokenizer(tokenizer, directory)
            # Beside the run's own config.json, which has no ids.
            special = load_tokenizer(str(tokenizer)).special.to_json()
            write_json(directory / "generation_config.json", special)
    return config


def suggest_command(output: str) -> str:
    """Returns a command that fine-tunes the model in `output` on data that is on every machine."""
    arguments = (
        f"--config={output}/config.py",
        f"--workdir=runs/{pathlib.Path(output).name}_lucid",
        "--config.model.attention=lucid",
        "--config.data.train=python-stdlib",
    )
    return shlex.join(["python", "run.py", *arguments])


def _read_config(source: pathlib.Path, sequence_length: int | None) -> Config:
    path = source / "config.json"
    values = read_llama_config(path)
    try:
        return to_config(values, sequence_length)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _check_fits(
    source: pathlib.Path, files: TensorDirectory, tensors: list[LlamaTensor], tied: bool
) -> None:
    expected = {tensor.name: str(list(tensor.shape)) for tensor in tensors}
    found = {
        name: f"{'' if dtype in _DTYPES else dtype}{list(shape)}"
        for name, (dtype, shape) in files.describe().items()
        # With tied embeddings transformers, too, ignores a stored output embedding.
        if not (name.endswith(_IGNORED_SUFFIX) or (tied and name == "lm_head.weight"))
    }
    if differences := describe_differences(expected, found):
        raise ConfigError(f"{source}: tensors do not fit config.json: {differences}")


def _read_params(files: TensorDirectory, tensors: list[LlamaTensor], abstract: Any) -> Any:
    def read(name: str, x: jax.ShapeDtypeStruct) -> jax.Array:
        logging.info("reading %s", name)
        parameter = np.empty(x.shape, x.dtype)
        for tensor in tensors:
            if tensor.parameter == name:
                tensor.put(files.read(tensor.name), parameter)
        # Waiting for the copy keeps at most one parameter in memory twice.
        return jax.block_until_ready(jax.device_put(parameter, x.sharding))

    arrays = [read(name, x) for name, x in by_name(abstract).items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def _config_file(output: pathlib.Path, config: Config) -> str:
    tokenizer = pathlib.Path(config.data.tokenizer).name
    return _CONFIG_FILE.format(
        name=output.name,
        output=output,
        model="\n".join(
            f"        {field}={json.dumps(value) if isinstance(value, str) else value},"
            for field, value in dataclasses.asdict(config.model).items()
        ),
        sequence_length=config.data.sequence_length,
        tokenizer=f'str(HERE / "{tokenizer}")' if tokenizer else '""',
    )
