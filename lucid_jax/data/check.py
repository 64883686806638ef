"""What of the data can be found wrong before anything is compiled."""

from __future__ import annotations

from lucid_jax.config import Config, ConfigError
from lucid_jax.data.arrayrecord import TokensMetadata
from lucid_jax.data.mixture import Split, open_mixture, parse_mixture
from lucid_jax.data.tokenizer import Tokenizer, fingerprint


def check_data(config: Config, tokenizer: Tokenizer, *splits: Split) -> None:
    """Checks that the data of a run is there and fits its model and tokenizer.

    Opens every source of `splits`; by default of `data.train` and, if given, `data.eval`.

    Raises:
      ConfigError: no data of a split, a source that cannot be read or has no
        documents, a vocabulary larger than the model's, or tokens that another
        tokenizer has written.
    """
    data = config.data
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"data.tokenizer={data.tokenizer!r} has {tokenizer.vocab_size} tokens, more than"
            f" model.vocab_size={config.model.vocab_size}"
        )
    for split in splits or (("train", "eval") if data.eval else ("train",)):
        open_mixture(data, split)
        for spec, _ in parse_mixture(getattr(data, split)):
            if spec.kind == "arrayrecord":
                _check_tokenizer(spec.path, data.tokenizer)


def _check_tokenizer(path: str, tokenizer: str) -> None:
    metadata = TokensMetadata.beside(path)
    if metadata.tokenizer_fingerprint != fingerprint(tokenizer):
        raise ConfigError(
            f"the tokens of {path} were written with the tokenizer {metadata.tokenizer!r}"
            f" ({metadata.vocab_size} tokens), which is not data.tokenizer={tokenizer!r}"
        )
