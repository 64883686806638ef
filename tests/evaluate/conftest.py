"""Two tokenizers: bytes, and a small BPE that opens documents with a token."""

import pytest
import tokenizers

from lucid_jax.data import load_tokenizer
from lucid_jax.evaluate.tasks.prose import sentences

# The pieces of words that it learns; what else there is comes letter by letter.
_LINES = [
    *sentences(100),
    "One of the special magic numbers for able-acorn is: 1234567.",
    "VAR ABCDE = VAR FGHIJ",
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
]


def train_bpe(path, lines, vocab_size):
    """Writes a BPE tokenizer that has learned the pieces of `lines`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.save(str(path))


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    train_bpe(path, _LINES, vocab_size=700)
    return path


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe_file):
    return load_tokenizer("bytes" if request.param == "bytes" else str(bpe_file))


@pytest.fixture
def of_bytes():
    return load_tokenizer("bytes")
