"""Softmax against LUCID on the same text, at length, and a softmax model that changes to LUCID.

  python -m experiments.language_modelling.study --part=softmax --runs=runs/lm
  python -m experiments.language_modelling.study --part=lucid --runs=runs/lm
  python -m experiments.language_modelling.study --part=dropin --runs=runs/lm
  python -m experiments.language_modelling.study --report --runs=runs/lm

Every run is `run.py` with `config.py`, and takes all flags that this command does not know. Models
of both kinds are also asked for needles in a haystack, at up to the length of their training. The
parts can run side by side: they share only softmax's pretraining, which `dropin` waits for.
Finished work is not repeated. The report reads the evaluations, and writes study.json and
loss_by_position.png.
"""

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from experiments import reporting
from lucid_jax.evaluate.report import Score

CONFIG = "experiments/language_modelling/config.py"
_LOSSES, _SCORES = "eval.json", "tasks/scores.json"
_POLL_SECONDS = 2
_RETRIEVAL = (
    "--tasks=ruler_niah_single_1,ruler_niah_single_2,ruler_niah_multikey_1,ruler_niah_multiquery",
    "--samples=50",
)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run and its evaluations, or an evaluation of another run's parameters."""

    name: str  # The work directory.
    kind: str  # The part of the configuration's name after the colon.
    attention: str
    start: str = ""  # The job whose parameters it starts from.
    train: bool = True  # Whether to train, or only to evaluate `start`.
    retrieval: str = ""  # Lengths at which it is asked for needles, if any.

    def commands(self, runs: pathlib.Path) -> Iterator[list[str]]:
        """Yields the flags of each call of `run.py` that is not done yet."""
        common = [
            f"--config={CONFIG}:{self.kind}",
            f"--config.model.attention={self.attention}",
            f"--workdir={runs / self.name}",
        ]
        if not _read(runs, self.name, _LOSSES):
            if not self.train:
                (step,) = (runs / self.start / "checkpoints").glob("[0-9]*")
                yield [*common, "--mode=eval", f"--checkpoint={step}"]
                return
            start = [f"--config.checkpoint.init_from={runs / self.start}"] if self.start else []
            yield [*common, *start]
            yield [*common, "--mode=eval"]
        scores = _read(runs, self.name, _SCORES)
        if self.retrieval and not (scores and scores["finished"]):
            yield [*common, "--mode=eval", *_RETRIEVAL, f"--lengths={self.retrieval}"]


def _both_lengths(attention: str) -> tuple[Job, ...]:
    """Returns the jobs at 2048 tokens, and at 16384 without training at that length and with."""
    return (
        Job(attention, "2048", attention, retrieval="1024,2048"),
        Job(f"{attention}-at-16384", "16384", attention, attention, train=False),
        Job(f"{attention}-16384", "16384", attention, attention, retrieval="4096,16384"),
    )


PARTS = {
    "softmax": _both_lengths("softmax"),
    "lucid": _both_lengths("lucid"),
    "dropin": (
        Job("softmax-to-softmax", "dropin", "softmax", "softmax"),
        Job("softmax-as-lucid", "dropin", "lucid", "softmax", train=False),
        Job("softmax-to-lucid", "dropin", "lucid", "softmax"),
    ),
}


def run(jobs: Sequence[Job], runs: pathlib.Path, flags: Sequence[str] = ()) -> None:
    """Does what is not done yet, and waits for jobs of other processes to start from."""
    for job in jobs:
        while job.start and not _read(runs, job.start, _LOSSES):
            time.sleep(_POLL_SECONDS)
        for command in job.commands(runs):
            print(" ".join(["run.py", *command]), flush=True)
            subprocess.run([sys.executable, "run.py", *command, *flags], check=True)


def _read(runs: pathlib.Path, name: str, file: str) -> dict | None:
    """Returns the results in a file of a run, or None if there are none yet."""
    path = runs / name / file
    return json.loads(path.read_text()) if path.exists() else None


def report(runs: pathlib.Path, out: pathlib.Path) -> str:
    """Returns tables of all evaluations, and writes these and a picture to `out`."""
    kept = ("environment", "tokens", "loss", "perplexity", "buckets")
    records = []
    for job in itertools.chain(*PARTS.values()):
        if losses := _read(runs, job.name, _LOSSES):
            found = {field: losses[field] for field in kept}
            scores = _task_scores(_read(runs, job.name, _SCORES) or {"tasks": []})
            records.append({"run": job.name, "start": job.start, **found, "scores": scores})
    reporting.write_json(out / "study.json", records=records)
    plot(records, out / "loss_by_position.png")
    return table(records)


def _task_scores(scores: dict) -> list[dict]:
    """Returns the main score of each task: mean and 95% interval, or none if no sample fits."""
    return [
        {"task": x["task"], "length": x["length"], **x["scores"].get(x["metric"], {})}
        for x in scores["tasks"]
    ]


def table(records: Sequence[dict]) -> str:
    """Returns Markdown tables of losses, and of scores in percent."""
    rows = [
        (x["run"], x["start"] or "–", f"{x['loss']:.4f}", f"{x['perplexity']:.2f}") for x in records
    ]
    losses = reporting.markdown(("run", "starts from", "loss", "perplexity"), rows)
    if not any(x["scores"] for x in records):
        return losses
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for record in records:
        for x in record["scores"]:
            score = {name: x[name] for name in ("mean", "low", "high") if name in x}
            text = str(Score(**score)) if score else "none fits"
            cells.setdefault((record["run"], x["length"]), {})[x["task"]] = text
    tasks = list(dict.fromkeys(task for row in cells.values() for task in row))
    scores = [(*run, *(row.get(task, "–") for task in tasks)) for run, row in cells.items()]
    header = ("run", "length", *(f"`{task}`" for task in tasks))
    return f"{losses}\n\n{reporting.markdown(header, scores)}"


def plot(records: Sequence[dict], path: pathlib.Path) -> None:
    """Plots the loss of every run against the position in the sequence."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for record in records:
        buckets = [b for b in record["buckets"] if b[0]]
        axes.plot([b[1] for b in buckets], [b[3] for b in buckets], marker=".", label=record["run"])
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position in the sequence, up to", ylabel="loss, nats a token")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a part, or reports."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--part", choices=PARTS)
    what.add_argument("--report", action="store_true")
    parser.add_argument("--runs", type=pathlib.Path, required=True)
    flags, others = parser.parse_known_args(argv)
    if flags.report:
        print(report(flags.runs, flags.out))
    else:
        run(PARTS[flags.part], flags.runs, others)


if __name__ == "__main__":
    main()
