"""Which implementation of each op a program runs, recorded while the program is traced."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping

from lucid_jax.ops import target


class Implementations:
    """The implementations of the ops of a program."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._fallbacks: dict[str, str] = {}

    def record(self, op: str, name: str, reasons: Mapping[str, str | None]) -> None:
        """Records that `op` runs by `name`, and why it does not run by the others."""
        self._names[op] = name
        self._fallbacks.pop(op, None)
        if name == "xla" and target.platform() != "cpu":
            why = "; ".join(f"{other}: {reason}" for other, reason in reasons.items() if reason)
            self._fallbacks[op] = (
                f"{op} runs without a kernel on {target.device_kind()}, which often takes ten times"
                f" as long ({why})"
            )

    def __str__(self) -> str:
        """Names them, as in `attention cudnn · solve triton`."""
        return " · ".join(f"{op} {name}" for op, name in sorted(self._names.items()))

    @property
    def fallbacks(self) -> list[str]:
        """A sentence for each op that runs without a kernel on an accelerator."""
        return list(self._fallbacks.values())


_current: contextvars.ContextVar[Implementations | None] = contextvars.ContextVar(
    "implementations", default=None
)


@contextlib.contextmanager
def recorded() -> Iterator[Implementations]:
    """Records the implementations of the ops that are traced in the block."""
    found = Implementations()
    token = _current.set(found)
    try:
        yield found
    finally:
        _current.reset(token)


def record(op: str, name: str, reasons: Mapping[str, str | None]) -> None:
    """Records an implementation where one is asked for; see `Implementations.record`."""
    if (current := _current.get()) is not None:
        current.record(op, name, reasons)
