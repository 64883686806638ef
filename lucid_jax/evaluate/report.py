"""Scores of samples as a table: means with intervals, and what was left out or cut."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

from lucid_jax.evaluate.samples_file import Result
from lucid_jax.evaluate.tasks import Task
from lucid_jax.evaluate.tasks.texts import PROSE

# Of the normal distribution, for an interval of 95%.
_Z = 1.959964


@dataclasses.dataclass(frozen=True)
class Score:
    """A score over samples, and the ends of its 95% interval; all in [0, 1]."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclasses.dataclass(frozen=True)
class GroupReport:
    """A task at a length.

    Attributes:
      task: its name, with `[prose]` where text of our own stands in.
      length: in tokens, prompt and answer.
      metric: which of the scores the benchmark publishes.
      scores: by name; empty while there is no sample.
      samples: how many were scored, of how many `wanted`.
      left_out: how many of the others do not fit, and `reason`, the first one's.
      truncated_samples: prompts that were cut to fit, and the tokens that they lost.
    """

    task: str
    length: int
    metric: str
    scores: dict[str, Score]
    samples: int
    wanted: int
    left_out: int
    reason: str
    truncated_samples: int
    truncated_tokens: int

    @property
    def score(self) -> Score | None:
        """That which the benchmark publishes, None while there is no sample."""
        return self.scores.get(self.metric)


def wilson_interval(mean: float, samples: int) -> tuple[float, float]:
    """Wilson's 95% interval of a mean of samples in [0, 1].

    It is made for samples of 0 and 1. Of samples between them the variance is smaller at the
    same mean, so that theirs is wider than it need be. Unlike that of a normal
    distribution or of a bootstrap it is right, or wide, for few samples and where all are alike.
    """
    shrink = 1 / (1 + _Z**2 / samples)
    center = shrink * (mean + _Z**2 / (2 * samples))
    half = shrink * _Z * math.sqrt(mean * (1 - mean) / samples + (_Z / (2 * samples)) ** 2)
    # At 0 and 1 an end is the mean itself, but for rounding.
    return min(max(center - half, 0.0), mean), max(min(center + half, 1.0), mean)


def summarize(task: Task, length: int, results: Collection[Result], wanted: int) -> GroupReport:
    """The report of a task at a length from those of its samples that are finished."""
    scored = [result for result in results if not result.left_out]
    reasons = [result.left_out for result in results if result.left_out]
    cut = [lost for result in scored if (lost := result.meta.get("truncated_tokens", 0))]
    return GroupReport(
        task=task.name,
        length=length,
        metric=task.metric,
        scores=_score(task, scored) if scored else {},
        samples=len(scored),
        wanted=wanted,
        left_out=len(reasons),
        reason=reasons[0] if reasons else "",
        truncated_samples=len(cut),
        truncated_tokens=sum(cut),
    )


def _score(task: Task, results: Sequence[Result]) -> dict[str, Score]:
    columns = {name: [r.scores[name] for r in results] for name in results[0].scores}
    ends = {
        name: wilson_interval(sum(column) / len(column), len(column))
        for name, column in columns.items()
    }
    # What a task makes of several means grows with each of them, and so do its ends.
    means = task.aggregate([result.scores for result in results])
    lows, highs = (task.aggregate([{name: end[i] for name, end in ends.items()}]) for i in (0, 1))
    return {name: Score(means[name], lows[name], highs[name]) for name in means}


def to_markdown(title: str, reports: Sequence[GroupReport], trained_length: int) -> str:
    """A table of the published scores, task by length, then every score with its counts."""
    tasks = list(dict.fromkeys(report.task for report in reports))
    lengths = sorted({report.length for report in reports})
    at = {(report.task, report.length): report for report in reports}
    lines = [f"# {title}", "", "Percent, with 95% intervals (Wilson's).", ""]
    lines += _table(
        ["task", "metric", *map(str, lengths)],
        [
            [task, at[task, lengths[0]].metric, *(_cell(at[task, n].score) for n in lengths)]
            for task in tasks
        ],
    )
    lines += _notes(reports, trained_length)
    header = ["task", "length", "score", "samples", "left out", "cut prompts", "cut tokens"]
    lines += ["", *_table(header, [_details(report) for report in reports]), ""]
    return "\n".join(lines)


def _cell(score: Score | None) -> str:
    return str(score) if score else "–"


def _details(report: GroupReport) -> list[str]:
    scores = "; ".join(f"{name} {score}" for name, score in report.scores.items())
    return [
        report.task,
        str(report.length),
        scores or "–",
        f"{report.samples} of {report.wanted}",
        str(report.left_out),
        str(report.truncated_samples),
        str(report.truncated_tokens),
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _notes(reports: Sequence[GroupReport], trained_length: int) -> list[str]:
    notes = []
    if beyond := sorted({r.length for r in reports if r.length > trained_length}):
        notes.append(
            f"The model was trained on rows of {trained_length} tokens, fewer than"
            f" {', '.join(map(str, beyond))}."
        )
    if any(report.task.endswith(PROSE) for report in reports):
        notes.append(
            f"{PROSE}: on text of our own where the benchmark takes another's; not comparable with"
            " its published scores."
        )
    notes += [
        f"Left out {report.left_out} of {report.task} at {report.length}, the first because"
        f" {report.reason}."
        for report in reports
        if report.left_out
    ]
    return ["", *(f"- {note}" for note in notes)] if notes else []
