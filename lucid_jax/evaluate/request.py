"""Which tasks to evaluate, at which lengths, with how many samples."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Self

from lucid_jax.config import ConfigError
from lucid_jax.evaluate.tasks import Sources, Task, get_task, task_group

# RULER's seed, used for every task.
SEED = 42


@dataclasses.dataclass(frozen=True)
class TaskRequest:
    """Tasks to evaluate at each of some lengths in tokens.

    Attributes:
      samples: Samples of each task at each length; all samples of a task that has fewer.
      sources: The texts that tasks read.
    """

    tasks: tuple[Task, ...]
    lengths: tuple[int, ...]
    samples: int
    sources: Sources

    @classmethod
    def parse(
        cls, tasks: Sequence[str], lengths: Sequence[str], samples: int, sources: Sequence[str]
    ) -> Self:
        """Reads the values of the flags of the same names; a benchmark's name means its tasks.

        Raises:
          ConfigError: a task is unknown, `loss` is among tasks, there is no length or one is not
            a positive integer, or a source is malformed or cannot be read.
        """
        if "loss" in tasks:
            raise ConfigError(f"--tasks=loss cannot be combined; got {','.join(tasks)}")
        if not lengths:
            raise ConfigError(f"--tasks={','.join(tasks)} needs --lengths, as in 2048,4096")
        for length in lengths:
            if not length.isdecimal() or int(length) == 0:
                raise ConfigError(f"--lengths must be positive integers; got {length!r}")
        try:
            parsed_sources = Sources.parse(sources)
        except ConfigError as error:
            raise ConfigError(f"--sources: {error}") from error
        names = itertools.chain(*map(task_group, tasks))
        try:
            found = tuple(get_task(name, parsed_sources) for name in dict.fromkeys(names))
        except ConfigError as error:
            raise ConfigError(f"--tasks: {error}") from error
        return cls(found, tuple(dict.fromkeys(map(int, lengths))), samples, parsed_sources)

    def groups(self) -> Iterator[tuple[Task, int, int]]:
        """Yields each task with each length and its number of samples."""
        for task in self.tasks:
            for length in self.lengths:
                yield task, length, min(self.samples, task.size or self.samples)
