"""Completes a text prompt with a checkpoint of a run."""

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
    """Writes the completion of a prompt piece by piece, as it is generated.

    The prompt is the beginning of a document, as in training. Prompt and completion together
    may have `data.sequence_length` tokens.

    Args:
      which: The checkpoint, as in `restore_model`.
      max_new_tokens: The most tokens to generate; fewer if the document ends before.
      write: Called with each piece of text.

    Raises:
      ConfigError: an empty prompt or one that is too long, or a configuration that does not fit.
      CheckpointError: there is no sound checkpoint.
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
            f" the run's sequences have: --config.data.sequence_length={longest}"
        )
    model = LanguageModel.build(config.model, make_layout(config))
    generator = Generator(
        model,
        restore_model(config, model, workdir, which).params,
        end_ids=tokenizer.special.ends,
        sampling=sampling,
    )
    stream, written = TextStream(tokenizer, tokens), 0

    def write_new(_: int, ids: list[int]) -> bool:
        nonlocal written
        write(stream.push(ids[written:]))
        written = len(ids)
        return False

    [ids] = generator([tokens], max_new_tokens, write_new)
    write_new(0, ids)
    write(stream.close())
