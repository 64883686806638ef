"""One line in place of stack traces when another process of a run has ended.

A collective that fails raises in Python. Otherwise the coordination service of JAX notices,
after its heartbeats, and C++ code aborts the process, which nothing in it can prevent: a helper
process reads what this one writes to standard error, and replaces that part.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import jax

_MESSAGE = (
    "error: another process of this run has ended or did not start: start all of them again, and"
    " they resume\n"
)
# What collectives say when a process is gone.
_GONE = re.compile("Gloo|by peer|remote process exited|Socket closed|heartbeat|UNAVAILABLE")
# Copies lines until the coordination service reports an error. The signals that stop a run also
# reach this process, which ends when its input does.
_FILTER = r"""
import re, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
fatal = re.compile(rb"^[EF]\d{4} .*(coordination_service|/client\.h|\bclient\.h)")
message = sys.argv[1].encode()
for line in sys.stdin.buffer:
    if line == message or fatal.match(line):
        sys.stderr.buffer.write(message)
        break
    sys.stderr.buffer.write(line)
    sys.stderr.buffer.flush()
sys.stderr.buffer.flush()
sys.stdin.buffer.read()
"""


def shorten_fatal_errors() -> Callable[[], None]:
    """Replaces what C++ code writes when it aborts this process by one line.

    Returns a function that ends this and returns once everything is written out.
    """
    number = sys.stderr.fileno()
    before = os.dup(number)
    reading, writing = os.pipe()
    copier = subprocess.Popen([sys.executable, "-c", _FILTER, _MESSAGE], stdin=reading)
    os.close(reading)
    os.dup2(writing, number)
    os.close(writing)

    def undo() -> None:
        os.dup2(before, number)
        copier.wait()

    return undo


@contextlib.contextmanager
def leave_if_a_peer_is_gone() -> Iterator[None]:
    """Ends this process if the block fails because another process of the run has ended.

    Nothing is closed, because closing waits for the other process.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1 and _GONE.search(str(error)):
            sys.stderr.write(_MESSAGE)
            sys.stderr.flush()
            os._exit(1)
        raise
