"""Tokenizers behind one interface, for training and evaluation."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from lucid_jax.config import ConfigError
from lucid_jax.data.documents import Completion, Document
from lucid_jax.data.special_ids import SpecialIds


class Tokenizer(Protocol):
    """Converts text to token ids and back, without special tokens."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    special: SpecialIds

    def encode(self, text: str) -> np.ndarray:
        """Returns the tokens of `text`, int32 [T], without special tokens."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids` [T]; skips special tokens and ids beyond the vocabulary."""

    def special_id(self, text: str) -> int | None:
        """Returns the special token that is written as `text`, or None if there is none."""


def load_tokenizer(spec: str) -> Tokenizer:
    """Loads the tokenizer that `data.tokenizer` names.

    It is `"bytes"`, a Hugging Face `tokenizers` file (`*.json`), or a SentencePiece model (any
    other file).

    Raises:
      ConfigError: the file does not exist or is not a tokenizer.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = _existing_file(spec)
    return _HuggingFaceTokenizer(path) if path.suffix == ".json" else _SentencePieceTokenizer(path)


def fingerprint(spec: str) -> str:
    """Returns what identifies a tokenizer on any machine: `"bytes"`, or its file's SHA-256.

    Raises:
      ConfigError: the file does not exist.
    """
    if spec == "bytes":
        return spec
    return hashlib.sha256(_existing_file(spec).read_bytes()).hexdigest()


def encode_document(tokenizer: Tokenizer, document: Document) -> np.ndarray:
    """Returns `[bos] + tokens + [eos]`, int32 [T]; tokenised documents are returned unchanged.

    The tokens of a prompt are those of `encode_prompt`, each as its complement `~id`, because
    they are not to be predicted. A special token that the tokenizer lacks is left out.
    """
    if isinstance(document, np.ndarray):
        return document
    if isinstance(document, Completion):
        return _encode_completion(tokenizer, document)
    bos, eos = (
        np.array([] if special is None else [special], np.int32)
        for special in (tokenizer.bos_id, tokenizer.eos_id)
    )
    return np.concatenate([bos, tokenizer.encode(document), eos])


def _encode_completion(tokenizer: Tokenizer, document: Completion) -> np.ndarray:
    prompt = encode_prompt(tokenizer, document.prompt)
    whole = encode_prompt(tokenizer, document.prompt + document.completion)
    # The model will be given the prompt's own tokens, even where the last merges with what follows.
    merged = whole[: len(prompt)] != prompt
    completion = tokenizer.encode(document.completion) if merged else whole[len(prompt) :]
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return np.concatenate([~np.array(prompt, np.int32), completion, end]).astype(np.int32)


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns `[bos] + tokens`, the start of a document; without bos if there is none."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return bos + tokenizer.encode(text).tolist()


def _existing_file(spec: str) -> Path:
    path = Path(spec).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"data.tokenizer={spec!r} is not a file; it must be 'bytes', a tokenizers .json file"
            " or a SentencePiece model"
        )
    return path


class ByteTokenizer:
    """UTF-8 bytes are tokens 0 to 255; 256 begins a document and 257 ends it."""

    vocab_size = 258
    bos_id: int | None = 256
    eos_id: int | None = 257
    special = SpecialIds(256, 257, (257,), None)

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`."""
        return np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer`; bytes that are not UTF-8 become U+FFFD."""
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")

    def special_id(self, text: str) -> int | None:
        """See `Tokenizer`; the special tokens are not written."""
        return None


class _HuggingFaceTokenizer:
    """A `tokenizer.json` file of the Hugging Face `tokenizers` library."""

    def __init__(self, path: Path):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises no narrower class.
            raise ConfigError(f"{path} is not a tokenizers file: {error}") from error
        # A file may set the truncation and padding of the model it was published with.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # "</s>" in the text of a document does not end the document.
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab()
        # The largest id counts, because ids may have gaps.
        self.vocab_size: int = max(ids.values()) + 1
        self.special = SpecialIds.read(path.parent, ids.get)
        self.bos_id: int | None = self.special.bos
        self.eos_id: int | None = self.special.eos

    def encode(self, text: str) -> np.ndarray:
        # Unlike `encode`, this computes no offsets.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.asarray(encoding.ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(i) for i in ids if i < self.vocab_size])

    def special_id(self, text: str) -> int | None:
        added = self._tokenizer.get_added_tokens_decoder()
        return next((i for i, x in added.items() if x.special and x.content == text), None)


class _SentencePieceTokenizer:
    """A SentencePiece model file."""

    def __init__(self, path: Path):
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"{path} is not a SentencePiece model: {error}") from error
        self.vocab_size: int = self._processor.vocab_size()
        # The model knows its special tokens itself, -1 for one that it lacks; files may add ends.
        bos, eos, pad = (
            None if i < 0 else i
            for i in (self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id())
        )
        added = SpecialIds.read(path.parent, lambda name: None).ends
        ends = tuple(dict.fromkeys(([] if eos is None else [eos]) + list(added)))
        self.special = SpecialIds(bos, eos, ends, pad)
        self.bos_id: int | None = bos
        self.eos_id: int | None = eos

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._processor.encode(text), np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    def special_id(self, text: str) -> int | None:
        index = self._processor.piece_to_id(text)
        return index if self._processor.is_control(index) else None
