"""Two tokenizers: bytes, and a small BPE with a BOS token."""

import pytest
import toy

from lucid_jax.data import load_tokenizer
from lucid_jax.evaluate.tasks.prose import sentences

# The BPE is trained on these; it splits other text into letters.
_LINES = [
    *sentences(100),
    "One of the special magic numbers for able-acorn is: 1234567.",
    "VAR ABCDE = VAR FGHIJ",
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
]


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    toy.train_bpe(path, _LINES, vocab_size=700)
    return path


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe_file):
    return load_tokenizer("bytes" if request.param == "bytes" else str(bpe_file))


@pytest.fixture
def byte_tokenizer():
    return load_tokenizer("bytes")
