"""Standard output and standard error to which writing never fails: no step of a run is worth a line
that cannot be printed.

A log may lie on a disk that is full for a moment, or the reader of a pipe (`| head`) may have
ended. Whatever prints (our own lines, Python's warnings, loggers, a library's progress bars) goes
through these two streams.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO


class _Unfailing(io.RawIOBase):
    """An open file of the system. What it does not take is dropped and counted, and the count
    stands before the next line.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._lost_lines, self._reason = 0, ""
        self._in_line = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data) -> int:
        """Takes all of `data`, whether or not the system does."""
        content = bytes(data)
        try:
            if self._lost_lines:
                said = (
                    f"kl3m_nb: {self._lost_lines} lines could not be printed here"
                    f" ({self._reason})\n"
                )
                self._write(b"\n" * self._in_line + said.encode())
                self._lost_lines = 0
            content = self._write(content)
        except OSError as error:
            self._lost_lines += max(1, content.count(b"\n"))
            self._reason = error.strerror or str(error)
        return len(data)

    def _write(self, content: bytes) -> bytes:
        while content:
            written = os.write(self._descriptor, content)
            self._in_line = content[written - 1 : written] != b"\n"
            content = content[written:]
        return content


def keep_printing() -> None:
    """Puts such streams in the place of this process's standard output and error, which stay what
    they are otherwise.

    A stream that was closed before the process began prints to nowhere. A sign that its encoding
    lacks is printed as its number.
    """
    sys.stdout, sys.stderr = _unfailing(sys.stdout), _unfailing(sys.stderr)


def _unfailing(stream: TextIO | None) -> TextIO:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Unfailing(stream.fileno())),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
