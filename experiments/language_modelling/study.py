"""Softmax against LUCID on the same text, longer rows, and a softmax model that changes to LUCID.

  python -m experiments.language_modelling.study --part=softmax --runs=runs/lm
  python -m experiments.language_modelling.study --part=lucid --runs=runs/lm
  python -m experiments.language_modelling.study --part=dropin --runs=runs/lm
  python -m experiments.language_modelling.study --report --runs=runs/lm

Every run is `run.py` with `config.py`; flags that are not listed here go to it. Models of both
kinds are asked for needles in a haystack too, at up to the length of their rows. The parts can go
side by side: they share nothing but softmax's pretraining, which `dropin` waits for. What is
finished is not done again. The report reads the evaluations, and writes results/study.json and a
figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from lucid_jax.evaluate.report import Score
from lucid_jax.training.writer import read_metrics

CONFIG = "experiments/language_modelling/config.py"
RESULTS = pathlib.Path(__file__).parent / "results"
_POLL_SECONDS = 2
_RETRIEVAL = (
    "--tasks=ruler_niah_single_1,ruler_niah_single_2,ruler_niah_multikey_1,ruler_niah_multiquery",
    "--samples=50",
)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run, then its evaluations; or an evaluation of another run's parameters.

    Attributes:
      name: Its work directory.
      kind: What comes after the colon of the configuration.
      attention: Of the model.
      start: The job whose parameters it starts from.
      train: Whether there is a run, or only an evaluation of `start`.
      retrieval: Lengths at which it is asked for needles, if any.
    """

    name: str
    kind: str
    attention: str
    start: str = ""
    train: bool = True
    retrieval: str = ""

    def commands(self, runs: pathlib.Path) -> Iterator[list[str]]:
        """The flags of `run.py`, for one call after another, of what is not done yet."""
        common = [
            f"--config={CONFIG}:{self.kind}",
            f"--config.model.attention={self.attention}",
            f"--workdir={runs / self.name}",
        ]
        if not _losses(runs, self.name).exists():
            if not self.train:
                (step,) = (runs / self.start / "checkpoints").glob("[0-9]*")
                yield [*common, "--mode=eval", f"--checkpoint={step}"]
                return
            start = [f"--config.checkpoint.init_from={runs / self.start}"] if self.start else []
            yield [*common, *start]
            yield [*common, "--mode=eval"]
        scores = _read({self.name: _scores(runs, self.name)})
        if self.retrieval and not any(x["finished"] for x in scores.values()):
            yield [*common, "--mode=eval", *_RETRIEVAL, f"--lengths={self.retrieval}"]


def _longer(attention: str) -> tuple[Job, Job]:
    """Rows of 16384 tokens, without training at that length and with."""
    return (
        Job(f"{attention}-at-16384", "16384", attention, attention, train=False),
        Job(f"{attention}-16384", "16384", attention, attention, retrieval="4096,16384"),
    )


PARTS = {
    "softmax": (
        Job("softmax", "2048", "softmax", retrieval="1024,2048"),
        *_longer("softmax"),
    ),
    "lucid": (
        Job("lucid", "2048", "lucid", retrieval="1024,2048"),
        *_longer("lucid"),
    ),
    "dropin": (
        Job("softmax-to-softmax", "dropin", "softmax", "softmax"),
        Job("softmax-as-lucid", "dropin", "lucid", "softmax", train=False),
        Job("softmax-to-lucid", "dropin", "lucid", "softmax"),
    ),
}


def run(jobs: Sequence[Job], runs: pathlib.Path, flags: Sequence[str] = ()) -> None:
    """Does what is not done yet; what a job starts from may be another process's."""
    for job in jobs:
        while job.start and not _losses(runs, job.start).exists():
            time.sleep(_POLL_SECONDS)
        for command in job.commands(runs):
            print(" ".join(["run.py", *command]), flush=True)
            subprocess.run([sys.executable, "run.py", *command, *flags], check=True)


def _losses(runs: pathlib.Path, name: str) -> pathlib.Path:
    return runs / name / "eval.json"


def _scores(runs: pathlib.Path, name: str) -> pathlib.Path:
    return runs / name / "tasks/scores.json"


def _read(paths: dict[str, pathlib.Path]) -> dict[str, dict]:
    """What has been written, without `checkpoint`: a path of one machine; `start` says whose."""
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    return {n: {k: v for k, v in x.items() if k != "checkpoint"} for n, x in found.items()}


def report(runs: pathlib.Path, out: pathlib.Path) -> str:
    """The tables; all evaluations and the curves of training are written to `out`."""
    jobs = {job.name: job for part in PARTS.values() for job in part}
    found = _read({name: _losses(runs, name) for name in jobs})
    scores = _read({name: _scores(runs, name) for name in jobs})
    records = [
        {
            **dataclasses.asdict(jobs[name]),
            "evaluation": evaluation,
            "scores": scores.get(name),
            "training": read_metrics(runs / name),
        }
        for name, evaluation in found.items()
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.json").write_text(json.dumps({"records": records}))
    _plot(found, out / "loss_by_position.png")
    lines = ["| run | starts from | loss | perplexity |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {jobs[name].start or '–'} | {x['loss']:.4f} | {x['perplexity']:.2f} |"
        for name, x in found.items()
    ]
    return "\n".join([*lines, "", *_score_lines(scores)])


def _score_lines(scores: dict[str, dict]) -> list[str]:
    """A row a run and length, a column a task: percent, with 95% intervals."""
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for name, found in scores.items():
        for task in found["tasks"]:
            score = task["scores"].get(task["metric"])
            text = str(Score(**score)) if score else "none fits"
            cells.setdefault((name, task["length"]), {})[task["task"]] = text
    tasks = list(dict.fromkeys(task for row in cells.values() for task in row))
    rows = [
        [name, str(length), *(row.get(task, "–") for task in tasks)]
        for (name, length), row in cells.items()
    ]
    head = ["run", "length", *(f"`{task}`" for task in tasks)]
    table = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(row) + " |" for row in table]


def _plot(found: dict[str, dict], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, evaluation in found.items():
        buckets = [b for b in evaluation["buckets"] if b[0]]
        axes.plot([b[1] for b in buckets], [b[3] for b in buckets], marker=".", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the row, up to")
    axes.set_ylabel("loss, nats a token")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--part", choices=PARTS)
    what.add_argument("--report", action="store_true")
    parser.add_argument("--runs", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options, flags = parser.parse_known_args(arguments)
    if options.report:
        print(report(options.runs, options.out))
    else:
        run(PARTS[options.part], options.runs, flags)


if __name__ == "__main__":
    main()
