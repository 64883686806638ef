"""Requests to stop: SIGTERM from a scheduler, Ctrl-C from a person."""

from __future__ import annotations

import signal
import types

import jax
from absl import logging
from jax.experimental import multihost_utils


class Preemption:
    """While entered, turns the first SIGTERM or SIGINT into a request to stop.

    The loop finishes its step, saves, and leaves. A second signal acts as usual, for
    when that takes too long. With several processes all stop at the same step.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __enter__(self) -> Preemption:
        self._received = False
        self._previous = {s: signal.signal(s, self._receive) for s in self._SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        logging.warning("%s: saving and leaving after this step", signal.Signals(number).name)
        self._received = True
        for other, handler in self._previous.items():
            signal.signal(other, handler)

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; every process gets the same answer."""
        if jax.process_count() == 1:
            return self._received
        # The runtime sees SIGTERM on any process and agrees on the step with the others.
        return multihost_utils.reached_preemption_sync_point(step)
