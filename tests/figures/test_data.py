from __future__ import annotations

import pandas as pd
import pytest

from kl3m_nb.data import tokenizer
from kl3m_nb.figures import data
from tests.data.test_tokenizer import TEXTS
from tests.figures.test_training import drawn, texts


@pytest.fixture
def documents():
    rows = (
        [("training", "usc", 10 + i) for i in range(30)]
        + [("training", "cfr", 400)]
        + [("held out", "usc", 7)] * 2
    )
    return pd.DataFrame(rows, columns=["part", "domain", "tokens"])


def test_domains_are_counted_in_documents_and_tokens(documents):
    counts, tokens = drawn(data.plot_documents(documents))
    widths = [sorted(bar.get_width() for bar in axes.patches) for axes in (counts, tokens)]
    assert widths == [[0, 1, 2, 30], [0, 14, 400, sum(range(10, 40))]]


def test_lengths_show_every_document_the_median_and_the_window(documents):
    figure = data.plot_token_lengths(documents, 64)
    figure.canvas.draw()
    axes, share = figure.axes
    assert sum(bar.get_height() for bar in axes.patches) == len(documents)
    assert (
        share.lines[0].get_ydata()[-1] == pytest.approx(100)
        and share.lines[0].get_xdata()[-1] == 400
    )
    assert "median 24" in texts(figure) and "window 64" in texts(figure)


def test_nothing_to_draw_is_said(documents):
    with pytest.raises(ValueError, match="nothing to draw"):
        data.plot_documents(documents.assign(tokens=0))


def test_a_window_shows_each_document_with_its_number_and_length():
    trained = tokenizer.train_tokenizer(TEXTS, 600)
    first, second = trained.encode("a <b> & c"), trained.encode("tail")
    page = data.window_html([*first, 1, *second], trained).data
    assert f"[1: {len(first) + 1} tokens]" in page and f"[2: {len(second)} tokens]" in page
    assert "a &lt;b&gt; &amp; c&lt;|end|&gt;" in page and page.count("<span") == 2


def test_tokens_are_counted_and_blanks_are_seen():
    trained = tokenizer.train_tokenizer(TEXTS, 600, "unorthodox")
    page = data.tokens_html("in this\nway", {"unorthodox": trained}).data
    count = len(trained.encode("in this\nway"))
    assert f"{count} tokens, 2 of them only blanks" in page and page.count("<span") == count
    assert ">·<" in page and ">⏎<" in page


def test_a_domain_with_dollar_signs_is_no_formula():
    documents = pd.DataFrame(
        {"domain": [r"$\frac$", "fees of $5 and $6"], "part": "training", "tokens": [5, 6]}
    )
    figure = data.plot_documents(documents)
    figure.canvas.draw()
    assert [label.get_text().replace("\\$", "$") for label in figure.axes[0].get_yticklabels()] == [
        *documents.domain
    ]
