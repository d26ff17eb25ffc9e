"""A stop by signal, asked for at any moment and honoured where nothing is lost."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

# Ctrl-C, a supervisor, a connection that broke, a batch system's warning, the processor time that
# was granted.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)


_INSISTING = (
    signal.SIGINT,
    signal.SIGTERM,
)  # a second one is meant; SIGXCPU comes every second by itself


EXIT_INTERRUPTED = 130  # of a process that was stopped and has saved: what a shell gives for Ctrl-C


def interrupted(step: int) -> KeyboardInterrupt:
    """What a stop that lost nothing raises."""
    return KeyboardInterrupt(
        f"step {step} is saved; training again continues with the very next token"
    )


def catch_stop_signals(handler: Callable) -> dict[int, object]:
    """Has `handler` called for the signals that ask for a stop; returns what was called before, for
    `signal.signal`.

    A SIGHUP that is ignored stays so: `nohup` starts what is to outlive its terminal.
    """
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    caught = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not ignored]
    return {number: signal.signal(number, handler) for number in caught}


class StopRequest:
    """Turns `STOP_SIGNALS` into a request that the loop honours between micro-batches.

    A supervisor may signal the whole group of processes, and a runner then passes its own signal
    on: what arrives within a few seconds of the first is the same request. A later SIGINT or
    SIGTERM interrupts at once.
    """

    SAME_REQUEST_SECONDS = 5.0

    def __init__(self):
        self.requested = False
        self._requested_at = 0.0
        self._previous = {}

    def __enter__(self) -> StopRequest:
        if (
            threading.current_thread() is threading.main_thread()
        ):  # only there Python lets anyone catch signals
            self._previous = catch_stop_signals(self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if not self.requested:
            self.requested, self._requested_at = True, time.monotonic()
        elif (
            number in _INSISTING
            and time.monotonic() - self._requested_at > self.SAME_REQUEST_SECONDS
        ):
            raise KeyboardInterrupt
