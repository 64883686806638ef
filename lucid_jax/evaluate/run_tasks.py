"""Scores of a checkpoint on benchmark tasks, by length; an interrupted evaluation goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import time
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
from lucid_jax.evaluate.answers import Answers, Question, rows_of_batch
from lucid_jax.evaluate.heat_map import draw_heat_map
from lucid_jax.evaluate.report import GroupReport, summarize, to_markdown
from lucid_jax.evaluate.request import SEED, TaskRequest
from lucid_jax.evaluate.samples_file import Group, Result, SamplesFile
from lucid_jax.evaluate.tasks import Sample, Task
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.parallel.mesh import make_layout
from lucid_jax.runtime.environment import environment
from lucid_jax.runtime.preemption import Preemption
from lucid_jax.runtime.workdir import local_directory, write_json

DIRECTORY = "tasks"
# The fields of a model on which what it answers does not depend.
_FREE = ("implementation", "remat", "init_std")
# Between two lines about progress.
_SECONDS = 10.0


def evaluate_tasks(
    config: Config, workdir: str | os.PathLike, which: str, request: TaskRequest
) -> str:
    """Scores a checkpoint on tasks.

    Every sample is written when its batch is finished, and one that is there is not run again,
    whatever else the evaluation was asked for then. A batch has as many tokens as a
    micro-batch of training, but at least one sample for each device of `data` and `fsdp`.

    Args:
      config: The run.
      workdir: The run's directory. `tasks/` in it gets `samples.jsonl` with what the model
        answered, now or earlier, and, of what is asked for now, `scores.json`, `scores.md`
        and the picture `scores.png`.
      which: As in `restore_model`.
      request: Tasks, lengths and samples.

    Returns:
      A table for the terminal.

    Raises:
      ConfigError: a configuration that does not fit, or of another model than the run in
        `workdir`.
      CheckpointError: no sound checkpoint.
    """
    workdir = local_directory(workdir)
    layout = make_layout(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_vocabulary(config, tokenizer)
    if beyond := [n for n in request.lengths if n > config.data.sequence_length]:
        logging.warning(
            "lengths %s are beyond data.sequence_length=%d, the rows of training",
            ", ".join(map(str, beyond)), config.data.sequence_length,
        )  # fmt: skip
    model = LanguageModel.build(config.model, layout)
    restored = restore_model(config, model, workdir, which)
    directory = workdir / DIRECTORY
    with contextlib.ExitStack() as stack:
        preemption = stack.enter_context(Preemption())
        file = None
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(SamplesFile(directory / "samples.jsonl"))
        evaluation = _Evaluation(config, model, tokenizer, restored, request, file)
        # Decoding has its own copy of the parameters.
        del restored
        finished = evaluation.run(preemption)
        if file is None:
            return ""
        return _write(directory, evaluation, which, finished)


class _Evaluation:
    """Runs what is asked for and not in `file`, which process 0 alone has."""

    def __init__(
        self,
        config: Config,
        model: LanguageModel,
        tokenizer: Tokenizer,
        restored: RestoredModel,
        request: TaskRequest,
        file: SamplesFile | None,
    ):
        self.config, self.request, self.step = config, request, restored.step
        self._layout, self._tokenizer, self._file = model.layout, tokenizer, file
        self._identity = {
            "params": _fingerprint(restored.params),
            "tokenizer": fingerprint(config.data.tokenizer),
            "model": {
                name: value
                for name, value in dataclasses.asdict(config.model).items()
                if name not in _FREE
            },
        }
        self._answers = Answers(model, tokenizer, restored.params)

    def run(self, preemption: Preemption) -> bool:
        """Whether all is done; False after a request to stop."""
        return all(
            self._run_group(task, length, wanted, preemption)
            for task, length, wanted in self.request.groups()
        )

    def reports(self) -> list[GroupReport]:
        """Of every task at every length, from the samples that there are; for process 0."""
        return [self._report(*group) for group in self.request.groups()]

    def _report(self, task: Task, length: int, wanted: int) -> GroupReport:
        assert self._file is not None
        results = self._file.results(self._group(task, length))
        return summarize(
            task, length, [r for i, r in sorted(results.items()) if i < wanted], wanted
        )

    def _group(self, task: Task, length: int) -> Group:
        identity = {**self._identity, "source": self.request.sources.fingerprint(task.source)}
        run = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return Group(run, task.name, length, SEED)

    def _run_group(self, task: Task, length: int, wanted: int, preemption: Preemption) -> bool:
        group = self._group(task, length)
        todo = np.ones(wanted, bool)
        if self._file:
            todo[[i for i in self._file.results(group) if i < wanted]] = False
        # The file of process 0 decides for all.
        left = np.flatnonzero(multihost_utils.broadcast_one_to_all(todo)).tolist()
        if len(left) < wanted:
            logging.info("%s at %d: %d samples are there", task.name, length, wanted - len(left))
        rows = rows_of_batch(self.config, self._layout, length, wanted)
        progress = _Progress(f"{task.name} at {length}", len(left))
        for first in range(0, len(left), rows):
            results = self._run_batch(task, length, left[first : first + rows], rows)
            if self._file:
                self._file.add(group, results)
            progress.add(len(results))
            if preemption.requested(self.step):
                return False
        if self._file:
            report = self._report(task, length, wanted)
            logging.info(
                "%s at %d: %s of %d samples, %d left out",
                task.name, length, report.score, report.samples, report.left_out,
            )  # fmt: skip
        return True

    def _run_batch(
        self, task: Task, length: int, indices: Sequence[int], rows: int
    ) -> list[Result]:
        samples: dict[int, Sample] = {}
        results: list[Result] = []
        for index in indices:
            try:
                samples[index] = task.sample(self._tokenizer, length, SEED, index)
            except ConfigError as error:
                results.append(Result(index, self.step, left_out=str(error)))
        questions = [
            Question(
                encode_prompt(self._tokenizer, sample.prompt), sample.max_new_tokens, sample.stop
            )
            for sample in samples.values()
        ]
        answers = self._answers(questions, rows) if questions else []
        for (index, sample), prediction in zip(samples.items(), answers, strict=True):
            scores = task.score(prediction, sample)
            results.append(
                Result(index, self.step, prediction, sample.answers, scores, dict(sample.meta))
            )
        return results


def _fingerprint(params: Any) -> str:
    """Identifies parameters by their bits, on any mesh and in any directory."""
    leaves = jax.tree.leaves_with_path(params)
    bits = checksums({jax.tree_util.keystr(path): x for path, x in leaves})
    return hashlib.sha256(json.dumps(bits, sort_keys=True).encode()).hexdigest()


class _Progress:
    """Says now and then how far a task at a length is."""

    def __init__(self, what: str, total: int):
        self._what, self._total, self._done = what, total, 0
        self._start = self._said = time.monotonic()

    def add(self, samples: int) -> None:
        """Counts finished samples."""
        self._done += samples
        now = time.monotonic()
        if now - self._said < _SECONDS:
            return
        self._said = now
        rate = self._done / (now - self._start)
        left = datetime.timedelta(seconds=round((self._total - self._done) / rate))
        logging.info(
            "%s: %d/%d samples  %.2f a second  %s left",
            self._what, self._done, self._total, rate, left,
        )  # fmt: skip


def _write(directory: pathlib.Path, evaluation: _Evaluation, which: str, finished: bool) -> str:
    """Writes what there is of the scores; gives a table for the terminal."""
    config, step, reports = evaluation.config, evaluation.step, evaluation.reports()
    values = {
        "step": step,
        "checkpoint": which,
        "environment": environment(),
        "seed": SEED,
        "sources": dataclasses.asdict(evaluation.request.sources),
        "tokenizer": config.data.tokenizer,
        "trained_length": config.data.sequence_length,
        "finished": finished,
        "tasks": [dataclasses.asdict(report) for report in reports],
    }
    write_json(directory / "scores.json", values)
    done = sum(report.samples + report.left_out for report in reports)
    wanted = sum(report.wanted for report in reports)
    title = f"Scores at step {step}"
    if not finished:
        title += f", stopped after {done} of {wanted} samples"
    table = to_markdown(title, reports, config.data.sequence_length)
    (directory / "scores.md").write_text(table, encoding="utf-8")
    draw_heat_map(reports, directory / "scores.png")
    again = "" if finished else "\nthe same command goes on from here"
    return f"{table}\nfiles are in {directory}/{again}"
