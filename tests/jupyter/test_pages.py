"""Tests of the HTML pages: everything is in the file, nothing is fetched, what the notebook says
can be read.
"""

from __future__ import annotations

import base64
import hashlib
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from kl3m_nb.common.text import Sentences, SortableTable
from kl3m_nb.jupyter.pages import IndexEntry, export_html, write_index

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Page(HTMLParser):
    """What a browser would see: the elements, the text that is shown, the style sheets."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text, self.styles = "", ""
        self._in_style = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag):
        self._in_style = False

    def handle_data(self, data):
        if self._in_style:
            self.styles += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    def loaded(self) -> list[str]:
        """Every address a browser would fetch on its own, and every script."""
        found = [
            f"<{tag}>"
            for tag, _ in self.elements
            if tag in ("script", "link", "iframe", "object", "embed", "base")
        ]
        for tag, attributes in self.elements:
            for name, value in attributes.items():
                if name in ("src", "srcset", "poster", "data", "xlink:href") or (
                    name == "href" and tag != "a"
                ):
                    found += [] if value.startswith("data:") else [value]
                if name == "style" and "url(" in value:
                    found.append(value)
        return found + [word for word in ("@import", "url(") if word in self.styles]


@pytest.fixture
def notebook_page(tmp_path):
    def render(*cells: nbformat.NotebookNode, **metadata) -> Page:
        path = tmp_path / "executed.ipynb"
        nbformat.write(new_notebook(cells=list(cells), metadata=metadata), path)
        export_html(path, tmp_path / "page.html")
        return Page(tmp_path / "page.html")

    return render


def display(data: dict) -> nbformat.NotebookNode:
    return new_code_cell("show()", outputs=[new_output("display_data", data)])


def test_the_pages_own_parser_sees_what_a_browser_would_load(tmp_path):
    """The check below is only worth something if it can fail."""
    path = tmp_path / "loading.html"
    path.write_text(
        '<script src="a.js"></script><link href="b"><img src="http://c"><p'
        ' style="background:url(d)"><style>@import "e"'
    )
    assert len(Page(path).loaded()) == 6


def test_a_notebook_page_loads_nothing_even_if_the_notebook_wants_to(notebook_page):
    page = notebook_page(
        new_markdown_cell(
            "# The work\n\n![badge](https://example.org/badge.svg) and [a"
            " link](https://example.org/paper)"
        ),
        display(
            {
                "text/html": (
                    '<script src="https://example.org/x.js"></script><img'
                    ' src="https://example.org/x.png">'
                )
            }
        ),
        display(
            {
                "text/html": (
                    "<style>@import url(https://example.org/x.css); p { background:"
                    ' url("//example.org/y") }</style>'
                )
            }
        ),
        display(
            {
                "text/html": (
                    '<p style="background: url(https://example.org/z)">kept</p><video'
                    ' poster="//example.org/p"></video>'
                )
            }
        ),
        display(
            {"application/javascript": "fetch('https://example.org')", "text/plain": "a script"}
        ),
        display(
            {
                "application/vnd.jupyter.widget-view+json": {"model_id": "7"},
                "text/plain": "IntSlider(value=3)",
            }
        ),
        widgets={
            "application/vnd.jupyter.widget-state+json": {
                "state": {"7": {}},
                "version_major": 2,
                "version_minor": 0,
            }
        },
    )
    assert page.loaded() == []
    assert {"https://example.org/paper", "https://example.org/badge.svg"} <= {
        link["href"] for link in page.all("a")
    }
    assert "kept" in page.text and "IntSlider(value=3)" in page.text and "fetch(" not in page.text
    policy = next(
        meta["content"]
        for meta in page.all("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")


def test_a_notebook_page_shows_text_code_formulas_and_outputs(notebook_page):
    page = notebook_page(
        new_markdown_cell(
            "# Spectra & stacks\n\nThe ratio $\\sigma_1/\\sigma_{min} < \\tau$ of *W*."
        ),
        new_code_cell(
            "loss = 4.02",
            outputs=[new_output("stream", name="stdout", text="\x1b[32mgreen\x1b[0m step 3\n")],
        ),
        display({"text/html": "<table><tr><td>3.91</td></tr></table>"}),
        display({"image/png": base64.b64encode(PIXEL).decode()}),
    )
    assert "$\\sigma_1/\\sigma_{min} < \\tau$" in page.text
    assert page.text.split()[:3] == [
        "Spectra",
        "&",
        "stacks",
    ], "the first heading is the title of the page"
    assert "loss = 4.02" in page.text and "green step 3" in page.text and "3.91" in page.text
    (image,) = page.all("img")
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == PIXEL
    assert image["alt"] == "Figure: Spectra & stacks"


def test_an_image_beside_the_notebook_is_embedded(notebook_page, tmp_path):
    (tmp_path / "figure.png").write_bytes(PIXEL)
    page = notebook_page(new_markdown_cell("![The figure](figure.png)"))
    (image,) = page.all("img")
    assert (
        image["alt"] == "The figure" and base64.b64decode(image["src"].partition(",")[2]) == PIXEL
    )


def test_inline_html_around_links_survives(notebook_page):
    """Papermill marks a failed cell that way."""
    page = notebook_page(
        new_markdown_cell(
            '<span style="color:red">Stopped at \'<a href="#there">In [7]</a>\'.</span>'
        )
    )
    assert page.all("a") == [{"href": "#there"}] and "Stopped at 'In [7]'." in page.text


def test_the_index_holds_entries_tables_and_figures(tmp_path):
    image = tmp_path / "loss.png"
    image.write_bytes(PIXEL)
    frame = pd.DataFrame(
        {"model": ["source", "a<b"], "tokens": [1_024_000, 12], "loss": [4.44321, float("nan")]}
    )
    write_index(
        tmp_path / "index.html",
        "Growth & <training>",
        '<p>Two <b>runs</b>, see <a href="https://example.org">the paper</a>.</p>',
        [
            IndexEntry(
                "00 Source", "Trains 3 layers.", "notebooks/00.html", "completed", 125.0, image
            ),
            IndexEntry(
                "02 <Training>", "Goes on `a < b` times.", "notebooks/02.html", "not run", 0.0
            ),
        ],
        tables=[("Losses", frame)],
        figures=[("Loss over tokens", image)],
    )
    page = Page(tmp_path / "index.html")
    assert page.loaded() == []
    assert [link["href"] for link in page.all("a")] == [
        "https://example.org",
        "notebooks/00.html",
        "notebooks/02.html",
    ]
    assert [figure["alt"] for figure in page.all("img")] == ["", "Loss over tokens"]
    for text in (
        "Growth & <training>",
        "02 <Training>",
        "completed 2:05",
        "not run",
        "1,024,000",
        "4.443",
        "–",
        "a<b",
    ):
        assert text in page.text, text
    assert "Goes on <code>a &lt; b</code> times." in (tmp_path / "index.html").read_text()
    assert "0:00" not in page.text
    assert list(tmp_path.glob(".*")) == [], "no temporary file stays"


def test_an_index_of_nothing_but_entries_is_a_whole_page(tmp_path):
    write_index(tmp_path / "index.html", "Runs", "", [])
    page = Page(tmp_path / "index.html")
    assert page.loaded() == [] and "Runs" in page.text
    assert not page.all("table") and not page.all("figure")


def test_a_page_runs_the_script_that_sorts_its_tables_and_no_other(tmp_path):
    for shown, sortable in (
        (SortableTable(pd.DataFrame({"a": [2.5]})), True),
        (Sentences("a"), False),
    ):
        html = f"{shown._repr_html_()}<script>planted()</script>"
        output = nbformat.v4.new_output("display_data", {"text/html": html})
        cell = nbformat.v4.new_code_cell("1", outputs=[output])
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "a.ipynb")
        export_html(tmp_path / "a.ipynb", tmp_path / "a.html")
        text = (tmp_path / "a.html").read_text()
        assert "planted()</script>" not in text and text.count("<script>") == sortable
        scripts = [part.split("</script>")[0] for part in text.split("<script>")[1:]]
        digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
        assert all(f"script-src 'sha256-{digest}'" in text for digest in digests)
        assert ("script-src" in text) == sortable
