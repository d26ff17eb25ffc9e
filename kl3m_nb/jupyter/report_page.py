"""A report as it grows: sentences for its head, sections of figures and tables, and the settings at
its end.

The page needs no network; each figure lies beside it as PNG and PDF with its data as CSV.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from kl3m_nb.figures.style import save_figure
from kl3m_nb.jupyter.pages import figure_tag, write_page


@dataclass
class ReportPage:
    """What has been found so far, in the order of the page; figures are saved in `folder`/figures
    as they come.
    """

    folder: Path
    sentences: list[str] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Begins a section."""
        self.sections.append(f"<h2>{escape(text)}</h2>")

    def figure(self, figure: Figure, name: str, caption: str, data: pd.DataFrame) -> None:
        """Saves `figure` and the `data` it was drawn from under `name`, and shows it."""
        self.sections.append(
            figure_tag(save_figure(figure, self.folder / "figures", name, data), caption)
        )

    def write(
        self, path: Path, title: str, settings: Mapping[str, object], script: str = ""
    ) -> Path:
        """Writes the page and returns its path."""
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
            for name, value in settings.items()
        )
        sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in self.sentences)
        head = f"<h1>{escape(title)}</h1><ul>{sentences}</ul>"
        table = (
            '<h2>Settings</h2><div class="scroll text_cell_render"><table'
            f' class="settings">{rows}</table></div>'
        )
        write_page(path, title, "\n".join([head, *self.sections, table]), script)
        return path
