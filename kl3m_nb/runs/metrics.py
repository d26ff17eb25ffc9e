"""metrics.jsonl: one JSON object a line, the record every figure is drawn from.

Rows have a `kind`: `train` (a step; its `clipped` and `skipped` count the steps since the row
before), `held_out` (an evaluation), `clamp` (one event, its matrices as parallel lists), `experts`
(of a mixture, with each evaluation: the share of a layer's choices that each expert got in the step
before), `checkpoint` (one that was written, and how long training waited for it). A resumed run
cuts the file back to where its checkpoint was written, so no step stands twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pandas as pd

from kl3m_nb.common.files import open_plain

FILE_NAME = "metrics.jsonl"


_KINDS_WITH_LISTS = ("clamp", "experts")


Callback = Callable[[Mapping], None]  # gets the rows as they are written


class MetricsLog:
    """Appends rows to a run's metrics.jsonl, each line written at once.

    While the disk is full, rows wait in memory: training goes on, and they are written as soon as
    there is room. `tail` are the lines that no checkpoint vouches for yet, those that wait among
    them; they travel in the next one.
    """

    def __init__(self, run_dir: Path, position: int = 0, step: int = 0, tail: bytes = b""):
        """Opens the file and drops what stands behind `position`, in bytes: what was logged after
        the checkpoint of `step`.

        That it was written is logged after it too, and stays. `tail` are the bytes before
        `position` that travelled in the checkpoint; the file may lack them. Warns when it lacks
        more; a last line that was cut off is dropped. Raises ValueError for a file that is a link,
        a pipe or a device.
        """
        path = Path(run_dir) / FILE_NAME
        self._file = open(
            open_plain(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "r+b", buffering=0
        )
        self._name = path
        content = self._file.readall()
        complete = len(content) >= position
        kept = content[: position if complete else position - len(tail)]
        if not complete and len(kept) < position - len(tail):
            warnings.warn(
                f"{path} has lost its end, {len(content)} of {position} bytes are left; it goes on"
                " there.",
                stacklevel=2,
            )
        self.position = (
            kept.rfind(b"\n") + 1
        )  # bytes, with those that wait for room; for the training state
        self._file.truncate(self.position)
        self._waiting, self.tail = b"", bytearray()
        if not complete:
            self._add(tail)
        for row in _rows(content[position:].splitlines(keepends=True), "checkpoint"):
            if row["step"] <= step:
                self.append({"kind": "checkpoint", **row})

    def append(self, row: Mapping) -> None:
        """Writes one row; NaN and infinities, also those in lists, become null, which every JSON
        reader takes.
        """
        self._add((json.dumps(_finite(dict(row))) + "\n").encode())

    def vouched(self, position: int) -> None:
        """Takes note that a checkpoint holds what was logged up to `position`: of that, `tail`
        keeps what still waits.
        """
        kept = max(self.position - position, len(self._waiting))
        del self.tail[: len(self.tail) - kept]

    def abandon(self) -> None:
        """Closes the file and writes nothing more, not even what waits: it is another process's
        now.
        """
        with contextlib.suppress(OSError):
            self._file.close()

    def close(self) -> None:
        """Puts everything on the disk and closes the file. Warns when rows are lost because there
        is no room.
        """
        try:
            self._write()
            os.fsync(self._file.fileno())
        except OSError as error:
            rows = self._waiting.count(b"\n")
            warnings.warn(
                f"The last {rows} rows of {self._name} could not be written ({error.strerror}); the"
                " newest checkpoint holds those up to its step.",
                stacklevel=2,
            )
        with contextlib.suppress(OSError):  # a network file system may refuse once more
            self._file.close()

    def _add(self, lines: bytes) -> None:
        self.position += len(lines)
        self.tail += lines
        had_room = not self._waiting
        self._waiting += lines
        try:
            self._write()
        except OSError as error:
            if had_room:
                warnings.warn(
                    f"{self._name} cannot be written: {error.strerror}; rows wait in memory.",
                    stacklevel=2,
                )

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]


def _finite(value):
    """`value` with None for every number that is not finite, at any depth."""
    return _replaced(
        value,
        lambda entry: None if isinstance(entry, float) and not math.isfinite(entry) else entry,
    )


def _replaced(value, change: Callable):
    if isinstance(value, dict):
        return {key: _replaced(entry, change) for key, entry in value.items()}
    return (
        [_replaced(entry, change) for entry in value]
        if isinstance(value, (list, tuple))
        else change(value)
    )


def parse_row(line: bytes) -> dict:
    """A row as the callbacks of training got it: null is NaN again. Raises ValueError for a line
    that is none.
    """
    try:
        row = json.loads(line)
        if isinstance(row, dict):
            return _replaced(row, lambda entry: math.nan if entry is None else entry)
    except RecursionError:
        pass
    raise ValueError(
        f"{line[:80]!r} is no row of {FILE_NAME}; each is a JSON object of numbers and lists."
    )


def _rows(lines: Iterable[bytes], kind: str) -> Iterator[dict]:
    mark = json.dumps(kind).encode()
    for line in lines:
        if (
            mark not in line
        ):  # a clamp's row is a hundred times as long as a step's, and is not parsed in vain
            continue
        try:
            row = parse_row(line)
        except ValueError:
            continue
        if row.pop("kind", None) == kind and _is_logged(row, kind):
            yield row


def _is_logged(row: Mapping, kind: str) -> bool:
    """Whether `row` has a step, and numbers beside it; with those of a kind that has lists, lists
    of one length.
    """
    lists = (
        [entry for entry in row.values() if isinstance(entry, list)]
        if kind in _KINDS_WITH_LISTS
        else []
    )
    numbers = sum(isinstance(entry, int | float) for entry in row.values())
    lengths = {len(entry) for entry in lists}
    return (
        isinstance(row.get("step"), int) and numbers + len(lists) == len(row) and len(lengths) <= 1
    )


def tell(callbacks: list[Callback], row: Mapping) -> None:
    """Calls each of `callbacks` with `row`.

    One that raises is taken off the list with a warning: a display that fails must not end a run of
    days.
    """
    for callback in tuple(callbacks):
        try:
            callback(row)
        except Exception as error:
            callbacks.remove(callback)
            name = getattr(callback, "__qualname__", type(callback).__name__)
            warnings.warn(
                f"The callback {name} failed ({type(error).__name__}: {error}) and is not called"
                " again; training goes on.",
                stacklevel=2,
            )


def read_metrics(run_dir: str | Path, kind: str) -> pd.DataFrame:
    """The rows of one kind as a table; for `clamp` and `experts` a row per matrix or expert. Empty
    when there are none.

    Lines that a crash has cut off, or that are not the log's, are passed over.
    """
    path = Path(run_dir) / FILE_NAME
    rows = []
    if path.is_file():
        with path.open("rb") as file:
            rows = list(_rows(file, kind))
    frame = pd.DataFrame(rows)
    if kind in _KINDS_WITH_LISTS and rows:
        lists = [column for column in frame.columns if isinstance(frame[column].iloc[0], list)]
        frame = frame.explode(lists, ignore_index=True).infer_objects()
    return frame


def first_step(run_dir: str | Path) -> int | None:
    """The step at which a run began, that of its first evaluation: 0 unless it goes on from a
    published model. None before it.
    """
    held_out = read_metrics(run_dir, "held_out")
    return int(held_out["step"].iloc[0]) if len(held_out) else None
