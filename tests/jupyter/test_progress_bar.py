"""Progress in a log, in a terminal and for the runner."""

from __future__ import annotations

import io
import sys

import pytest

from kl3m_nb.jupyter import progress
from kl3m_nb.jupyter.progress import PROGRESS_VARIABLE, read_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets by hand."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_follows_from_the_pace():
    assert progress.ProgressBar.text(10, 40, 20.0) == "10/40 · 1:00 left"
    assert progress.ProgressBar.text(0, 1000, 20.0) == "0/1,000"
    assert progress.ProgressBar.text(40, 40, 81.0) == "40/40 · took 1:21"


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(monkeypatch, clock):
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    bar = progress.ProgressBar("spectra")
    for done in range(1, 31):
        clock[0] = float(done)
        bar(done, 30)
    lines = written.getvalue().splitlines()
    assert lines == [
        "spectra: 1/30 · 0:29 left",
        "spectra: 11/30 · 0:19 left",
        "spectra: 21/30 · 0:09 left",
        "spectra: 30/30 · took 0:30",
    ]


def test_a_terminal_sees_one_line_that_grows(monkeypatch, clock):
    written = Terminal()
    monkeypatch.setattr(sys, "stderr", written)
    bar = progress.ProgressBar("copies")
    for done in (1, 2, 4):
        clock[0] += 1.0
        bar(done, 4)
    assert written.getvalue().count("\n") == 1 and written.getvalue().count("\r") == 3
    assert "█" * 14 + "·" * 14 in written.getvalue() and written.getvalue().endswith(
        "took 0:03\033[K\n"
    )


def test_the_runner_hears_of_it(monkeypatch, clock, tmp_path):
    monkeypatch.setenv(PROGRESS_VARIABLE, str(tmp_path / "progress"))
    bar = progress.ProgressBar("spectra")
    clock[0] = 5.0
    bar(1, 3)
    assert read_progress(tmp_path / "progress") == "spectra: 1/3 · 0:10 left"
