"""Which checkpoints orbax keeps, and what it logs."""

import dataclasses
import logging as python_logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from orbax.checkpoint import checkpoint_managers

_NOBODY_WAITS = "Event loop is closed"


@dataclasses.dataclass(frozen=True)
class LowestLossN(checkpoint_managers.PreservationPolicy):
    """Keeps the `n` checkpoints of lowest evaluation loss among those that have one.

    Orbax's BestN reads losses from files of its own, where garbage keeps the manager from
    opening, and it keeps checkpoints without a loss while there are at most `n`.
    """

    n: int
    eval_losses: Mapping[int, float]

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        """Returns for each checkpoint whether it is kept."""
        evaluated = [item.step for item in checkpoints if item.step in self.eval_losses]
        best = sorted(evaluated, key=self.eval_losses.__getitem__)[: self.n]
        return [item.step in best for item in checkpoints]


def hide_orbax_chatter() -> None:
    """Drops orbax's INFO messages, tens of lines a save, and tracebacks of failed writes.

    The next call raises the error of a failed write; warnings stay.
    """
    logging.get_absl_logger().addFilter(_is_not_orbax_chatter)
    # Orbax takes the exception of one of its tasks or futures.
    python_logging.getLogger("asyncio").addFilter(_is_not_unretrieved)
    sys.unraisablehook = _report_unraisable


def _is_not_orbax_chatter(record: python_logging.LogRecord) -> bool:
    if "/orbax/" not in record.pathname:
        return True
    return record.levelno >= python_logging.WARNING and not record.exc_info


def _is_not_unretrieved(record: python_logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _report_unraisable(unraisable: Any) -> None:
    # Once a write has failed, tensorstore's threads find that nobody waits for the others.
    if str(unraisable.exc_value) != _NOBODY_WAITS:
        sys.__unraisablehook__(unraisable)
