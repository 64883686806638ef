"""What an evaluation over tasks is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from lucid_jax.config import ConfigError
from lucid_jax.evaluate.tasks import Sources, Task, get_task

# RULER's, for every task.
SEED = 42


@dataclasses.dataclass(frozen=True)
class TaskRequest:
    """So many samples of every task at every length, in tokens.

    Tasks that have fewer give all of them.
    """

    tasks: tuple[Task, ...]
    lengths: tuple[int, ...]
    samples: int
    sources: Sources

    @classmethod
    def parse(
        cls, tasks: Sequence[str], lengths: Sequence[str], samples: int, sources: Sequence[str]
    ) -> TaskRequest:
        """Reads what the flags of the same names hold.

        Raises:
          ConfigError: no such task, the loss beside tasks, no length or one that is no positive
            integer, or a source that is not as `Sources.parse` reads it or cannot be read.
        """
        if "loss" in tasks:
            raise ConfigError(f"--tasks=loss stands alone; got {','.join(tasks)}")
        if not lengths:
            raise ConfigError(f"--tasks={','.join(tasks)} needs --lengths, as in 2048,4096")
        for length in lengths:
            if not length.isdecimal() or int(length) == 0:
                raise ConfigError(f"--lengths must be positive integers; got {length!r}")
        try:
            where = Sources.parse(sources)
        except ConfigError as error:
            raise ConfigError(f"--sources: {error}") from error
        try:
            found = tuple(get_task(name, where) for name in dict.fromkeys(tasks))
        except ConfigError as error:
            raise ConfigError(f"--tasks: {error}") from error
        return cls(found, tuple(dict.fromkeys(map(int, lengths))), samples, where)

    def groups(self) -> Iterator[tuple[Task, int, int]]:
        """Every task at every length, with how many samples it is to have."""
        for task in self.tasks:
            for length in self.lengths:
                yield task, length, min(self.samples, task.size or self.samples)
