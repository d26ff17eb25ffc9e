"""The status file of a notebook run: what became of the run and of each of its code cells, written
at every change.

Papermill keeps a status in the notebook too, but calls a cell `completed` that never ran once a
kernel has died. What a run writes lies beside the outputs of an earlier one until it has got as far
as that: a run that is refused replaces nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from kl3m_nb.common.files import replace_text
from kl3m_nb.common.text import clock

if TYPE_CHECKING:  # the table of runs is not to wait for it
    import nbformat


TOUCH_SECONDS = 60  # between two signs of life of a runner


SILENT_SECONDS = 600  # after which it is gone


@dataclass
class CellStatus:
    """One code cell of a run; `seconds` stays None until it has ended, `error` is one line."""

    index: int
    title: str
    state: str = "pending"
    seconds: float | None = None
    error: str | None = None


class RunStatus:
    """What became of a run and of each of its code cells, written to `<stem>.attempt.status.json`
    at every change.

    A run is running, completed, failed or interrupted; a cell is pending, running, completed,
    failed, interrupted or not run. `read_status` tells a run that was killed from one that is
    running. A cell's `index` counts the code cells of the executed notebook from 1, its title is
    the nearest heading above it or else its first line.
    """

    def __init__(self, notebook: Path, output_path: Path, parameters: dict[str, object]):
        """Raises ValueError while another process runs a notebook into `output_path`."""
        self.path, self.attempt_path = (
            attempt_at(output_path, ".status.json"),
            attempt_at(output_path, output_path.suffix),
        )
        earlier = read_status(self.path)
        if earlier.get("state") == "running":
            raise ValueError(
                f"Process {earlier['pid']} on {earlier['host']} runs a notebook into {output_path};"
                " wait for it, stop it, or give another output path."
            )
        self.notebook, self.output_path, self.parameters = notebook, output_path, parameters
        self.kept = False  # whether the outputs have taken the place of earlier ones
        self.state = "running"
        self.exit_code: int | None = None
        self.error: str | None = None
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.seconds: float | None = None
        self.cells: list[CellStatus] = []
        self.current: CellStatus | None = None
        self._run_clock = time.monotonic()
        self.write()

    def set_cells(self, cells: list[CellStatus]) -> None:
        """Take note of what is about to run."""
        self.cells = cells
        self.write()

    def start_cell(self, cell: CellStatus) -> None:
        """`cell` begins."""
        cell.state, self.current, self._cell_clock = "running", cell, time.monotonic()
        self.write()

    def end_cell(self, state: str, error: str | None = None) -> None:
        """The current cell has ended as `state`."""
        cell, self.current = self.current, None
        cell.state, cell.error, cell.seconds = (
            state,
            error,
            round(time.monotonic() - self._cell_clock, 3),
        )
        self.write()

    def end_run(self, state: str, exit_code: int, error: str | None) -> None:
        """The run has ended as `state`; cells that never began are `not run`."""
        if self.current is not None:
            self.end_cell(state, error)
        for cell in self.cells:
            cell.state = "not run" if cell.state == "pending" else cell.state
        self.state, self.exit_code, self.error = state, exit_code, error
        self.seconds = round(time.monotonic() - self._run_clock, 3)
        self.write()

    def write(self) -> None:
        """Replace the file on disk by what is known now."""
        content = {
            "state": self.state,
            "exit_code": self.exit_code,
            "error": self.error,
            "started": self.started,
            "seconds": self.seconds,
            "pid": os.getpid(),
            "process_started": psutil.Process().create_time(),  # another process may get the number
            "host": socket.gethostname(),
            "notebook": str(self.notebook),
            "output": str(self.output_path if self.kept else self.attempt_path),
            "parameters": self.parameters,
            "cells": [dataclasses.asdict(cell) for cell in self.cells],
        }
        replace_text(self.path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def touch(self) -> None:
        """Shows those on other machines, which see the file and not the process, that the run is
        going on.
        """
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def keep(self) -> None:
        """Give notebook, page and status the names of the outputs, if the run, which has ended, got
        as far as the one before.
        """
        if not self._got_as_far():
            return
        for ending in (".html", self.output_path.suffix):
            attempt, output = (
                attempt_at(self.output_path, ending),
                self.output_path.with_suffix(ending),
            )
            if attempt.exists():
                os.replace(attempt, output)
            else:
                output.unlink(missing_ok=True)  # of another run: it would be taken for this one's
        self.kept, attempt_status = True, self.path
        self.path = self.output_path.with_suffix(".status.json")
        self.write()
        attempt_status.unlink()

    def _got_as_far(self) -> bool:
        if self.state == "completed" or not self.output_path.exists():
            return True
        earlier = read_status(self.output_path.with_suffix(".status.json"))
        if (
            earlier.get("state", "completed") == "completed"
        ):  # without a status it is somebody's work
            return False
        return _completed(map(dataclasses.asdict, self.cells)) >= _completed(earlier["cells"])

    def closing_sentence(self) -> str:
        """For the person at the terminal: how it went, where it stopped, where the executed
        notebook is.
        """
        ended = next((cell for cell in self.cells if cell.state == self.state != "completed"), None)
        where = f" in cell {ended.index}/{len(self.cells)} “{ended.title}”" if ended else ""
        error = self.error or (ended and ended.error)
        reason = f": {error}" if error else ""
        earlier = (
            ""
            if self.kept
            else f"\n  that of an earlier run, which got further, stays: {self.output_path}"
        )
        notebook = self.output_path if self.kept else self.attempt_path
        return (
            f"[{self.notebook.stem}] {self.state}{where} after {clock(self.seconds)}{reason}\n "
            f" notebook: {notebook}{earlier}"
        )


def attempt_at(output_path: Path, ending: str) -> Path:
    """Where a file of a run lies, such as that with the ending ".html", while the outputs of an
    earlier run have its name.
    """
    return output_path.with_name(f"{output_path.stem}.attempt{ending}")


def read_status(path: Path) -> dict:
    """What the status file `path` says, its state "killed" where it says running and nobody runs
    it; empty without a file.

    On the machine that wrote it the process is looked for. From another one a file counts as left
    behind when nobody has touched it for `SILENT_SECONDS`. A file that holds anything else counts
    as none.
    """
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
        if status["state"] == "running" and not _is_alive(status, path.stat().st_mtime):
            status["state"] = "killed"
        _completed(status["cells"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return status


def newest_state(run_dir: Path) -> str:
    """What became of the last notebook that was run into `run_dir`, as `read_status` judges it;
    empty where none was.
    """
    files = sorted(
        (run_dir / "notebooks").glob("*.status.json"), key=lambda path: path.stat().st_mtime
    )
    return read_status(files[-1]).get("state", "") if files else ""


def _is_alive(status: dict, touched: float) -> bool:
    if status["host"] != socket.gethostname():
        return time.time() - touched < SILENT_SECONDS
    try:
        process = psutil.Process(status["pid"])
        same = (
            abs(process.create_time() - status["process_started"]) < 60
        )  # a clock that is set right moves it
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _completed(cells: Iterable[Mapping]) -> int:
    return sum(cell["state"] == "completed" for cell in cells)


def code_cells(nb: nbformat.NotebookNode) -> list[CellStatus]:
    """The code cells of a notebook with their titles, all pending."""
    heading = ""
    cells: list[CellStatus] = []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"^(```|~~~).*?^\1", "", cell.source, flags=re.DOTALL | re.MULTILINE)
            heading = next(
                reversed(re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, flags=re.MULTILINE)), heading
            )
        elif cell.cell_type == "code":
            first_line = next(
                (line.strip() for line in cell.source.splitlines() if line.strip()), "(empty)"
            )
            cells.append(CellStatus(len(cells) + 1, heading or first_line))
    return cells
