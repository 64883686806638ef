"""Requests to stop: SIGTERM from a scheduler, Ctrl-C from a user."""

import signal
import types
from typing import Self

import jax
from absl import logging
from jax.experimental import multihost_utils


class Stopped(Exception):
    """A job ended early because it was asked to stop; the message is its report."""


class Preemption:
    """A context that turns the first SIGTERM or SIGINT into a request to stop.

    The training loop then finishes its step, saves and exits without an evaluation. A second
    signal has its usual effect, in case that takes too long. With several processes, all stop
    at the same step, whichever of them receives the signal.
    """

    def __enter__(self) -> Self:
        self._received = False
        self._requests = 0
        handlers = {signal.SIGTERM: self._receive, signal.SIGINT: self._receive}
        if jax.process_count() > 1:
            # jax itself handles SIGTERM and tells the other processes.
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
        """Returns whether to stop after `step`. Once true, it stays true.

        Every process must call this the same number of times; all get the same answers.
        """
        if jax.process_count() > 1 and not self._received:
            # A counter, because processes can only agree on a number that none has passed yet.
            self._requests += 1
            self._received = multihost_utils.reached_preemption_sync_point(self._requests)
            if self._received:
                logging.warning(
                    "a process was told to stop: saving and leaving after step %d", step
                )
        return self._received
