"""Pages that need no network: an executed notebook as HTML, and the index that links a run's pages.

nbconvert renders the cells; the page around them is ours, because nbconvert's own loads scripts
from CDNs. Images are embedded, and a content security policy makes the browser refuse whatever
would still be loaded. No page has a script but the one that sorts its tables, which the policy
names by its hash. Formulas stay as they are written in the markdown.
"""

from __future__ import annotations

import base64
import hashlib
import mimetypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from kl3m_nb.common.files import replace_text
from kl3m_nb.common.text import clock

if TYPE_CHECKING:
    import pandas as pd


_STATIC_FORMATS = [
    "text/html",
    "text/markdown",
    "image/svg+xml",
    "image/png",
    "image/jpeg",
    "text/latex",
    "text/plain",
]


_LOADING_ATTRIBUTES = {"src", "srcset", "href", "xlink:href", "poster", "data", "background"}


_LOADING_STYLE = re.compile(r"@import[^;]*;?|url\(\s*(?!['\"]?(?:data:|#))[^)]*\)", re.IGNORECASE)


@dataclass(frozen=True)
class IndexEntry:
    """One linked page of an index: `link` is relative to it, `state` shown as it is, `seconds`
    unless there are none.

    `title` and `description` are text in which backticks enclose code.
    """

    title: str
    description: str
    link: str
    state: str
    seconds: float
    thumbnail: Path | None = None


def export_html(notebook_path: Path, html_path: Path) -> None:
    """Write the notebook at `notebook_path`, as it was executed, as one self-contained page.

    What the notebook itself would load (a remote image in its markdown, a script in an output) is
    left out or becomes a link. A table of the class `sortable` is sorted by a click on a column.
    """
    notebook_path, html_path = Path(notebook_path), Path(html_path)
    nb = nbformat.read(notebook_path, as_version=4)
    nb.metadata.pop("widgets", None)
    heading = _describe_figures(nb)
    exporter = HTMLExporter(
        template_name="basic",
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
        config=Config({"NbConvertBase": {"display_data_priority": _STATIC_FORMATS}}),
    )
    folder = {"metadata": {"path": str(notebook_path.parent), "name": notebook_path.stem}}
    cells, _ = exporter.from_notebook_node(nb, resources=folder)
    body = _self_contained(cells, notebook_path.parent)
    script = _SORT if BeautifulSoup(body, "html.parser").select("table.sortable") else ""
    replace_text(html_path, _page(heading or notebook_path.stem, "notebook", body, script))


def write_index(
    path: Path,
    title: str,
    intro_html: str,
    entries: Sequence[IndexEntry],
    *,
    tables: Sequence[tuple[str, pd.DataFrame]] = (),
    figures: Sequence[tuple[str, Path]] = (),
) -> None:
    """Write a self-contained index page.

    Args:
        intro_html: inserted as it is, below the title.
        tables: a heading and a frame each; the frame's index is not shown.
        figures: a caption and the path of an image (PNG, JPEG, SVG) each, embedded.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<div class="intro">{_self_contained(intro_html, Path(path).parent)}</div>',
    ]
    parts += [f'<ol class="entries">{"".join(map(_entry, entries))}</ol>']
    for heading, frame in tables:
        counts = {column: "{:,}".format for column in frame.select_dtypes("integer")}
        table = frame.to_html(
            index=False, border=0, na_rep="–", float_format=_number, formatters=counts
        )
        parts.append(
            f'<section><h2>{escape(heading)}</h2><div class="scroll">{table}</div></section>'
        )
    for caption, image in figures:
        parts.append(figure_tag(image, caption))
    replace_text(Path(path), _page(title, "index", "\n".join(parts)))


def figure_tag(image: Path, caption: str) -> str:
    """A figure with its caption, the picture (PNG, JPEG, SVG) embedded."""
    return f"<figure>{_image(image, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def _entry(entry: IndexEntry) -> str:
    thumbnail = _image(entry.thumbnail, "") if entry.thumbnail else ""
    return (
        f'<li><a href="{escape(entry.link)}">{thumbnail}<span'
        f' class="title">{_inline_code(escape(entry.title))}</span></a>'
        f"<p>{_inline_code(escape(entry.description))}</p>"
        '<p class="facts"><span class="state'
        f' {escape(entry.state.replace(" ", "-"))}">{escape(entry.state)}</span> '
        f"{clock(entry.seconds) if entry.seconds else ''}</p></li>"
    )


def _inline_code(text: str) -> str:
    """Escaped text, as code where markdown's backticks enclose it."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def _image(path: Path, alternative: str) -> str:
    return f'<img src="{_data_address(path)}" alt="{escape(alternative)}">'


def _data_address(path: Path) -> str:
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"data:{mimetypes.guess_type(path)[0]};base64,{content}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _describe_figures(nb: nbformat.NotebookNode) -> str:
    """Give every image the heading above it as its text alternative; returns the notebook's first
    heading.
    """
    first, heading = "", ""
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            for line in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", cell.source, flags=re.MULTILINE):
                heading = line
                first = first or line
        for output in cell.get("outputs", []):
            for kind in ("image/png", "image/jpeg"):
                if kind in output.get("data", {}):
                    output.metadata.setdefault(kind, {}).setdefault("alt", f"Figure: {heading}")
    return first


def _self_contained(html: str, folder: Path) -> str:
    """`html` with the images of `folder` embedded and nothing left that a browser would run or
    fetch; links stay links.
    """
    soup = BeautifulSoup(html, "html.parser")
    for element in soup(["script", "link", "base", "iframe", "object", "embed"]):
        element.decompose()
    for image in soup("img", src=True):
        address = image["src"]
        if address.startswith("data:"):
            continue
        if (folder / address).is_file():
            image["src"] = _data_address(folder / address)
        else:
            link = soup.new_tag("a", href=address)
            link.string = address
            image.replace_with(link)
    for element in soup(True):
        for attribute in (
            _LOADING_ATTRIBUTES.intersection(element.attrs)
            if element.name not in ("a", "area")
            else ()
        ):
            if not element[attribute].startswith(("data:", "#")):
                del element[attribute]
        if element.has_attr("style"):
            element["style"] = _LOADING_STYLE.sub("none", element["style"])
        if element.name == "style" and element.string:
            element.string.replace_with(_LOADING_STYLE.sub("", element.string))
    return str(soup)


def _page(title: str, kind: str, body: str, script: str = "") -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
        policy += f"; script-src 'sha256-{digest}'"
    light = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>
{light}
@media (prefers-color-scheme: dark) {{
{dark}
}}
{_STYLE}
</style>
</head>
<body>
<main class="{kind}">
{body}
</main>
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


_STYLE, _SORT = (
    (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
    for name in ("page.css", "sort.js")
)
