"""Streamed text: every piece has whole characters, and the pieces are the whole text."""

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
import toy

from lucid_jax.data import load_tokenizer
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


SCRIPTS = {
    "chinese": (0x4E00, 0x9FFF), "japanese": (0x3041, 0x3096), "thai": (0x0E01, 0x0E30),
    "hindi": (0x0905, 0x0939), "emoji": (0x1F600, 0x1F640), "latin": (0x61, 0x7A),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers_of_kinds(tmp_path_factory):
    """Returns tokenizers of bytes, of byte-level BPE, and of letters with a fallback to bytes."""
    directory = tmp_path_factory.mktemp("tokenizers")
    fallback = {f"<0x{i:02X}>": i for i in range(256)}
    vocabulary = {**fallback, "<unk>": 256, "\u2581": 257}
    vocabulary |= {chr(c): 258 + i for i, c in enumerate(range(0x61, 0x7B))}
    llama = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    )
    llama.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    decoders = tokenizers.decoders
    llama.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    llama.save(str(directory / "llama.json"))
    toy.train_bpe(directory / "bpe.json", ["some words, and 語語 some more"], vocab_size=300)
    names = ("bytes", str(directory / "bpe.json"), str(directory / "llama.json"))
    return [load_tokenizer(name) for name in names]


@hypothesis.settings(deadline=None, derandomize=True, max_examples=60)
@hypothesis.given(data=st.data())
def test_the_pieces_are_the_whole_text(tokenizers_of_kinds, data):
    """For any script, tokenizer and sizes of pushes."""
    tokenizer = data.draw(st.sampled_from(tokenizers_of_kinds))
    low, high = SCRIPTS[data.draw(st.sampled_from(sorted(SCRIPTS)))]
    letters = st.one_of(st.integers(low, high).map(chr), st.sampled_from(" .a"))
    prompt, text = ("".join(data.draw(st.lists(letters, min_size=1, max_size=n))) for n in (20, 60))
    before = tokenizer.encode(prompt).tolist()
    ids = tokenizer.encode(prompt + text).tolist()
    hypothesis.assume(ids[: len(before)] == before)
    stream, pieces, i = TextStream(tokenizer, before), [], len(before)
    while i < len(ids):
        n = data.draw(st.integers(1, 9))
        pieces.append(stream.push(ids[i : i + n]))
        i += n
    pieces.append(stream.close())
    assert tokenizer.decode(before) + "".join(pieces) == tokenizer.decode(ids)


def test_a_byte_that_never_becomes_a_character_spares_the_text_before(tokenizers_of_kinds):
    tokenizer = tokenizers_of_kinds[2]
    stream, ids = TextStream(tokenizer, [97 + 161]), tokenizer.encode("語語").tolist()[1:]
    pieces = [stream.push(ids), stream.push([0xE8]), stream.push([259]), stream.close()]
    assert pieces == ["語語", "", "\ufffdb", ""]
