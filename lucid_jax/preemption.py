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
    when that takes too long. With several processes all stop at the same step, whichever
    of them has received a signal.
    """

    def __enter__(self) -> Preemption:
        self._received = False
        handlers = {signal.SIGTERM: self._receive, signal.SIGINT: self._receive}
        if jax.process_count() > 1:
            # The runtime has a handler for SIGTERM, by which it tells the other processes.
            handlers = {signal.SIGINT: self._forward}
        self._previous = {s: signal.signal(s, handler) for s, handler in handlers.items()}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        logging.warning("%s: saving and leaving after this step", signal.Signals(number).name)
        self._received = True
        self.__exit__()

    def _forward(self, number: int, frame: types.FrameType | None) -> None:
        logging.warning("%s: telling all processes to stop", signal.Signals(number).name)
        self.__exit__()
        signal.raise_signal(signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; every process gets the same answer."""
        if jax.process_count() == 1:
            return self._received
        # All processes agree on a step that none of them has passed.
        stop = multihost_utils.reached_preemption_sync_point(step)
        if stop:
            logging.warning("a process was told to stop: saving and leaving after step %d", step)
        return stop
