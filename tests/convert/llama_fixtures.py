"""The models of `fixtures/llama`, which `fixtures/make_llama.py` wrote, and changes of them."""

import json
import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file

LLAMA = pathlib.Path(__file__).parents[1] / "fixtures" / "llama"
# The sequence length to convert for, and the dtype of the weights.
MODELS = {
    "grouped": (None, "float32"),
    "tied_llama3": (None, "bfloat16"),
    "linear": (None, "bfloat16"),
    # The model's maximum length is 16; the sequences of the fixture have 40 tokens.
    "dynamic": (40, "bfloat16"),
    "smollm2": (None, "bfloat16"),
    "mistral": (None, "bfloat16"),
    "qwen2": (None, "bfloat16"),
    "qwen3": (None, "bfloat16"),
}


def llama_json(name: str, **changes) -> dict:
    """Returns a fixture's config.json with changes; None removes a key."""
    values = json.loads((LLAMA / name / "config.json").read_text())
    removed = [key for key, value in changes.items() if value is None]
    return {key: value for key, value in (values | changes).items() if key not in removed}


def tensors_of(directory: pathlib.Path) -> dict[str, np.ndarray]:
    files = sorted(directory.glob("model*.safetensors"))
    return {name: x for file in files for name, x in load_file(file).items()}


def write_llama(directory, name="linear", tensors=None, **changes) -> pathlib.Path:
    """Writes a fixture with changed tensors or keys, its tensors in one file."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(llama_json(name, **changes)))
    tensors = tensors_of(LLAMA / name) | (tensors or {})
    save_file(
        {key: x for key, x in tensors.items() if x is not None}, directory / "model.safetensors"
    )
    return directory
