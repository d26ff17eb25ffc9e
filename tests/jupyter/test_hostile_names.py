"""Names, texts, identifiers, columns, prompts and samples come from others: on a page, and in
JupyterLab, they are text alone.
"""

from __future__ import annotations

import ast
import dataclasses
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from transformers import AutoModelForCausalLM, AutoTokenizer

from kl3m_nb.common import paths
from kl3m_nb.common.text import Sentences, SortableTable, table_html
from kl3m_nb.evaluation.generation import Gallery, Sample, Sampling
from kl3m_nb.figures.data import tokens_html, window_html
from kl3m_nb.growth import speedups
from kl3m_nb.growth.stacking import StackSummary
from kl3m_nb.jupyter import live, progress, prompt_box
from kl3m_nb.jupyter.pages import IndexEntry, export_html, write_index
from kl3m_nb.jupyter.prompt_box import PromptBox
from kl3m_nb.model.estimate import estimate
from kl3m_nb.spectra.subject import Subject
from tests.conftest import small_profile

HOSTILE = (
    """'"--></td></title></style><img src=x onerror="planted()">"""
    "<script>planted()</script><svg onload=planted()></svg>"
)


class _Planted(HTMLParser):
    """What came of `HOSTILE` in a page: elements and attributes of its own, and whether it can be
    read.
    """

    def __init__(self, page: str):
        super().__init__()
        self.found, self.text, self._inside = [], "", ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self._inside = tag
        self.found += [name for name, value in attrs if name.startswith("on")]
        if tag in ("script", "svg", "iframe") or (
            tag == "img" and not dict(attrs)["src"].startswith("data:image/")
        ):
            self.found.append(tag)
        self.text += " ".join(value for name, value in attrs if name in ("title", "alt") and value)

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside != "style":
            self.text += data


class _Tokenizer:
    """A byte is a token; the text of each is hostile."""

    eos_token_id = 1

    def encode(self, text, **_):
        return list(text.encode())

    def decode(self, tokens):
        return HOSTILE


def _notebook_table() -> str:
    """The table of domains as notebook 00 makes it."""
    documents = pd.DataFrame(
        {"domain": [HOSTILE, "b"], "part": ["training", "held out"], "tokens": [5, 7]}
    )
    cells = nbformat.read(paths.notebooks_dir() / "00_source_model.ipynb", as_version=4).cells
    (source,) = (cell.source for cell in cells if 'pivot_table("tokens", "domain"' in cell.source)
    *statements, last = ast.parse(source).body
    namespace = {"documents": documents, "pd": pd}
    exec(compile(ast.Module(statements, []), "cell", "exec"), namespace)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)._repr_html_()


def _live_page() -> str:
    view = live.LiveView("run")
    view._header = HOSTILE
    return view._page(HOSTILE)


def _bar() -> str:
    pages = []
    bar = progress.ProgressBar(HOSTILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "display", lambda page, **_: pages.append(page.data))
        bar._show(0.5, HOSTILE)
    return pages[0]


def _sample() -> Sample:
    return Sample(HOSTILE, HOSTILE, (3,), (4, 5), (), 0.1)


def _choices() -> str:
    choice = prompt_box.TokenChoice(HOSTILE, 0.5, 1, ((HOSTILE, 0.5),))
    return prompt_box.choices_html(HOSTILE, [choice])


def _growth() -> str:
    curve = pd.DataFrame(
        {
            "step": [0, 9],
            "tokens": [0, 9],
            "seconds": [0, 9.0],
            "flops": [0, 9.0],
            "held_out_loss": [5.0, 3.0],
        }
    )
    comparison = speedups.compare_growth(curve, curve, curve)
    comparison.losses.loc[1:, "run"] = HOSTILE  # the source is asked for by its name
    return comparison._repr_html_()


def _summary() -> str:
    return StackSummary(
        HOSTILE, {HOSTILE: "0"}, HOSTILE, 2, HOSTILE, 0.0, 0, 1, 2, (0, 0), 5
    )._repr_html_()


def _profile():
    profile = small_profile()
    return dataclasses.replace(
        profile, name=HOSTILE, data=dataclasses.replace(profile.data, source=f"files:{HOSTILE}")
    )


RENDERERS = {
    "notebook 00's table": _notebook_table,
    "table_html": lambda: table_html({HOSTILE: HOSTILE}),
    "Sentences": lambda: Sentences([HOSTILE])._repr_html_(),
    "window_html": lambda: window_html([3, 4, 1, 5], _Tokenizer()).data,
    "tokens_html": lambda: tokens_html(HOSTILE, {HOSTILE: _Tokenizer()}).data,
    "Gallery": lambda: Gallery([_sample()])._repr_html_(),
    "choices_html": _choices,
    "LiveView": _live_page,
    "ProgressBar": _bar,
    "GrowthComparison": _growth,
    "StackSummary": _summary,
    "Profile": lambda: _profile()._repr_html_(),
    "Estimate": (
        lambda: dataclasses.replace(estimate(small_profile()), assumed=HOSTILE)._repr_html_()
    ),
    "DataFrame": lambda: pd.DataFrame({HOSTILE: [HOSTILE]}, index=[HOSTILE])._repr_html_(),
    "SortableTable": (
        lambda: SortableTable(pd.DataFrame({HOSTILE: [HOSTILE], "σ": [1.0]}))._repr_html_()
    ),
    "Subject": lambda: Subject(HOSTILE, Path(HOSTILE), 4, 2, start=HOSTILE)._repr_html_(),
}


@pytest.mark.parametrize("renderer", RENDERERS)
def test_what_others_wrote_is_shown_as_text(renderer):
    seen = _Planted(RENDERERS[renderer]())
    assert not seen.found
    assert "planted()" in seen.text


def test_a_prompt_box_shows_names_prompts_samples_and_errors_as_text(trained_run):
    checkpoint = trained_run[1].checkpoint
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    prompt = "<img src=x onerror=planted()>"
    box = PromptBox(
        {HOSTILE: model}, {HOSTILE: tokenizer}, [prompt], Sampling(max_new_tokens=4), seed=5
    )
    assert not _Planted(box.gallery).found
    box.write().join()
    values = [shown.value for shown in (*box.texts, *box.states)]
    box.prompt.value = HOSTILE * 50  # too long: the sentence names what it was given
    box.write().join()
    values += [shown.value for shown in (*box.texts, *box.states)]
    assert not any(_Planted(value).found for value in values)
    assert any("planted()" in _Planted(value).text for value in values)


def test_pages_show_what_others_wrote_as_text(tmp_path):
    picture = tmp_path / "figure.png"
    picture.write_bytes(b"")
    table = pd.DataFrame({HOSTILE: [HOSTILE]})
    entry = IndexEntry(HOSTILE, HOSTILE, "#", HOSTILE, 1.0)
    write_index(
        tmp_path / "index.html",
        HOSTILE,
        "",
        [entry],
        tables=[(HOSTILE, table)],
        figures=[(HOSTILE, picture)],
    )
    seen = _Planted((tmp_path / "index.html").read_text())
    assert not seen.found and "planted()" in seen.text


def test_the_text_of_an_output_stays_text_in_a_page(tmp_path):
    outputs = [
        new_output("stream", text=HOSTILE),
        new_output("execute_result", {"text/plain": HOSTILE}),
    ]
    notebook = new_notebook(
        cells=[new_markdown_cell("# Title"), new_code_cell("1", outputs=outputs)]
    )
    nbformat.write(notebook, tmp_path / "a.ipynb")
    export_html(tmp_path / "a.ipynb", tmp_path / "a.html")
    seen = _Planted((tmp_path / "a.html").read_text())
    assert not seen.found and seen.text.count("planted()") >= 4


def test_no_notebook_uses_pandas_styler_which_escapes_nothing():
    for path in paths.notebooks_dir().glob("*.ipynb"):
        sources = [
            cell.source
            for cell in nbformat.read(path, as_version=4).cells
            if cell.cell_type == "code"
        ]
        assert not [source for source in sources if ".style" in source.replace("use_style", "")], (
            path.name
        )
