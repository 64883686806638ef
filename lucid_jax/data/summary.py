"""Says what the sources of a run hold, and what about them looks like a mistake."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from lucid_jax.config import DataConfig
from lucid_jax.data.arrayrecord import METADATA_FILE, TokensMetadata
from lucid_jax.data.bad_lines import BadLines
from lucid_jax.data.documents import Completion, Document, Selection
from lucid_jax.data.files import find_files
from lucid_jax.data.mixture import Component, Split
from lucid_jax.data.tokenizer import Tokenizer


def log_data(
    config: DataConfig, tokenizer: Tokenizer, mixtures: Mapping[Split, Sequence[Component]]
) -> None:
    """Logs a line a source, as `check_data` opened it, and a warning for each likely mistake.

    These are training files in `data.eval`, a tokenizer without document ends, and a source of
    empty documents alone.
    """
    for split, mixture in mixtures.items():
        weights = sum(component.weight for component in mixture)
        for component in mixture:
            logging.info("data.%s: %s", split, _describe(split, component, weights))
    for warning in _warnings(config, tokenizer, mixtures):
        logging.warning("%s", warning)


def _describe(split: Split, component: Component, weights: float) -> str:
    spec, source = component.spec, component.source
    files = spec.files()
    whole = source.source if isinstance(source, Selection) else source
    is_tokenised = spec.kind == "arrayrecord"
    size = (is_tokenised and _tokens(files, len(whole))) or _bytes(files)
    name = f"{spec.path} ({spec.kind})" if spec.path else spec.kind
    text = f"{name}, {_count(len(files), 'file')}, {size}"
    text += f", {_count(len(whole), 'document')}"
    if whole is not source:
        held_out = len(whole) - len(source) if split == "train" else len(source)
        text += f", {held_out:,} of them held out"
    if split == "train":
        # An evaluation reads every document once, whatever the weight of its source.
        text += f", {component.weight / weights:.1%} of the mixture"
    if left_out := _left_out(spec.path, files):
        text += f"; {_count(left_out, 'other file')} below it not read"
    return text


def _left_out(path: str, files: Sequence[Path]) -> int:
    """Returns how many visible files below a folder are not among `files`."""
    if not Path(path).is_dir() or not path:
        return 0
    return sum(file.name != METADATA_FILE for file in {*find_files(path)} - {*files})


def _tokens(files: Sequence[Path], documents: int) -> str:
    """Returns the number of tokens in the files if they are tokenised and none is left out."""
    folders = {file.parent for file in files if (file.parent / METADATA_FILE).exists()}
    found = [TokensMetadata.read(folder) for folder in folders]
    whole = sum(metadata.documents for metadata in found) == documents
    return f"{sum(metadata.tokens for metadata in found):,} tokens" if found and whole else ""


def _bytes(files: Sequence[Path]) -> str:
    size = float(sum(file.stat().st_size for file in files))
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _warnings(
    config: DataConfig, tokenizer: Tokenizer, mixtures: Mapping[Split, Sequence[Component]]
) -> Iterator[str]:
    train, evaluated = mixtures.get("train", ()), mixtures.get("eval", ())
    read = {file.resolve() for x in train for file in x.spec.files()} if evaluated else set()
    divided = {component.spec for component in train} if config.holdout else set()
    for spec in (component.spec for component in evaluated if component.spec not in divided):
        if shared := read & {file.resolve() for file in spec.files()}:
            hint = "" if config.holdout else "; data.holdout keeps documents out of training"
            yield (
                f"data.eval reads what data.train trains on: {_count(len(shared), 'file')} of"
                f" {spec.name}, such as {min(shared)}{hint}"
            )
    if tokenizer.eos_id is None:
        yield (
            f"data.tokenizer={config.tokenizer!r} has no token that ends a document: the model"
            " cannot learn where one ends"
        )
    for component in {x.spec: x for mixture in mixtures.values() for x in mixture}.values():
        source, bad_lines = component.source, BadLines(component.spec.name, config.on_bad_line)
        # The first document nearly always suffices.
        documents = (bad_lines.read(source, index) for index in range(len(source)))
        if all(document is None or _is_empty(tokenizer, document) for document in documents):
            yield f"all {len(source):,} documents of {component.spec.name} are empty"


def _is_empty(tokenizer: Tokenizer, document: Document) -> bool:
    if isinstance(document, np.ndarray):
        special = [x for x in (tokenizer.bos_id, tokenizer.eos_id) if x is not None]
        return bool(np.isin(document, special).all())
    text = document.completion if isinstance(document, Completion) else document
    return not text.strip()
