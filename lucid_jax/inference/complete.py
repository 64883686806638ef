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
    *,
    num_samples: int = 1,
    echo: str = "",
) -> None:
    """Writes completions of a prompt: the first piece by piece, as it is generated.

    The prompt is the beginning of a document, as in training. Prompt and completion together
    may have `data.sequence_length` tokens.

    Args:
      which: The checkpoint, as in `restore_model`.
      max_new_tokens: The most tokens to generate; fewer if the document ends before.
      write: Called with each piece of text.
      num_samples: The number of completions. They differ only by their random numbers, and the
        first few are those of any larger number.
      echo: Written before each completion.

    Raises:
      ConfigError: an empty prompt or one that is too long, several samples at temperature 0, or
        a configuration that does not fit.
      CheckpointError: there is no sound checkpoint.
    """
    if not prompt:
        raise ConfigError("the prompt is empty: give --prompt, --prompt_file or standard input")
    if num_samples > 1 and sampling.temperature == 0:
        raise ConfigError(
            f"--num_samples={num_samples} needs a temperature above 0: at 0 all are alike"
        )
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

    def start(i: int) -> None:
        heading = f"--- sample {i + 1} of {num_samples} ---\n" if num_samples > 1 else ""
        write(("\n" if i else "") + heading + echo)

    def write_new(i: int, ids: list[int]) -> bool:
        nonlocal written
        if i == 0:
            write(stream.push(ids[written:]))
            written = len(ids)
        return False

    start(0)
    first, *others = generator([tokens] * num_samples, max_new_tokens, write_new)
    write_new(0, first)
    write(stream.close())
    for i, ids in enumerate(others, 1):
        start(i)
        stream = TextStream(tokenizer, tokens)
        write(stream.push(ids) + stream.close())
