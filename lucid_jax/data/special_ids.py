"""The special tokens of a tokenizer, as the files of transformers beside it name them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from lucid_jax.config import ConfigError

# Without such files, the first of these names in the vocabulary is taken.
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[CLS]")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[SEP]")


class SpecialIds(NamedTuple):
    """The ids of special tokens; None and empty where there is none.

    Attributes:
      bos: The token that begins a document.
      eos: The token that ends a document.
      ends: All tokens that end a completion; `eos` is the first.
      pad: The token that fills up a batch, which only exports need.
    """

    bos: int | None
    eos: int | None
    ends: tuple[int, ...]
    pad: int | None

    @classmethod
    def read(cls, directory: Path, find: Callable[[str], int | None]) -> Self:
        """Reads the files of a directory.

        The first end of a document is that of `config.json`, then come `generation_config.json`,
        `tokenizer_config.json` and well-known names. A beginning that `tokenizer_config.json`
        calls null, or that it says is not added (`add_bos_token`), is none, whatever the others
        say. `find` maps the text of a token to its id. A file that is not JSON raises ConfigError.
        """
        config, generation, names = (
            _read(directory / name)
            for name in ("config.json", "generation_config.json", "tokenizer_config.json")
        )
        if "model_type" not in config:
            config = {}  # A run's own configuration.

        def named(key: str) -> list[int]:
            value = names.get(key)
            token = find(value["content"] if isinstance(value, dict) else value) if value else None
            return [] if token is None else [token]

        def ids(key: str, well_known: tuple[str, ...]) -> list[int]:
            found = [*_ids(config, f"{key}_id"), *_ids(generation, f"{key}_id"), *named(key)]
            if not found and key not in names:
                found = [i for name in well_known if (i := find(name)) is not None][:1]
            return list(dict.fromkeys(found))

        not_added = names.get("add_bos_token") is False
        no_bos = not_added or ("bos_token" in names and not names["bos_token"])
        bos = [] if no_bos else ids("bos_token", _BOS_NAMES)
        ends, pad = ids("eos_token", _EOS_NAMES), ids("pad_token", ())
        first_bos, eos, first_pad = (x[0] if x else None for x in (bos, ends, pad))
        return cls(first_bos, eos, tuple(ends), first_pad)

    def to_json(self) -> dict[str, Any]:
        """Returns the entries of `config.json` and `generation_config.json`."""
        ends: Any = list(self.ends) if len(self.ends) > 1 else self.eos
        pad = {} if self.pad is None else {"pad_token_id": self.pad}
        return {"bos_token_id": self.bos, "eos_token_id": ends, **pad}


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    return values if isinstance(values, dict) else {}


def _ids(values: Mapping[str, Any], key: str) -> list[int]:
    value = values.get(key)
    return [x for x in (value if isinstance(value, list) else [value]) if type(x) is int and x >= 0]
