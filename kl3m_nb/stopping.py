"""A stop by signal, asked for at any moment and honoured where nothing is lost."""

from __future__ import annotations

import signal
import threading
import time

EXIT_INTERRUPTED = 130  # of a process that was stopped and has saved: what a shell gives for Ctrl-C


def interrupted(step: int) -> KeyboardInterrupt:
    """What a stop that lost nothing raises."""
    return KeyboardInterrupt(f"step {step} is saved; training again continues with the very next token")


class StopRequest:
    """Turns SIGINT and SIGTERM into a request that the loop honours between micro-batches; a later one interrupts at once.

    A supervisor may signal the whole group of processes, and a runner then passes its own signal on: what arrives within a few
    seconds of the first is the same request.
    """

    SAME_REQUEST_SECONDS = 5.0

    def __init__(self):
        self.requested = False
        self._requested_at = 0.0
        self._previous = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only there Python lets anyone catch signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if not self.requested:
            self.requested, self._requested_at = True, time.monotonic()
        elif time.monotonic() - self._requested_at > self.SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt
