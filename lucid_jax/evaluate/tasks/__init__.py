"""Long-context benchmark tasks: samples by each benchmark's rules, and their scores.

    task = get_task("ruler_niah_multikey_1", Sources(essays="essays/"))
    sample = task.sample(tokenizer, length=4096, seed=42, index=0)
    scores = task.score(prediction, sample)  # the scores of one sample by name
    published = task.aggregate([scores, ...])[task.metric]

The tasks are RULER's thirteen and a sweep over its needles (`ruler_niah_k8` has eight keys, `_v8`
eight values, `_q8` eight queries), `babilong_qa1` to `_qa10`, `longbench_*` and `scrolls_*`;
`task_group` gives each benchmark's.
"""

import difflib
import functools
import re
from collections.abc import Callable, Collection

from lucid_jax.config import ConfigError
from lucid_jax.evaluate.tasks import longbench, ruler_niah, scrolls
from lucid_jax.evaluate.tasks.babi import STORIES
from lucid_jax.evaluate.tasks.babilong import BabiLong
from lucid_jax.evaluate.tasks.ruler_qa import DocumentQuestions
from lucid_jax.evaluate.tasks.ruler_words import CommonWords, FrequentWords, VariableTracking
from lucid_jax.evaluate.tasks.task import Sample, Task
from lucid_jax.evaluate.tasks.texts import Sources

__all__ = ["Sample", "Sources", "Task", "get_task", "task_group", "task_names"]


def _family(
    prefix: str, names: Collection[str], make: Callable[[str, Sources], Task]
) -> dict[str, Callable[[Sources], Task]]:
    return {f"{prefix}_{name}": functools.partial(make, name) for name in names}


_TASKS: dict[str, Callable[[Sources], Task]] = {
    "ruler_vt": lambda sources: VariableTracking(),
    "ruler_cwe": lambda sources: CommonWords(),
    "ruler_fwe": lambda sources: FrequentWords(),
    **_family("ruler", ruler_niah.SPECS, ruler_niah.NeedleTask),
    **_family("ruler", ("qa_1", "qa_2"), DocumentQuestions),
    **_family("babilong", STORIES, BabiLong),
    **_family("longbench", longbench.SPECS, longbench.LongBench),
    **_family("scrolls", scrolls.SPECS, scrolls.Scrolls),
}


_GROUPS = {
    benchmark: tuple(
        name
        for name in _TASKS
        if name.startswith(f"{benchmark}_") and not re.fullmatch(r"ruler_niah_[kvq]\d+", name)
    )
    for benchmark in ("ruler", "babilong", "longbench", "scrolls")
}


def task_names() -> tuple[str, ...]:
    """Returns every name that `get_task` accepts."""
    return tuple(_TASKS)


def task_group(name: str) -> tuple[str, ...]:
    """Returns the tasks of the benchmark `name`, without sweeps; for another name, itself alone."""
    return _GROUPS.get(name, (name,))


def get_task(name: str, sources: Sources | None = None) -> Task:
    """Returns the task of a name in `task_names()`.

    Without the benchmarks' texts RULER and BABILong use generated prose, and the name of the task
    ends in `[prose]`.

    Raises:
      ConfigError: there is no such task, or a path that it needs cannot be read.
    """
    if name not in _TASKS:
        [closest] = difflib.get_close_matches(name, task_names(), n=1, cutoff=0.0)
        groups = ", ".join(f"{group} ({len(names)} tasks)" for group, names in _GROUPS.items())
        raise ConfigError(
            f"no task {name!r}; the closest is {closest!r}. There are the groups {groups}, and the"
            f" tasks {', '.join(task_names())}"
        )
    return _TASKS[name](sources or Sources())
