"""The status file of a notebook run: what became of the run and of each of its code cells, written at every change.

Papermill keeps a status in the notebook too, but calls a cell `completed` that never ran once a kernel has died.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import nbformat

from kl3m_nb.progress import clock, replace_text


@dataclass
class CellStatus:
    """One code cell of a run; `seconds` stays None until it has ended, `error` is one line."""

    index: int
    title: str
    state: str = "pending"
    seconds: float | None = None
    error: str | None = None


class RunStatus:
    """What became of a run and of each of its code cells, written to `<stem>.status.json` at every change.

    A run is running, completed, failed or interrupted; a cell is pending, running, completed, failed, interrupted or not
    run. A run whose file says running although no process has its `pid` was killed. A cell's `index` counts the code cells
    of the executed notebook from 1, its title is the nearest heading above it or else its first line.
    """

    def __init__(self, notebook: Path, output_path: Path, parameters: dict[str, object]):
        self.path = output_path.with_suffix(".status.json")
        self.notebook, self.output_path, self.parameters = notebook, output_path, parameters
        self.state, self.exit_code, self.error = "running", None, None
        self.started, self.seconds = datetime.now(UTC).isoformat(timespec="seconds"), None
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
        cell.state, cell.error, cell.seconds = state, error, round(time.monotonic() - self._cell_clock, 3)
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
            "notebook": str(self.notebook),
            "output": str(self.output_path),
            "parameters": self.parameters,
            "cells": [dataclasses.asdict(cell) for cell in self.cells],
        }
        replace_text(self.path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def closing_sentence(self) -> str:
        """For the person at the terminal: how it went, where it stopped, where the executed notebook is."""
        ended = next((cell for cell in self.cells if cell.state == self.state != "completed"), None)
        where = f" in cell {ended.index}/{len(self.cells)} “{ended.title}”" if ended else ""
        error = self.error or (ended and ended.error)
        reason = f": {error}" if error else ""
        return f"[{self.notebook.stem}] {self.state}{where} after {clock(self.seconds)}{reason}\n  notebook: {self.output_path}"


def code_cells(nb: nbformat.NotebookNode) -> list[CellStatus]:
    """The code cells of a notebook with their titles, all pending."""
    heading, cells = "", []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"^(```|~~~).*?^\1", "", cell.source, flags=re.DOTALL | re.MULTILINE)
            heading = next(reversed(re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, flags=re.MULTILINE)), heading)
        elif cell.cell_type == "code":
            first_line = next((line.strip() for line in cell.source.splitlines() if line.strip()), "(empty)")
            cells.append(CellStatus(len(cells) + 1, heading or first_line))
    return cells
