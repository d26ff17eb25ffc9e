"""Watching a run: a callback for `training.train` that keeps one notebook output current and tells
the runner how far it is.

What is shown is drawn from metrics.jsonl, so after a closed browser tab or a crash `show_run` gives
the same picture again. `save_button` asks a run for a checkpoint, wherever it trains.
"""

from __future__ import annotations

import base64
import html
import io
import os
import time
from collections.abc import Mapping
from pathlib import Path

import ipywidgets as widgets
import matplotlib.pyplot as plt
from IPython.display import HTML, display
from matplotlib.figure import Figure

from kl3m_nb.common import paths
from kl3m_nb.common.text import time_left
from kl3m_nb.figures import training
from kl3m_nb.jupyter.progress import PROGRESS_VARIABLE, write_progress
from kl3m_nb.runs.folder import SAVE_REQUEST, request_checkpoint
from kl3m_nb.runs.metrics import read_metrics

_MOST_DRAWING = 0.02  # share of the time for which training may wait for figures


class LiveView:
    """Shows a run while it trains: `train(..., callbacks=[LiveView(run_dir)])`.

    Leaves its last picture in the notebook and nothing else: the save button is there only while
    the run trains, and only in a notebook that somebody looks at. The figure of a long run takes
    seconds, and is drawn the less often.
    """

    def __init__(
        self, run_dir: str | Path, text_seconds: float = 1.0, figure_seconds: float = 10.0
    ):
        self.run_dir = paths.resolve(run_dir)
        self._text_seconds, self._figure_seconds = text_seconds, figure_seconds
        self._handle = self._button = None
        self._header, self._figure, self._held_out = "", "", ""
        self._max_steps, self._first_step = 0, 0
        self._began = self._text_at = self._figure_due = 0.0
        self._last: Mapping = {}

    def __call__(self, row: Mapping) -> None:
        now = time.monotonic()
        match row["kind"]:
            case "start":
                self._began, self._first_step, self._max_steps = now, row["step"], row["max_steps"]
                self._header = f"{row['run']} · {row['runtime']}"
                self._draw_figure()  # of a run that is continued
                if PROGRESS_VARIABLE not in os.environ:  # nobody can press it in a headless run
                    self._button = display(save_button(self.run_dir), display_id=True)
                self._handle = display(HTML(self._page("starting")), display_id=True)
            case "train":
                self._last = row
                if now - self._text_at >= self._text_seconds:
                    self._text_at = now
                    text = self._progress_text()
                    write_progress(text)
                    if now >= self._figure_due:
                        self._draw_figure()
                    self._handle.update(HTML(self._page(text)))
            case "held_out":
                self._held_out = f"held-out {row['held_out_loss']:.3f}"
            case "end":
                # the notebook draws a finished run itself; one that was interrupted is shown as far
                # as it came
                self._figure = "" if row["step"] == row["max_steps"] else self._draw()
                text = self._progress_text()
                write_progress(text)
                if self._button is not None:
                    self._button.update(HTML(""))
                self._handle.update(HTML(self._page(text)))

    def _progress_text(self) -> str:
        step = self._last.get("step", self._first_step)
        parts = [f"step {step:,}/{self._max_steps:,}"]
        if self._last:
            parts += [
                f"loss {self._last['cross_entropy']:.3f}",
                f"{self._last['tokens_per_second']:,.0f} tokens/s",
            ]
        if self._held_out:
            parts.insert(2, self._held_out)
        if step > self._first_step:
            seconds = time.monotonic() - self._began
            parts.append(
                f"{time_left(seconds, step - self._first_step, self._max_steps - step)} left"
            )
        return " · ".join(parts)

    def _page(self, text: str) -> str:
        share = self._last.get("step", self._first_step) / max(1, self._max_steps)
        return (
            "<div"
            f" style='font-family:sans-serif;font-size:90%'><div>{html.escape(self._header)}</div>"
            f"<progress value='{share:.4f}' max='1' style='width:24em'></progress>"
            f" {html.escape(text)} · "
            # a tab that was closed meanwhile shows an old picture
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}</div>{self._figure}"
        )

    def _draw_figure(self) -> None:
        began = time.monotonic()
        self._figure = self._draw()
        drawn = time.monotonic()
        self._figure_due = drawn + max(self._figure_seconds, (drawn - began) / _MOST_DRAWING)

    def _draw(self) -> str:
        train, held_out = (
            read_metrics(self.run_dir, "train"),
            read_metrics(self.run_dir, "held_out"),
        )
        return (
            figure_html(training.plot_training(train, held_out)) if len(train) > 1 else ""
        )  # one step makes no line


def show_run(run_dir: str | Path) -> HTML:
    """The training figure of a run, drawn again from its metrics.jsonl: also for a run that is
    still going on elsewhere.
    """
    run_dir = paths.resolve(run_dir)
    train, held_out = read_metrics(run_dir, "train"), read_metrics(run_dir, "held_out")
    if train.empty:
        raise ValueError(
            f"{run_dir} holds no training metrics yet; start the run first, or name another."
        )
    return HTML(figure_html(training.plot_training(train, held_out)))


def save_button(run_dir: str | Path) -> widgets.Button:
    """A button that has the run save a checkpoint after its present step, in whichever process it
    trains.
    """
    button = widgets.Button(
        description="Save a checkpoint",
        tooltip=f"or: touch {paths.resolve(run_dir) / SAVE_REQUEST}",
        layout=widgets.Layout(width="max-content"),
    )
    # ipykernel 7.4 gives a click to the thread that made the button, which is busy training, unless
    # it is told to leave the click where the browser sends it: to a thread of its own
    button.comm._reply_subshell_for = lambda data, subshell: subshell

    def press(_) -> None:
        request_checkpoint(run_dir)
        button.description = f"Asked for at {time.strftime('%H:%M:%S')}"

    button.on_click(press)
    return button


def figure_html(figure: Figure) -> str:
    """`figure` as an <img> that carries its own data, and closes the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return (
        "<img alt='' style='max-width:100%'"
        f" src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"
    )
