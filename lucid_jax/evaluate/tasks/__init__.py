"""Benchmark tasks for long contexts: samples by the rules of each, and its scores.

    task = get_task("ruler_niah_multikey_1", Sources(essays="essays/"))
    sample = task.sample(tokenizer, length=4096, seed=42, index=0)
    scores = task.score(prediction, sample)  # of one sample, by name
    table_entry = task.aggregate([scores, ...])[task.metric]

Names are those of `task_names()`: RULER's thirteen tasks and a sweep over its needles
(`ruler_niah_k8` has eight keys, `_v8` values, `_q8` questions), `babilong_qa1` to `_qa10`,
`longbench_*` and `scrolls_*`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from lucid_jax.config import ConfigError
from lucid_jax.evaluate.tasks import longbench, ruler_niah, scrolls
from lucid_jax.evaluate.tasks.babi import STORIES
from lucid_jax.evaluate.tasks.babilong import BabiLong
from lucid_jax.evaluate.tasks.ruler_qa import DocumentQuestions
from lucid_jax.evaluate.tasks.ruler_words import CommonWords, FrequentWords, VariableTracking
from lucid_jax.evaluate.tasks.task import Sample, Task
from lucid_jax.evaluate.tasks.texts import Sources

__all__ = ["Sample", "Sources", "Task", "get_task", "task_names"]

_GENERATED: dict[str, Callable[[], Task]] = {
    "ruler_vt": VariableTracking,
    "ruler_cwe": CommonWords,
    "ruler_fwe": FrequentWords,
}
# Families of tasks that read something: the prefix, the names after it, and the class.
_FAMILIES: tuple[tuple[str, tuple[str, ...], Callable[[str, Sources], Task]], ...] = (
    ("ruler_", tuple(ruler_niah.SPECS), ruler_niah.NeedleTask),
    ("ruler_", ("qa_1", "qa_2"), DocumentQuestions),
    ("babilong_", tuple(STORIES), BabiLong),
    ("longbench_", tuple(longbench.SPECS), longbench.LongBench),
    ("scrolls_", tuple(scrolls.SPECS), scrolls.Scrolls),
)


def task_names() -> tuple[str, ...]:
    """Every name that `get_task` takes."""
    read = (prefix + name for prefix, names, _ in _FAMILIES for name in names)
    return (*_GENERATED, *read)


def get_task(name: str, sources: Sources | None = None) -> Task:
    """The task of a name.

    Args:
      name: one of `task_names()`.
      sources: where the texts of the benchmarks are. RULER and BABILong do without, on prose
        of our own, and then say so in the task's name.

    Raises:
      ConfigError: no such task, or nothing that can be read at a path that it needs.
    """
    if name in _GENERATED:
        return _GENERATED[name]()
    for prefix, names, make in _FAMILIES:
        if name.startswith(prefix) and name.removeprefix(prefix) in names:
            return make(name.removeprefix(prefix), sources or Sources())
    close = difflib.get_close_matches(name, task_names(), n=1, cutoff=0.0)
    raise ConfigError(f"no task {name!r}; the closest is {close[0]!r}")
