"""How objects, findings and durations are shown: plain tables, sentences and times that read well
in light and dark pages.
"""

from __future__ import annotations

import difflib
import html
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def table_html(rows: Mapping[str, object]) -> str:
    """`rows` as an HTML table, names in bold on the left, everything escaped."""
    cell = "style='text-align:left;vertical-align:top'"
    body = "".join(
        f"<tr><th {cell}>{html.escape(name)}</th><td {cell}>{html.escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table style='max-width:70em'>{body}</table>"


class SortableTable:
    """A frame as a table in a box of its own that scrolls. On an exported page a click on a column
    sorts by it.
    """

    def __init__(self, frame: pd.DataFrame):
        self._frame = frame

    def __repr__(self) -> str:
        return repr(self._frame)

    def _repr_html_(self) -> str:
        readable = self._frame.rename(columns=lambda name: str(name).replace("_", " "))
        table = readable.to_html(
            classes="sortable", index=False, border=0, na_rep="–", float_format="{:,.6g}".format
        )
        return f"<div class='tall' style='max-height:42rem;overflow:auto'>{table}</div>"


class Sentences:
    """Sentences, each on a line of its own. JupyterLab breaks what is printed in the middle of a
    word, and this between words.
    """

    def __init__(self, sentences: Iterable[str]):
        self._sentences = list(sentences)

    def __repr__(self) -> str:
        return "\n".join(self._sentences)

    def _repr_html_(self) -> str:
        return "".join(
            f"<div style='max-width:70em'>{html.escape(sentence)}</div>"
            for sentence in self._sentences
        )


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """ " (did you mean a or b?)" with what of `known` is spelled like `name`; empty
    when nothing is.
    """
    close = difflib.get_close_matches(str(name), list(known), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def time_left(seconds: float, done: int, remaining: int) -> str:
    """What `remaining` things will take, as people read it, at the pace of those `done` (1 or more)
    in `seconds`.

    From the whole time of a run, evaluations, clamps and checkpoints are counted in, and one slow
    step is not taken for all.
    """
    return clock(seconds / done * remaining)


def clock(seconds: float) -> str:
    """A duration in seconds as people read it: "0:42", "12:05", "3:00:00", "4 d 7 h"."""
    if seconds >= 2 * 86_400:
        return f"{seconds // 86_400:.0f} d {seconds % 86_400 // 3600:.0f} h"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
