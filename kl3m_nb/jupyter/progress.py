"""A progress bar with the time left for work that is counted: one updated output in a notebook, one
updated line in a terminal.

Where nobody watches (a file, a pipe) a line every few seconds is enough, and the runner that
started a notebook hears of it too.

The runner of a notebook names a small file in `$KL3M_NB_PROGRESS`. Where the variable is not set, a
report costs one look-up.
"""

from __future__ import annotations

import html
import os
import sys
import time
from pathlib import Path

from IPython import get_ipython
from IPython.display import HTML, display

from kl3m_nb.common.files import replace_text
from kl3m_nb.common.text import clock, time_left

_WIDTH = 28


_TERMINAL_SECONDS, _NOTEBOOK_SECONDS, _LOG_SECONDS = 0.1, 0.5, 10.0


class ProgressBar:
    """Call it with (done, total), as `spectra.model_spectra(..., progress=ProgressBar("spectra"))`
    does.

    The time left follows from the pace since the first call that had something done: what came from
    a cache costs nothing and tells nothing of what is still to be computed, so it is an estimate
    that settles as work goes on.
    """

    def __init__(self, label: str):
        self.label = label
        self._began = time.monotonic()
        self._shown = -1e9
        self._handle = None
        self._in_notebook = getattr(get_ipython(), "kernel", None) is not None
        terminal = _TERMINAL_SECONDS if sys.stderr.isatty() else _LOG_SECONDS
        self._seconds = _NOTEBOOK_SECONDS if self._in_notebook else terminal

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        finished = done >= total
        if not finished and now - self._shown < self._seconds:
            return
        self._shown = now
        text = self.text(done, total, now - self._began)
        write_progress(f"{self.label}: {text}")
        if self._in_notebook:
            self._show(done / total, text)
        elif sys.stderr.isatty():
            filled = round(_WIDTH * done / total)
            bar = "█" * filled + "·" * (_WIDTH - filled)
            print(
                f"\r{self.label}  {bar}  {text}\033[K",
                end="\n" if finished else "",
                file=sys.stderr,
                flush=True,
            )
        else:
            print(f"{self.label}: {text}", file=sys.stderr, flush=True)
        if finished:  # the same bar may count the next round
            self._began, self._shown = now, -1e9

    @staticmethod
    def text(done: int, total: int, seconds: float) -> str:
        """ "210/841 · 0:36 left" on the way, "841/841 · took 0:48" at the end."""
        if done >= total:
            return f"{done:,}/{total:,} · took {clock(seconds)}"
        return (
            f"{done:,}/{total:,} · {time_left(seconds, done, total - done)} left"
            if done
            else f"0/{total:,}"
        )

    def _show(self, share: float, text: str) -> None:
        page = HTML(
            f"<div style='font-family:sans-serif;font-size:90%'>{html.escape(self.label)} <progress"
            f" value='{share:.4f}' max='1' style='width:24em'></progress> {html.escape(text)}</div>"
        )
        if self._handle is None:
            self._handle = display(page, display_id=True)
        else:
            self._handle.update(page)


PROGRESS_VARIABLE = "KL3M_NB_PROGRESS"


def write_progress(text: str) -> None:
    """Report one line, such as "step 120/300  loss 4.31  9,800 tokens/s  0:42 left"; without a
    runner nothing happens.

    A file that cannot be written (the runner is gone, the disk is full) is no reason to stop
    training: the line is lost.
    """
    path = os.environ.get(PROGRESS_VARIABLE)
    if not path:
        return
    try:
        replace_text(Path(path), " ".join(text.split()))
    except OSError:
        pass


def read_progress(path: Path) -> str:
    """The last line reported to `path`; empty when there is none yet."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
