"""Requests to stop: SIGTERM from a scheduler, Ctrl-C from a person."""

from __future__ import annotations

import signal
import types

import jax
from absl import logging
from jax.experimental import multihost_utils


class Preemption:
    """While entered, turns the first SIGTERM or SIGINT into a request to stop.

    The loop finishes its step, saves, and leaves, without an evaluation. A second signal
    acts as usual, for when that takes too long. With several processes all stop at the
    same step, whichever of them has received a signal.
    """

    def __enter__(self) -> Preemption:
        self._received = False
        self._requests = 0
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
        """Whether to stop after `step`; once so, always so.

        Every process asks the same number of times, and gets the same answers.
        """
        if jax.process_count() > 1 and not self._received:
            # All processes agree on a question that none of them has asked yet.
            self._requests += 1
            self._received = multihost_utils.reached_preemption_sync_point(self._requests)
            if self._received:
                logging.warning("a process is told to stop: saving and leaving after step %d", step)
        return self._received
