"""Text that continues a prompt, from the checkpoint of a run."""

from __future__ import annotations

import os
from collections.abc import Callable

from lucid_jax.checkpoint.restore import restore_model
from lucid_jax.config import Config, ConfigError
from lucid_jax.data import check_vocabulary, load_tokenizer
from lucid_jax.data.text_stream import TextStream
from lucid_jax.data.tokenizer import encode_prompt
from lucid_jax.inference.generator import Generator
from lucid_jax.inference.sampling import Sampling
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.parallel.mesh import make_layout


def complete(
    config: Config,
    workdir: str | os.PathLike,
    which: str,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    write: Callable[[str], object],
) -> None:
    """Writes the completion of a prompt, piece by piece as it comes.

    The prompt stands at the beginning of a document, as in training. Prompt and completion may
    be as long together as the rows of the run.

    Args:
      config: The run.
      workdir: The run's directory.
      which: The checkpoint, as in `restore_model`.
      prompt: Text, not empty.
      max_new_tokens: At most so many, fewer where the document ends.
      sampling: How tokens are chosen.
      write: Takes each piece.

    Raises:
      ConfigError: an empty prompt or one that is too long, or a configuration that does not fit.
      CheckpointError: no sound checkpoint.
    """
    if not prompt:
        raise ConfigError("the prompt is empty: give --prompt, --prompt_file or standard input")
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_vocabulary(config, tokenizer)
    tokens = encode_prompt(tokenizer, prompt)
    longest = config.data.sequence_length
    if len(tokens) + max_new_tokens > longest:
        raise ConfigError(
            f"a prompt of {len(tokens)} tokens and --max_new_tokens={max_new_tokens} are more than"
            f" the rows of the run have: --config.data.sequence_length={longest}"
        )
    model = LanguageModel.build(config.model, make_layout(config))
    generator = Generator(
        model,
        restore_model(config, model, workdir, which).params,
        end_ids=[] if tokenizer.eos_id is None else [tokenizer.eos_id],
        sampling=sampling,
    )
    stream, given = TextStream(tokenizer, tokens), 0

    def show(_: int, ids: list[int]) -> bool:
        nonlocal given
        write(stream.push(ids[given:]))
        given = len(ids)
        return False

    [ids] = generator([tokens], max_new_tokens, show)
    show(0, ids)
    write(stream.close())
