"""How our objects and findings show themselves: as plain tables and lines that read well in light and dark pages."""

from __future__ import annotations

import difflib
import html
from collections.abc import Iterable, Mapping


def table_html(rows: Mapping[str, object]) -> str:
    """`rows` as an HTML table, names in bold on the left, everything escaped."""
    cell = "style='text-align:left;vertical-align:top'"
    body = "".join(
        f"<tr><th {cell}>{html.escape(name)}</th><td {cell}>{html.escape(str(value))}</td></tr>" for name, value in rows.items()
    )
    return f"<table style='max-width:70em'>{body}</table>"


class Sentences:
    """Sentences, each on a line of its own. JupyterLab breaks what is printed in the middle of a word, and this between words."""

    def __init__(self, sentences: Iterable[str]):
        self._sentences = list(sentences)

    def __repr__(self) -> str:
        return "\n".join(self._sentences)

    def _repr_html_(self) -> str:
        return "".join(f"<div style='max-width:70em'>{html.escape(sentence)}</div>" for sentence in self._sentences)


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """ " (did you mean a or b?)" with what of `known` is spelled like `name`; empty when nothing is."""
    close = difflib.get_close_matches(str(name), list(known), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
