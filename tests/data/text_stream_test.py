"""Streamed text: every piece has whole characters, and the pieces are the whole text."""

import pytest

from lucid_jax.data.text_stream import TextStream
from lucid_jax.data.tokenizer import ByteTokenizer

TEXT = "ünï 🂡 – ab"


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_every_piece_has_whole_characters(size):
    tokenizer = ByteTokenizer()
    prompt, ids = tokenizer.encode("é a prompt é").tolist(), tokenizer.encode(TEXT).tolist()
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "".join(pieces) == TEXT
    assert "\ufffd" not in "".join(pieces)
    assert sum(map(bool, pieces)) > len(TEXT) / (2 * size)
    assert stream.close() == ""


def test_close_returns_an_incomplete_character():
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer, [97])
    assert stream.push([98, 0xC3]) == ""
    assert stream.close() == "b\ufffd"
    assert stream.push([99]) == "c"


class WordTokenizer:
    """Begins each word with a space except at the start of a text, as SentencePiece does."""

    vocab_size, bos_id, eos_id = 4, None, None

    def encode(self, text):
        raise NotImplementedError

    def decode(self, ids):
        return "".join((" one", " two", "s", " six")[i] for i in ids).removeprefix(" ")


def test_the_space_between_prompt_and_completion_is_kept():
    stream = TextStream(WordTokenizer(), [0])
    assert [stream.push([i]) for i in (1, 2, 3)] == [" two", "s", " six"]
