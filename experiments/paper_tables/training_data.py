"""Fine-tuning data of `configs/paper/`: prompts and answers of benchmark tasks, as JSON lines.

  python -m experiments.paper_tables.training_data --output=babilong_32k.jsonl --length=32768 \\
      --tasks=babilong_qa1,babilong_qa2,babilong_qa3,babilong_qa4,babilong_qa5 --indices=0:1000 \\
      --tokenizer=llama.model --sources=books=text:books
  python -m experiments.paper_tables.training_data --output=2wikimqa.jsonl --length=32768 \\
      --tasks=longbench_2wikimqa --indices=100:200 --tokenizer=llama.model \\
      --sources=longbench=LongBench/data

Generated samples have a seed that no evaluation uses. Those of LongBench are the benchmark's own:
the second half here, so that an evaluation with --samples=100 has the first.
"""

import argparse
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence

from lucid_jax.config import ConfigError
from lucid_jax.data import load_tokenizer
from lucid_jax.data.tokenizer import Tokenizer
from lucid_jax.evaluate.request import TaskRequest
from lucid_jax.evaluate.tasks import Task

_SEED = 30_000_000


def indices(text: str) -> range:
    """Parses `FIRST:END`."""
    first, end = map(int, text.split(":"))
    return range(first, end)


def completions(
    tasks: Sequence[Task], tokenizer: Tokenizer, length: int, indices: Sequence[int]
) -> Iterator[dict[str, str]]:
    """Yields samples of the tasks in turn, with the first of their answers."""
    for index, task in itertools.product(indices, tasks):
        sample = task.sample(tokenizer, length, _SEED, index)
        yield {"prompt": sample.prompt, "completion": f" {sample.answers[0]}"}


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--tasks", required=True, help="as of run.py")
    parser.add_argument("--length", required=True, help="tokens of a prompt and its answer")
    parser.add_argument(
        "--indices", type=indices, required=True, help="of each task's samples, FIRST:END"
    )
    parser.add_argument("--tokenizer", default="bytes", help="as data.tokenizer")
    parser.add_argument("--sources", default="", help="as of run.py")
    flags = parser.parse_args(argv)
    sources = flags.sources.split(",") if flags.sources else []
    try:
        request = TaskRequest.parse(
            flags.tasks.split(","), [flags.length], len(flags.indices), sources
        )
        tokenizer = load_tokenizer(flags.tokenizer)
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        with flags.output.open("w", encoding="utf-8") as lines:
            for line in completions(request.tasks, tokenizer, request.lengths[0], flags.indices):
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
