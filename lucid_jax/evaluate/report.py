"""Tables of scores: means with confidence intervals, and samples left out or truncated."""

import dataclasses
import math
from collections.abc import Collection, Sequence

from lucid_jax.evaluate.samples_file import Result
from lucid_jax.evaluate.tasks import Task
from lucid_jax.evaluate.tasks.texts import PROSE

# The 97.5% quantile of the normal distribution, for a 95% interval.
_Z = 1.959964


@dataclasses.dataclass(frozen=True)
class Score:
    """A mean score and the ends of its 95% interval, all in [0, 1]."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclasses.dataclass(frozen=True)
class GroupReport:
    """The scores of one task at one length.

    Attributes:
      task: The task's name, which ends in `[prose]` if generated text replaces the benchmark's.
      length: Prompt and answer together, in tokens.
      metric: The name of the score that the benchmark publishes.
      scores: Scores by name; empty while there is no sample.
      left_out: The number of samples that do not fit the length.
      reason: Why the first of those does not fit.
      truncated_samples: The number of prompts that were cut to fit.
      truncated_tokens: The tokens that those prompts lost.
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
        """The score that the benchmark publishes, or None while there is no sample."""
        return self.scores.get(self.metric)


def wilson_interval(mean: float, samples: int) -> tuple[float, float]:
    """Returns Wilson's 95% interval of the mean of samples in [0, 1].

    It is meant for samples that are 0 or 1. Fractional samples have a smaller variance at the
    same mean, so their interval is wider than necessary. Unlike a normal or bootstrap interval
    it holds, or is too wide, for few samples and for samples that are all equal.
    """
    shrink = 1 / (1 + _Z**2 / samples)
    center = shrink * (mean + _Z**2 / (2 * samples))
    half = shrink * _Z * math.sqrt(mean * (1 - mean) / samples + (_Z / (2 * samples)) ** 2)
    # A mean of 0 or 1 is an end of its interval, up to rounding.
    return min(max(center - half, 0.0), mean), max(min(center + half, 1.0), mean)


def summarize(
    task: Task, length: int, results: Collection[Result], num_samples: int
) -> GroupReport:
    """Summarises the finished samples of a task at a length."""
    scored = [result for result in results if not result.left_out]
    reasons = [result.left_out for result in results if result.left_out]
    cut = [lost for result in scored if (lost := result.meta.get("truncated_tokens", 0))]
    return GroupReport(
        task=task.name,
        length=length,
        metric=task.metric,
        scores=_score(task, scored) if scored else {},
        samples=len(scored),
        wanted=num_samples,
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
    # A score computed from several means grows with each of them, so its interval follows from
    # the ends of theirs.
    means = task.aggregate([result.scores for result in results])
    lows, highs = (task.aggregate([{name: end[i] for name, end in ends.items()}]) for i in (0, 1))
    return {name: Score(means[name], lows[name], highs[name]) for name in means}


def to_markdown(title: str, reports: Sequence[GroupReport], trained_length: int) -> str:
    """Formats a table of published scores, task by length, and a table of all scores and counts."""
    metrics = {report.task: report.metric for report in reports}
    lengths = sorted({report.length for report in reports})
    by_group = {(report.task, report.length): report for report in reports}
    lines = [f"# {title}", "", "Percent, with 95% intervals (Wilson's).", ""]
    lines += _table(
        ["task", "metric", *map(str, lengths)],
        [
            [
                task,
                metric,
                *(
                    str(by_group[task, n].score or "–") if (task, n) in by_group else ""
                    for n in lengths
                ),
            ]
            for task, metric in metrics.items()
        ],
    )
    lines += _notes(reports, trained_length)
    header = ["task", "length", "score", "samples", "left out", "cut prompts", "cut tokens"]
    lines += ["", *_table(header, [_details(report) for report in reports]), ""]
    return "\n".join(lines)


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
    if longer := sorted({r.length for r in reports if r.length > trained_length}):
        notes.append(
            f"The model was trained on sequences of {trained_length} tokens, fewer than"
            f" {', '.join(map(str, longer))}."
        )
    if any(report.task.endswith(PROSE) for report in reports):
        notes.append(
            f"{PROSE}: generated text replaces the benchmark's own, so the scores are not"
            " comparable with published ones."
        )
    notes += [
        f"Left out {report.left_out} of {report.task} at {report.length}, the first because"
        f" {report.reason}."
        for report in reports
        if report.left_out
    ]
    return ["", *(f"- {note}" for note in notes)] if notes else []
