"""Checks of a run's data that need no compilation."""

import itertools

from lucid_jax.config import Config, ConfigError, DataConfig
from lucid_jax.data.arrayrecord import ENDING, TokensMetadata
from lucid_jax.data.bad_lines import BadLines
from lucid_jax.data.files import find_files
from lucid_jax.data.mixture import Component, Split, open_mixture
from lucid_jax.data.pipeline import MIN_TOKENS
from lucid_jax.data.tokenizer import Tokenizer, encode_document, fingerprint


def check_data(
    config: Config, tokenizer: Tokenizer, *splits: Split
) -> dict[Split, list[Component]]:
    """Checks that the data of a run exists and fits its model and tokenizer.

    Opens and returns every source of `splits`; the default is `data.train` and, if it is set,
    `data.eval`.

    Raises:
      ConfigError: a split is empty, a source cannot be read or has no documents, the tokenizer
        has more tokens than the model, a source was tokenised with another tokenizer, or a
        source has no token to predict.
    """
    check_vocabulary(config, tokenizer)
    data = config.data
    splits = splits or (("train", "eval") if data.eval else ("train",))
    mixtures = {split: open_mixture(data, split) for split in splits}
    for component in itertools.chain(*mixtures.values()):
        if component.spec.kind == "arrayrecord":
            _check_tokenizer(component.spec.path, data.tokenizer)
        _check_targets(component, tokenizer, data)
    return mixtures


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    """Raises ConfigError if the tokenizer has more tokens than the model."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer!r} has {tokenizer.vocab_size} tokens, more than"
            f" model.vocab_size={config.model.vocab_size}"
        )


def _check_tokenizer(path: str, tokenizer: str) -> None:
    # Any of the folders will do, because opening the source has checked that they agree.
    metadata = TokensMetadata.read(find_files(path, ENDING)[0].parent)
    if metadata.tokenizer_fingerprint != fingerprint(tokenizer):
        raise ConfigError(
            f"the tokens of {path} were written with the tokenizer {metadata.tokenizer!r}"
            f" ({metadata.vocab_size} tokens), which is not data.tokenizer={tokenizer!r}"
        )


def _check_targets(component: Component, tokenizer: Tokenizer, data: DataConfig) -> None:
    # The first document nearly always suffices; a source without targets is read to its end.
    size = len(component.source)
    bad_lines = BadLines(component.spec.name, data.on_bad_line)
    documents = (bad_lines.read(component.source, index) for index in range(size))
    tokens = (encode_document(tokenizer, x) for x in documents if x is not None)
    # With other packings, the rest of a long document becomes another sequence.
    longest = data.sequence_length + 1 if data.packing == "document" else None
    if not any((ids[1:longest] >= 0).any() for ids in tokens):
        within = "" if longest is None else f" within the first {longest}"
        raise ConfigError(
            f"none of the {size} documents of {component.spec.name} has the {MIN_TOKENS} tokens"
            f" that predicting one takes{within}"
        )
