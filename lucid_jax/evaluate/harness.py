"""lm-eval on our checkpoints, and our tasks in lm-eval.

Its own command line, with the model that this file registers:

    python -m lucid_jax.evaluate.harness run --model lucid \\
        --model_args checkpoint=runs/lucid_1b --batch_size auto --tasks hellaswag

From Python, where `simple_evaluate` takes our tasks too:

    model = LucidLM("runs/lucid_1b")
    request = TaskRequest.parse(["ruler_vt"], ["2048"], samples=100, sources=[])
    lm_eval.simple_evaluate(model, tasks=native_tasks(request, model.own_tokenizer))

Needs `pip install -e '.[lm-eval]'`. With several processes each runs all requests: they
are one model.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from typing import Any

import datasets
import jax
import tqdm
from absl import logging
from lm_eval import utils
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import normalize_gen_kwargs

from lucid_jax.checkpoint.manager import CheckpointError, restore_params, saved_config
from lucid_jax.config import Config, ConfigError, MeshConfig
from lucid_jax.data import check_vocabulary, load_tokenizer
from lucid_jax.data.tokenizer import Tokenizer, encode_prompt
from lucid_jax.evaluate.answers import Answers, Question, rows_of_batch
from lucid_jax.evaluate.likelihood import Continuation, Likelihood
from lucid_jax.evaluate.request import SEED, TaskRequest
from lucid_jax.evaluate.tasks import Sample, Task
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.parallel.mesh import make_layout


@register_model("lucid")
class LucidLM(TemplateLM):
    """A checkpoint as lm-eval takes a model, in the configuration that it was saved with."""

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        batch_size: int | str = "auto",
        max_length: int | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """Restores the parameters, sharded over all devices.

        Args:
          checkpoint: As in `restore_params`.
          batch_size: Rows of `max_length` tokens at a time, rounded up to what the devices
            divide; shorter requests go in more rows. "auto": as a micro-batch of training.
          max_length: Tokens that the model sees of a request; by default as in training.
          max_batch_size: Not used, nor is `device`: lm-eval gives them to every model.
        """
        super().__init__()
        config = _at_size(Config.from_dict(saved_config(checkpoint)), batch_size, max_length)
        self.own_tokenizer = load_tokenizer(config.data.tokenizer)
        check_vocabulary(config, self.own_tokenizer)
        self._config, self._layout = config, make_layout(config)
        self._model = LanguageModel.build(config.model, self._layout)
        _, self._params, _ = restore_params(checkpoint, self._model.abstract_params)
        self._likelihood = Likelihood(config, self._model, self._params)

    @functools.cached_property
    def _answers(self) -> Answers:
        # Only once something is to be generated: it copies the parameters.
        return Answers(self._model, self.own_tokenizer, self._params)

    @property
    def max_length(self) -> int:
        """Tokens that the model sees of a request."""
        return self._config.data.sequence_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._special(self.own_tokenizer.eos_id, self.own_tokenizer.bos_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text of which every token counts: as in training, if there is one."""
        return self._special(self.own_tokenizer.bos_id, self.own_tokenizer.eos_id)

    def _special(self, *ids: int | None) -> int:
        for token in ids:
            if token is not None:
                return token
        raise ConfigError(
            f"data.tokenizer={self._config.data.tokenizer!r} has no token that begins or ends a"
            " document, which this request needs"
        )

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's path, by which lm-eval tells caches of requests apart."""
        return self._config.data.tokenizer

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The tokens of a text; unless told not to, with that which opens a document."""
        if add_special_tokens is False:
            return self.own_tokenizer.encode(string).tolist()
        return encode_prompt(self.own_tokenizer, string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """See `TemplateLM`; of a context that is too long the end is kept."""
        continuations = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ConfigError(
                    f"a continuation of {len(continuation)} tokens is longer than"
                    f" max_length={self.max_length}"
                )
            tokens = (context + continuation)[-(self.max_length + 1) :]
            continuations.append(Continuation(tokens, len(continuation)))
        self._warn(sum(len(c) + len(t) > self.max_length + 1 for _, c, t in requests))
        with self._progress("log-likelihoods", len(requests), disable_tqdm) as bar:
            results = self._likelihood(continuations, bar.update)
        for (pair, _, _), result in zip(requests, results):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """See `LM`."""
        pieces: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pieces.append((None, *utils.make_disjoint_window(window)))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (likelihood, _) in zip(owners, self._loglikelihood_tokens(pieces, disable_tqdm)):
            sums[i] += likelihood
        for request, value in zip(requests, sums):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `LM`; greedily, and of a prompt that is too long the end is kept."""
        questions = [self._question(*request.args) for request in requests]
        self._warn(sum(cut for _, cut in questions))
        buckets: dict[tuple[int, int], list[int]] = {}
        for i, (question, _) in enumerate(questions):
            length = len(question.prompt) + question.max_new_tokens
            bucket = 1 << (length - 1).bit_length(), question.max_new_tokens
            buckets.setdefault(bucket, []).append(i)
        texts: dict[int, str] = {}
        with self._progress("answers", len(requests), disable_tqdm) as bar:
            # What may not fit in memory comes first.
            for (length, _), members in sorted(buckets.items(), reverse=True):
                rows = rows_of_batch(self._config, self._layout, length, len(members))
                for first in range(0, len(members), rows):
                    batch = members[first : first + rows]
                    texts.update(zip(batch, self._answers([questions[i][0] for i in batch], rows)))
                    bar.update(len(batch))
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[i])
        return [texts[i] for i in range(len(requests))]

    def _question(self, context: str, options: dict[str, Any]) -> tuple[Question, bool]:
        """What is to be generated, and whether its prompt was cut."""
        options = normalize_gen_kwargs(options)
        if options["do_sample"] and options.get("temperature") != 0:
            raise ConfigError(f"LucidLM generates greedily; got {options}")
        new_tokens = options["max_gen_toks"]
        room = self.max_length - new_tokens
        if room <= 0:
            raise ConfigError(
                f"max_gen_toks={new_tokens} leaves no token of max_length={self.max_length} for"
                " the prompt"
            )
        tokens = self.tok_encode(context)
        stop = tuple(text for text in options["until"] if text)
        return Question(tokens[-room:], new_tokens, stop), len(tokens) > room

    def _warn(self, cut: int) -> None:
        if cut:
            logging.warning(
                "%d requests are longer than max_length=%d and lost their beginning",
                cut, self.max_length,
            )  # fmt: skip

    def _progress(self, what: str, total: int, disable: bool) -> tqdm.tqdm:
        return tqdm.tqdm(total=total, desc=what, disable=disable or jax.process_index() > 0)


def _at_size(config: Config, batch_size: int | str, max_length: int | None) -> Config:
    """The configuration on whatever devices there are."""
    rows = config.batch_size // config.accumulation
    if batch_size != "auto":
        if not str(batch_size).isdecimal() or int(batch_size) == 0:
            raise ConfigError(f"batch_size must be auto or a positive integer; got {batch_size!r}")
        rows = int(batch_size)
    devices = jax.device_count()
    data = config.data
    if max_length is not None:
        data = dataclasses.replace(data, sequence_length=int(max_length))
    return dataclasses.replace(
        config,
        mesh=MeshConfig(),
        batch_size=-(-rows // devices) * devices,
        accumulation=1,
        data=dataclasses.replace(data, shards=0),
    )


def native_tasks(request: TaskRequest, tokenizer: Tokenizer) -> list[ConfigurableTask]:
    """Our tasks as lm-eval's `simple_evaluate` takes them, one for each length.

    Their names are those of results and the length: `ruler_vt@2048`. Samples that do not fit
    are left out, with a warning that counts them.

    Raises:
      ConfigError: no sample of a task fits a length.
    """
    return [_native_task(tokenizer, *group) for group in request.groups()]


def _native_task(tokenizer: Tokenizer, task: Task, length: int, wanted: int) -> ConfigurableTask:
    samples: list[Sample] = []
    reasons = []
    for index in range(wanted):
        try:
            samples.append(task.sample(tokenizer, length, SEED, index))
        except ConfigError as error:
            reasons.append(error)
    if not samples:
        raise reasons[0]
    if reasons:
        logging.warning("left out %d of %d samples, the first because %s", len(reasons), wanted,
                        reasons[0])  # fmt: skip
    rows = [
        {"index": i, "prompt": sample.prompt, "answers": list(sample.answers)}
        for i, sample in enumerate(samples)
    ]

    def aggregate(name: str, scores: Sequence[dict[str, float]]) -> float:
        return task.aggregate(scores)[name]

    # lm-eval aggregates metric by metric; a task makes some of several scores.
    names = list(task.aggregate([task.score("", samples[0])]))
    return ConfigurableTask(
        config={
            "task": f"{task.name}@{length}",
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": lambda row: row["prompt"],
            "doc_to_target": lambda row: row["answers"],
            "generation_kwargs": {
                "until": list(samples[0].stop),
                "max_gen_toks": max(sample.max_new_tokens for sample in samples),
                "do_sample": False,
            },
            "process_results": lambda row, results: dict.fromkeys(
                names, task.score(results[0], samples[row["index"]])
            ),
            "metric_list": [
                {
                    "metric": name,
                    "aggregation": functools.partial(aggregate, name),
                    "higher_is_better": True,
                }
                for name in names
            ],
            "metadata": {"version": 1.0},
        }
    )


def main() -> None:
    """lm-eval's command line."""
    try:
        cli_evaluate()
    except (ConfigError, CheckpointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
