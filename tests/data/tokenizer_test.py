"""Tokenizers: round trips, special tokens, and settings in a file that must be ignored."""

import numpy as np
import pytest
import sentencepiece
import tokenizers
import toy

from lucid_jax.config import ConfigError
from lucid_jax.data.documents import Completion
from lucid_jax.data.tokenizer import encode_document, encode_prompt, fingerprint, load_tokenizer

_LINES = [f"the solve of block {i} waits for block {i - 1}, never for ünïcode" for i in range(200)]


def test_a_completion_follows_the_tokens_that_the_model_is_prompted_with(spec):
    tokenizer = load_tokenizer(spec)
    # In the second, tokens of the whole text would span the end of the prompt.
    for prompt, completion in (("the solve of block", " 7 waits"), ("the sol", "ve of block 7")):
        ids = encode_document(tokenizer, Completion(prompt, completion))
        n = len(encode_prompt(tokenizer, prompt))
        assert (~ids[:n]).tolist() == encode_prompt(tokenizer, prompt)
        assert (ids[n:] >= 0).all()
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.decode(ids[n:-1]).strip() == completion.strip()
    [first] = encode_document(tokenizer, Completion("the solve", " of"))[-2:-1]
    assert first == encode_document(tokenizer, "the solve of")[-2]


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    special_tokens = ("<unk>", "<|begin_of_text|>", "<|end_of_text|>")
    toy.train_bpe(path, _LINES, vocab_size=320, special_tokens=special_tokens)
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    # Many published files set these.
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_LINES),
        model_prefix=str(folder / "sp"),
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    # Published files do not always end in ".model".
    return (folder / "sp.model").rename(folder / "tokenizer.model.v1")


@pytest.fixture(params=["bytes", "bpe", "sentencepiece"])
def spec(request):
    if request.param == "bytes":
        return "bytes"
    return str(request.getfixturevalue(f"{request.param}_file"))


def test_round_trip(spec):
    tokenizer = load_tokenizer(spec)
    text = _LINES[7] + " 🜁"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert len(ids) > 4
    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text


def test_documents_begin_and_end_with_special_tokens(spec):
    tokenizer = load_tokenizer(spec)
    text = "never <s> </s> <|end_of_text|>"
    document = encode_document(tokenizer, text)
    assert document.dtype == np.int32
    assert document[0] == tokenizer.bos_id
    assert document[-1] == tokenizer.eos_id
    # Names of special tokens within a document are text.
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(document[1:-1].tolist())
    assert tokenizer.decode(document) == text
    assert len(encode_document(tokenizer, "")) == 2


def test_decode_skips_ids_beyond_the_vocabulary(spec):
    tokenizer = load_tokenizer(spec)
    padded = np.append(tokenizer.encode("block"), [tokenizer.vocab_size, 100_000])
    assert tokenizer.decode(padded) == "block"


def test_byte_ids():
    tokenizer = load_tokenizer("bytes")
    assert encode_document(tokenizer, "aé").tolist() == [256, 97, 0xC3, 0xA9, 257]
    assert tokenizer.vocab_size == 258
    assert tokenizer.decode([0xC3, 97]) == "\ufffda"


def test_a_tokenizer_without_special_tokens(write_words):
    tokenizer = load_tokenizer(write_words({"a": 0, "b": 5, "<unk>": 2}))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    # The largest id decides, not the number of words.
    assert tokenizer.vocab_size == 6
    assert encode_document(tokenizer, "b").tolist() == [5]


def test_fingerprints_depend_on_the_content_only(bpe_file, sentencepiece_file, tmp_path):
    copy = tmp_path / "copy.json"
    copy.write_bytes(bpe_file.read_bytes())
    assert fingerprint(str(bpe_file)) == fingerprint(str(copy))
    assert len({fingerprint(str(x)) for x in ("bytes", bpe_file, sentencepiece_file)}) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.json", "is not a file"),
        ("byte", "is not a file"),
        ("broken.json", "not a tokenizers file"),
        ("broken.model", "not a SentencePiece model"),
    ],
)
def test_errors(tmp_path, name, message):
    for broken in ("broken.json", "broken.model"):
        (tmp_path / broken).write_text("{}")
    with pytest.raises(ConfigError, match=message) as error:
        load_tokenizer(str(tmp_path / name))
    assert name in str(error.value)


def test_special_tokens_are_found_as_they_are_written(bpe_file):
    tokenizer = load_tokenizer(str(bpe_file))
    assert tokenizer.special_id("<|end_of_text|>") == tokenizer.eos_id
    assert tokenizer.special_id("the") is None
    assert load_tokenizer("bytes").special_id("<s>") is None
