"""The paper's tables of retrieval, with a line for each of our models.

  python -m experiments.paper_tables.run --table=needles \\
      --model='our softmax=runs/long_64k-standard' --model='our LUCID=runs/long_64k-lucid' \\
      --sources=essays=text:essays

Each model is scored by `run.py --mode=eval`'s evaluator, which writes every answer into `tasks/` of
its work directory and resumes there. The table is printed, and written as Markdown and JSON.
"""

import argparse
import itertools
import os
import pathlib
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence

from experiments import measuring, reporting
from experiments.activations import Trained
from experiments.paper_tables.needle_attention import hit_rates
from experiments.paper_tables.paper import HIT_RATES, TABLES, Table
from lucid_jax.checkpoint.reader import CheckpointError
from lucid_jax.checkpoint.restore import saved_config
from lucid_jax.config import Config, ConfigError
from lucid_jax.evaluate.batching import fit_devices
from lucid_jax.evaluate.request import TaskRequest
from lucid_jax.evaluate.run_tasks import DIRECTORY, evaluate_tasks
from lucid_jax.evaluate.tasks.texts import PROSE
from lucid_jax.runtime.preemption import Stopped
from lucid_jax.runtime.workdir import read_json

# The task, length and samples of the hit rates are our choice.
HITS_TASK, HITS_LENGTH, HITS_SAMPLES = "ruler_niah_multikey_1", 2048, 50
LABELS = {
    "best_softmax": "best head, softmax",
    "best_effective": "best head, softmax · A⁻¹",
    "mean_softmax": "mean of heads, softmax",
    "mean_effective": "mean of heads, softmax · A⁻¹",
}


def score(workdir: pathlib.Path, table: Table, request: TaskRequest) -> list[dict]:
    """Evaluates a model; returns a record of every row and length."""
    config = Config.from_dict(saved_config(workdir))
    evaluate_tasks(
        fit_devices(config, config.batch_size // config.accumulation), workdir, "latest", request
    )
    values = read_json(workdir / DIRECTORY / "scores.json")
    assert values is not None
    # The file also has scores of other requests, which may have read other texts.
    names = {task.name: task.name.removesuffix(PROSE) for task in request.tasks}
    found = {(names[x["task"]], x["length"]): x for x in values["tasks"] if x["task"] in names}
    records = []
    for (row, tasks), length in itertools.product(table.rows.items(), request.lengths):
        parts = [found[task, length] for task in tasks]
        scores = [x["scores"][table.metric]["mean"] for x in parts if x["scores"]]
        record = {
            "row": row,
            "length": length,
            "score": 100 * statistics.mean(scores) if len(scores) == len(parts) else None,
            "samples": sum(x["samples"] for x in parts),
            "prose": any(x["task"].endswith(PROSE) for x in parts),
        }
        records.append(record)
    return records


def markdown(table: Table, lengths: Sequence[int], records: Sequence[Mapping]) -> str:
    """Returns the paper's and our lines of every row, and notes."""
    ours = {(x["model"], x["row"], x["length"]): x["score"] for x in records}
    models = list(dict.fromkeys(x["model"] for x in records))

    def lines() -> Iterator[tuple[str, ...]]:
        for row in table.rows:
            for model, numbers in table.paper.items():
                by_length = dict(zip(table.lengths, numbers.get(row, ())))
                cells = [by_length.get(n) for n in lengths]
                if any(cell is not None for cell in cells):
                    yield row, f"{model} (paper)", *map(_percent, cells)
            for model in models:
                yield row, f"**{model}**", *(_percent(ours[model, row, n]) for n in lengths)

    text = f"{table.title}, percent:\n\n"
    text += reporting.markdown(("", "model", *map(str, lengths)), lines())
    if any(x["prose"] for x in records):
        text += (
            f"\n\n{PROSE}: ours are on generated text, which is not comparable with the paper's."
        )
    return text


def _percent(x: float | None) -> str:
    return "–" if x is None else f"{x:.1f}"


def hits_markdown(records: Sequence[Mapping]) -> str:
    """Returns a table of hit rates."""
    rows = [(f"{name} (paper)", f"{x:.4f}", *"––––") for name, x in HIT_RATES.items()]
    for record in records:
        rows.append((f"**{record['model']}**", "–", *(f"{record[x]:.4f}" for x in LABELS)))
    header = ("model", "hit rate", *LABELS.values())
    return "Attention on the needle:\n\n" + reporting.markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates the models, prints the table and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    parser.add_argument("--table", required=True, choices=[*TABLES, "hits"])
    parser.add_argument("--model", required=True, action="append", help="LABEL=WORKDIR; repeat it")
    parser.add_argument("--lengths", type=reporting.integers, help="default: the paper's")
    parser.add_argument("--samples", type=int, help="of a task; default: the paper's")
    parser.add_argument("--sources", default="", help="as of run.py")
    flags = parser.parse_args(argv)
    header = measuring.provenance(flags, ["flax"])
    try:
        text, records = _hits(flags) if flags.table == "hits" else _scores(flags)
    except (ConfigError, CheckpointError) as error:
        parser.error(str(error))
    except Stopped as stopped:
        print(stopped)
        sys.exit(os.EX_TEMPFAIL)
    print(text)
    reporting.write_json(flags.out / f"{flags.table}.json", **header, records=records)
    (flags.out / f"{flags.table}.md").write_text(text + "\n")


def _scores(flags: argparse.Namespace) -> tuple[str, list[dict]]:
    """Returns a table of scores and its records."""
    table = TABLES[flags.table]
    lengths = flags.lengths or table.lengths
    tasks = [*itertools.chain(*table.rows.values())]
    request = _request(flags, tasks, lengths, flags.samples or table.samples)
    records = [
        {"model": label, **record}
        for label, workdir in _models(flags)
        for record in score(workdir, table, request)
    ]
    return markdown(table, lengths, records), records


def _hits(flags: argparse.Namespace) -> tuple[str, list[dict]]:
    """Returns a table of hit rates and its records."""
    lengths, samples = flags.lengths or (HITS_LENGTH,), flags.samples or HITS_SAMPLES
    if len(lengths) > 1:
        raise ConfigError(f"--table=hits takes one of --lengths; got {len(lengths)}")
    [task] = _request(flags, [HITS_TASK], lengths, samples).tasks
    records = []
    for label, workdir in _models(flags):
        rates = hit_rates(Trained.load(workdir), task, lengths[0], samples)
        records.append({"model": label, "task": task.name, "samples": samples, **rates._asdict()})
    return hits_markdown(records), records


def _models(flags: argparse.Namespace) -> Iterator[tuple[str, pathlib.Path]]:
    for model in flags.model:
        label, _, workdir = model.partition("=")
        if not workdir:
            raise ConfigError(f"--model must be LABEL=WORKDIR; got {model!r}")
        yield label, pathlib.Path(workdir)


def _request(
    flags: argparse.Namespace, tasks: Sequence[str], lengths: Sequence[int], samples: int
) -> TaskRequest:
    sources = flags.sources.split(",") if flags.sources else []
    return TaskRequest.parse(tasks, [*map(str, lengths)], samples, sources)


if __name__ == "__main__":
    main()
