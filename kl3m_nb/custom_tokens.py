"""The family's custom tokens: fragments that legal and structured text is full of, given an entry of their own.

All are ASCII, so that a byte-level decoder gives them back as they are. Words and numbers match between word borders only:
otherwise the numeral `iv` would cut `div` in two.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from string import ascii_lowercase, ascii_uppercase

from tokenizers import AddedToken

MARKDOWN = [
    *("#" * n for n in range(2, 7)), *("*" * n for n in (2, 3)), "__", "~~", "```", "---", "***", "===", "- [ ]", "- [x]", "](",
    "![", "|---", "|:--", "--|", ":-:", "> >",
]  # fmt: skip
_HTML_NAMES = (
    "html head title body div span p br hr a ul ol li dl dt dd table thead tbody tfoot tr td th caption h1 h2 h3 h4 h5 h6 b i u "
    "s em strong small sub sup pre code blockquote section article header footer nav main aside figure img form input label "
    "button select option textarea script style link meta"
).split()
HTML = [
    *(f"<{name}>" for name in _HTML_NAMES), *(f"</{name}>" for name in _HTML_NAMES), "<!--", "-->", "<!DOCTYPE html>", "/>",
    "&nbsp;", "&amp;", "&lt;", "&gt;", "&quot;", ' class="', ' id="', ' href="', ' src="', ' style="', ' colspan="', ' rowspan="',
]  # fmt: skip
JSON = [
    '{"', '"}', '":', '": ', '": "', '", "', '","', '":"', '": {', '": [', '"],', '"]', '},', '}, {', '},{', '[{', '}]',
    '[]', '{}', '""', ": null", ": true", ": false",
]  # fmt: skip
XML = ["<?xml", "?>", "<![CDATA[", "]]>", ' xmlns="', " xmlns:", ' version="1.0"', ' encoding="UTF-8"', "</", '">', '="']
YEARS = [str(year) for year in range(1776, 2050)]
ENUMERATORS = [f"({letter})" for letter in ascii_lowercase + ascii_uppercase] + [f"({number})" for number in range(1, 100)]
NUMBERS = [str(number) for number in range(1, 1000)]


def roman(number: int) -> str:
    """The lower-case roman numeral of 1 … 3999."""
    values = (
        (1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"), (40, "xl"), (10, "x"), (9, "ix"),
        (5, "v"), (4, "iv"), (1, "i"),
    )  # fmt: skip
    text = ""
    for value, letters in values:
        times, number = divmod(number, value)
        text += letters * times
    return text


NUMERALS = [roman(number) for number in range(1, 101)]
ROMAN = [f"({numeral})" for numeral in NUMERALS] + NUMERALS + [numeral.upper() for numeral in NUMERALS]

_BETWEEN_WORD_BORDERS = frozenset(YEARS + NUMBERS + NUMERALS + [numeral.upper() for numeral in NUMERALS])
# In the order in which a growing vocabulary takes them up.
_ALL = ENUMERATORS + MARKDOWN + YEARS + HTML + JSON + XML + ROMAN + NUMBERS
FRAGMENTS = [text for text in dict.fromkeys(_ALL) if len(text) > 1]  # single bytes have entries anyway


def whitespace_runs(shortest: int) -> Iterator[str]:
    """Runs of spaces and of newlines from `shortest` characters up, in turn, without end; tabs once."""
    for length in count(shortest):
        yield " " * length
        yield "\n" * length
        if length == 2:
            yield "\t\t"


def fragments(most: int) -> list[str]:
    """The first `most` custom tokens."""
    return FRAGMENTS[: max(most, 0)]


def added(text: str) -> AddedToken:
    """`text` as an entry that is matched before anything else, in the text as it was written."""
    return AddedToken(text, normalized=False, single_word=text in _BETWEEN_WORD_BORDERS)
