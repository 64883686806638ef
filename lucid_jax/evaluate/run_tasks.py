"""Scores a checkpoint on benchmark tasks by length; an interrupted evaluation can be resumed."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from lucid_jax.checkpoint.checksum import checksums
from lucid_jax.checkpoint.restore import RestoredModel, restore_model
from lucid_jax.config import Config, ConfigError
from lucid_jax.data import check_vocabulary, load_tokenizer
from lucid_jax.data.tokenizer import Tokenizer, encode_prompt, fingerprint
from lucid_jax.evaluate.batching import batch_size_for
from lucid_jax.evaluate.report import GroupReport, summarize
from lucid_jax.evaluate.request import SEED, TaskRequest
from lucid_jax.evaluate.samples_file import Group, Result, SamplesFile
from lucid_jax.evaluate.score_files import write_scores
from lucid_jax.evaluate.tasks import Sample, Task
from lucid_jax.evaluate.text_generator import GenerationRequest, TextGenerator
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.parallel.mesh import make_layout
from lucid_jax.runtime.environment import environment
from lucid_jax.runtime.lock import locked
from lucid_jax.runtime.preemption import Preemption, Stopped
from lucid_jax.runtime.progress import Progress
from lucid_jax.runtime.workdir import local_directory

DIRECTORY = "tasks"
# Fields of `config.model` that do not change the model's answers.
_IGNORED_FIELDS = ("implementation", "remat", "init_std")
# Fields that earlier versions lacked, with the value that their models have.
_LATER_FIELDS = {"attention_bias": False, "qk_norm": "none", "positions": "rope"}


def evaluate_tasks(
    config: Config, workdir: str | os.PathLike, which: str, request: TaskRequest
) -> str:
    """Scores a checkpoint on tasks.

    Every sample is saved when its batch is finished, and saved samples are not run again, also
    if they were part of another request. A batch holds as many tokens as a micro-batch of
    training, but at least one sample for each device of `data` and `fsdp`.

    Args:
      workdir: The run's directory. Its `tasks/` gets `samples.jsonl`, with the samples of all
        requests so far, and `scores.json`, `scores.md` and the picture `scores.png`, with the
        scores of all requests for this checkpoint.
      which: The checkpoint, as in `restore_model`.

    Returns:
      A table for the terminal; "" on processes other than the first.

    Raises:
      ConfigError: the configuration does not fit, or the run in `workdir` is of another model.
      CheckpointError: there is no sound checkpoint.
      Stopped: it was asked to stop; the message is the table.
    """
    workdir = local_directory(workdir)
    layout = make_layout(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_vocabulary(config, tokenizer)
    if longer := [n for n in request.lengths if n > config.data.sequence_length]:
        logging.warning(
            "lengths %s are longer than the sequences of training: data.sequence_length=%d",
            ", ".join(map(str, longer)), config.data.sequence_length,
        )  # fmt: skip
    model = LanguageModel.build(config.model, layout)
    restored = restore_model(config, model, workdir, which)
    directory = workdir / DIRECTORY
    with contextlib.ExitStack() as stack:
        preemption = stack.enter_context(Preemption())
        stack.enter_context(locked(directory))
        file = None
        if jax.process_index() == 0:
            file = stack.enter_context(SamplesFile(directory / "samples.jsonl"))
        evaluation = _Evaluation(config, model, tokenizer, restored, request, file)
        # The generator has its own copy of the parameters.
        del restored
        finished = evaluation.run(preemption)
        name = which if "/" in which else workdir.resolve().name
        table = evaluation.write_reports(directory, name, which, finished) if file else ""
        if not finished:
            raise Stopped(table)
        return table


class _Evaluation:
    """Runs the samples of a request that are not in `file`, which only process 0 has."""

    def __init__(
        self,
        config: Config,
        model: LanguageModel,
        tokenizer: Tokenizer,
        restored: RestoredModel,
        request: TaskRequest,
        file: SamplesFile | None,
    ):
        self._config, self._layout, self._tokenizer = config, model.layout, tokenizer
        self._step, self._request, self._file = restored.step, request, file
        self._identity = {
            "params": _fingerprint(restored.params),
            "tokenizer": fingerprint(config.data.tokenizer),
            "model": {
                name: value
                for name, value in dataclasses.asdict(config.model).items()
                if name not in _IGNORED_FIELDS and value != _LATER_FIELDS.get(name)
            },
        }
        self._generate = TextGenerator(model, tokenizer, restored.params)

    def run(self, preemption: Preemption) -> bool:
        """Runs all samples; returns False if it was preempted."""
        return all(
            self._run_group(task, length, num_samples, preemption)
            for task, length, num_samples in self._request.groups()
        )

    def write_reports(self, directory: pathlib.Path, name: str, which: str, finished: bool) -> str:
        """Writes the scores so far; returns a table for the terminal. Only for process 0.

        The title has the run's `name` and its checkpoint.
        """
        reports = [self._report(*group) for group in self._request.groups()]
        trained_length = self._config.data.sequence_length
        values = {
            "step": self._step,
            "checkpoint": which,
            "model": _sha256(self._identity)[:16],
            "environment": environment(),
            "seed": SEED,
            "sources": dataclasses.asdict(self._request.sources),
            "tokenizer": self._config.data.tokenizer,
            "trained_length": trained_length,
            "finished": finished,
        }
        title = f"Scores of {name} at step {self._step}"
        if not finished:
            done = sum(report.samples + report.left_out for report in reports)
            title += f", stopped after {done} of {sum(report.wanted for report in reports)} samples"
        table = write_scores(directory, title, values, reports, trained_length)
        hint = "" if finished else "\nrun the same command again to continue"
        return f"{table}\nfiles are in {directory}/{hint}"

    def _report(self, task: Task, length: int, num_samples: int) -> GroupReport:
        assert self._file is not None
        results = sorted(self._file.results(self._group(task, length)).items())
        return summarize(
            task, length, [result for i, result in results if i < num_samples], num_samples
        )

    def _group(self, task: Task, length: int) -> Group:
        identity = {**self._identity, "source": self._request.sources.fingerprint(task.source)}
        return Group(_sha256(identity)[:16], task.name, length, SEED)

    def _run_group(self, task: Task, length: int, num_samples: int, preemption: Preemption) -> bool:
        group = self._group(task, length)
        missing = np.ones(num_samples, bool)
        if self._file:
            missing[[i for i in self._file.results(group) if i < num_samples]] = False
        # Only process 0 has the file, so it decides for all.
        indices = np.flatnonzero(multihost_utils.broadcast_one_to_all(missing)).tolist()
        if len(indices) < num_samples:
            saved = num_samples - len(indices)
            logging.info("%s at %d: %d samples are saved already", task.name, length, saved)
        batch_size = batch_size_for(self._config, self._layout, length, num_samples)
        progress = Progress(f"{task.name} at {length}", len(indices), "samples", logging.info)
        for start in range(0, len(indices), batch_size):
            results = self._run_batch(task, length, indices[start : start + batch_size], batch_size)
            if self._file:
                self._file.add(group, results)
            progress.add(len(results))
            if preemption.requested(self._step):
                return False
        if self._file:
            report = self._report(task, length, num_samples)
            logging.info(
                "%s at %d: %s from %d samples, %d left out",
                task.name, length, report.score, report.samples, report.left_out,
            )  # fmt: skip
        return True

    def _run_batch(
        self, task: Task, length: int, indices: Sequence[int], batch_size: int
    ) -> list[Result]:
        samples: dict[int, Sample] = {}
        results: list[Result] = []
        for index in indices:
            try:
                samples[index] = task.sample(self._tokenizer, length, SEED, index)
            except ConfigError as error:
                results.append(Result(index, self._step, left_out=str(error)))
        requests = [
            GenerationRequest(
                encode_prompt(self._tokenizer, sample.prompt), sample.max_new_tokens, sample.stop
            )
            for sample in samples.values()
        ]
        predictions = self._generate(requests, batch_size) if requests else []
        for (index, sample), prediction in zip(samples.items(), predictions, strict=True):
            scores = task.score(prediction, sample)
            results.append(
                Result(index, self._step, prediction, sample.answers, scores, dict(sample.meta))
            )
        return results


def _fingerprint(params: Any) -> str:
    """Identifies parameters by their bits, on any mesh and in any directory."""
    leaves = jax.tree.leaves_with_path(params)
    return _sha256(checksums({jax.tree_util.keystr(path): x for path, x in leaves}))


def _sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
