"""What of the data can be found wrong before anything is compiled."""

from __future__ import annotations

from lucid_jax.config import Config, ConfigError
from lucid_jax.data.arrayrecord import ENDING, TokensMetadata
from lucid_jax.data.files import find_files
from lucid_jax.data.mixture import Split, open_mixture, parse_mixture
from lucid_jax.data.pipeline import MIN_TOKENS, to_tokens
from lucid_jax.data.sources import Source, SourceSpec
from lucid_jax.data.tokenizer import Tokenizer, fingerprint


def check_data(config: Config, tokenizer: Tokenizer, *splits: Split) -> None:
    """Checks that the data of a run is there and fits its model and tokenizer.

    Opens every source of `splits`; by default of `data.train` and, if given, `data.eval`.

    Raises:
      ConfigError: no data of a split, a source that cannot be read or has no
        documents, a vocabulary larger than the model's, tokens that another
        tokenizer has written, or a source without a token to predict.
    """
    check_vocabulary(config, tokenizer)
    data = config.data
    for split in splits or (("train", "eval") if data.eval else ("train",)):
        mixture = open_mixture(data, split)
        for (source, _), (spec, _) in zip(mixture, parse_mixture(getattr(data, split))):
            if spec.kind == "arrayrecord":
                _check_tokenizer(spec.path, data.tokenizer)
            _check_tokens(source, spec, tokenizer)


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    """Raises ConfigError if the tokenizer has more tokens than the model."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer!r} has {tokenizer.vocab_size} tokens, more than"
            f" model.vocab_size={config.model.vocab_size}"
        )


def _check_tokenizer(path: str, tokenizer: str) -> None:
    # Any folder will do: a source that could be opened has one tokenizer.
    metadata = TokensMetadata.read(find_files(path, ENDING)[0].parent)
    if metadata.tokenizer_fingerprint != fingerprint(tokenizer):
        raise ConfigError(
            f"the tokens of {path} were written with the tokenizer {metadata.tokenizer!r}"
            f" ({metadata.vocab_size} tokens), which is not data.tokenizer={tokenizer!r}"
        )


def _check_tokens(source: Source, spec: SourceSpec, tokenizer: Tokenizer) -> None:
    # The first document decides nearly always; only a source of none is read to its end.
    documents = (source[index] for index in range(len(source)))
    if all(len(to_tokens(tokenizer, document)) < MIN_TOKENS for document in documents):
        raise ConfigError(
            f"none of the {len(source)} documents of {spec.path or spec.kind} has the"
            f" {MIN_TOKENS} tokens that predicting one takes"
        )
