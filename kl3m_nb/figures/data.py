"""Looking at the data: documents by domain, their lengths in tokens, a packed window, a sentence
cut into tokens.

The first two are figures. Windows and tokens are text, so they are shown as HTML; their colours are
told apart again by a number or a frame, and they read well in light and dark pages.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from kl3m_nb.figures.style import BLACK, BLUE, ORANGE, SEQUENCE, VERMILLION, plain_log_axis, styled

_MOST_DOMAINS = 15


_TINT = "4D"  # 30% opaque, over whatever the page's own background is


_MONOSPACE = (
    "font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.6;"
    "max-width:75em"
)


@styled
def plot_documents(documents: pd.DataFrame) -> Figure:
    """How many documents and tokens each domain has, training and held out. Raises ValueError
    without documents.

    `documents` has a row a document: part ("training" or "held out"), domain, tokens. Of many
    domains the largest are shown.
    """
    _require_documents(documents)
    by_size = documents.groupby("domain").tokens.sum().sort_values()
    shown = by_size.index[-_MOST_DOMAINS:]
    names = [str(name).replace("$", r"\$") for name in shown]  # two of them would enclose a formula
    figure, panels = plt.subplots(1, 2, figsize=(12, 1.6 + 0.42 * len(shown)), sharey=True)
    for axes, title, counted in zip(panels, ("Documents", "Tokens"), ("size", "sum"), strict=True):
        counts = (
            documents.groupby(["domain", "part"])
            .tokens.agg(counted)
            .unstack(fill_value=0)
            .loc[shown]
        )
        left = np.zeros(len(shown))
        for part, color in (("training", BLUE), ("held out", ORANGE)):
            if part in counts:
                axes.barh(
                    names, counts[part], left=left, color=color, edgecolor="white", label=part
                )
                left += counts[part].to_numpy()
        for place, total in enumerate(left):
            axes.text(total, place, f" {total:,.0f}", va="center")
        axes.set(title=title, xlabel=title.lower(), xlim=(0, 1.2 * left.max()))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_major_locator(plt.MaxNLocator(4))
        axes.grid(axis="y", visible=False)
    panels[0].set_ylabel("domain")
    panels[1].legend(loc="lower right")
    return figure


@styled
def plot_token_lengths(documents: pd.DataFrame, seq_len: int) -> Figure:
    """Histogram of document lengths, and the share of all tokens that documents up to a length
    hold.

    `documents` as in `plot_documents`; `seq_len` tokens are a window. Raises ValueError without
    documents.
    """
    _require_documents(documents)
    lengths = np.sort(documents.tokens[documents.tokens > 0].to_numpy())
    figure, axes = plt.subplots(figsize=(12, 4))
    edges = np.unique(np.geomspace(lengths[0], lengths[-1] + 1, 41).round())
    axes.hist(lengths, bins=edges, color=BLUE, edgecolor="white", label="documents")
    plain_log_axis(axes.xaxis)
    axes.set(xlabel="tokens of a document", ylabel="documents", title="Length of documents")
    share = axes.twinx()
    share.plot(
        lengths,
        100 * np.cumsum(lengths) / lengths.sum(),
        color=VERMILLION,
        label="tokens in documents up to this length",
    )
    share.set(ylim=(0, 103), ylabel="% of all tokens")
    share.grid(visible=False)
    share.spines.right.set_visible(True)
    median = np.median(lengths)
    axes.axvline(median, color=BLACK, linestyle="--", linewidth=1.2, label=f"median {median:,.0f}")
    axes.axvline(seq_len, color=ORANGE, linestyle="-.", linewidth=1.8, label=f"window {seq_len:,}")
    handles = [handle for panel in (axes, share) for handle in panel.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="upper left")
    return figure


def window_html(window: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> HTML:
    """A packed window, token ids of length seq_len + 1, its documents numbered and coloured;
    `<|end|>` closes each.
    """
    pieces, document = [], []
    for place, token in enumerate(window):
        document.append(int(token))
        if token == tokenizer.eos_token_id or place == len(window) - 1:
            number = len(pieces) + 1
            text = html.escape(tokenizer.decode(document))
            pieces.append(_tinted(f"<b>[{number}: {len(document)} tokens]</b> {text}", number - 1))
            document = []
    return HTML(f"<div style='{_MONOSPACE}'>{''.join(pieces)}</div>")


def tokens_html(sentence: str, tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> HTML:
    """`sentence` cut into tokens by each of `tokenizers`, a row each; a line break inside a token
    is shown as ⏎, a blank as ·.
    """
    rows = []
    for name, tokenizer in tokenizers.items():
        ids = tokenizer.encode(sentence, add_special_tokens=False)
        texts = [tokenizer.decode([token]).replace(" ", "·").replace("\n", "⏎") for token in ids]
        boxes = "".join(_tinted(html.escape(text), place % 2) for place, text in enumerate(texts))
        alone = sum(not text.strip("·⏎") for text in texts)
        count = f"{len(ids)} tokens, {alone} of them only blanks"
        rows.append(f"<p style='{_MONOSPACE}'><b>{html.escape(name)}</b>: {count}<br>{boxes}</p>")
    return HTML("".join(rows))


def _tinted(content: str, number: int) -> str:
    color = SEQUENCE[number % (len(SEQUENCE) - 1)]  # the last is black
    style = (
        f"background:{color}{_TINT};border:1px solid {color};border-radius:3px;padding:1px 2px;"
        "-webkit-box-decoration-break:clone;box-decoration-break:clone"
    )
    return f"<span style='{style}'>{content}</span>"


def _require_documents(documents: pd.DataFrame) -> None:
    if not documents.tokens.sum():
        raise ValueError(
            f"There is nothing to draw in {len(documents)} documents; give a table with at least"
            " one that has tokens."
        )
