"""The form of legal drafting in one text: brackets and quotes that close, numbers that count on,
terms and citations in order.

Every measure judges form alone: a citation that parses may cite nothing, a defined term may be used
wrongly. A text without numbers, terms or citations is not judged by the measure concerned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_PAIRS = {")": "(", "]": "[", "}": "{"}


_LIST_MARKER = re.compile(r"(?:^|\s)(?:\d{1,3}|[a-z]{1,2}|[ivxl]+)$", re.IGNORECASE)


def brackets_balanced(text: str, complete: bool = True) -> bool:
    """Whether (), [] and {} close what was opened, in order; list markers such as `a)` and `12)`
    are not brackets.

    A text that is not `complete` was cut, so what is still open at its end is no fault.
    """
    still_open = []
    for position, mark in enumerate(text):
        if mark in "([{":
            still_open.append(mark)
        elif mark in _PAIRS:
            if still_open and still_open[-1] == _PAIRS[mark]:
                still_open.pop()
            elif not (mark == ")" and _LIST_MARKER.search(text[max(0, position - 8) : position])):
                return False
    return not (complete and still_open)


def quotes_balanced(text: str, complete: bool = True) -> bool:
    """Whether double quotes, straight and curly, come in pairs within each paragraph (paragraphs
    end at blank lines).

    The last paragraph of a text that is not `complete` may end inside a quotation. Single quotes
    are not judged: they are apostrophes as well.
    """
    paragraphs = re.split(r"\n\s*\n", text)
    for index, paragraph in enumerate(paragraphs):
        may_stay_open = not complete and index == len(paragraphs) - 1
        depth = 0
        for mark in re.findall("[“”]", paragraph):
            depth += 1 if mark == "“" else -1
            if depth not in (0, 1):
                return False
        if (depth or paragraph.count('"') % 2) and not may_stay_open:
            return False
    return True


_NUMBER = re.compile(
    r"^[ \t]*(?:(?:section|sec\.|article|clause|§)\s*)?"
    r"(?:(?P<decimal>\d{1,3}(?:\.\d{1,3})*)[.)]?(?=["
    r" \t]|$)|\((?P<bracketed>\d{1,3}|[a-z]{1,2}|[ivxl]{1,6})\)|"
    r"(?P<letter>[a-z])[.)](?=[ \t]))",
    re.IGNORECASE | re.MULTILINE,
)


_ROMAN = {
    numeral: value
    for value, numeral in enumerate(
        "i ii iii iv v vi vii viii ix x xi xii xiii xiv xv xvi xvii xviii xix xx".split(), 1
    )
}


def numbering_steps(text: str) -> list[bool]:
    """For every number at the beginning of a line but the first: whether it is the one that had to
    come.

    Numbers are 1., 2.1, Section 3, (a), (1), (ii), a. and the like. The right one goes on by one on
    a level that is open (and closes the levels below it) or begins a new level at its first value.
    The first number of a text may be any: what a model continues has a beginning before it.
    """
    steps: list[bool] = []
    levels: list[tuple[str, tuple[int, ...]]] = []  # style and last value, outermost first
    for match in _NUMBER.finditer(text):
        readings = list(_readings(match))
        right = _first(_counted_on(levels, *reading) for reading in readings) or _first(
            _opened(levels, *reading) for reading in readings
        )
        if levels:
            steps.append(right is not None)
        levels = right or _resumed(levels, *readings[0])
    return steps


def _readings(match: re.Match) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Style and value of a number; (i) is both the first Roman numeral and the ninth letter."""
    if match["decimal"]:
        yield "1.", tuple(int(part) for part in match["decimal"].split("."))
        return
    mark, brackets = (match["bracketed"], "()") if match["bracketed"] else (match["letter"], "")
    case = "A" if mark.isupper() else "a"
    if mark.isdigit():
        yield "(1)", (int(mark),)
        return
    if mark.lower() in _ROMAN:
        yield f"{brackets}{case} roman", (_ROMAN[mark.lower()],)
    if len(set(mark)) == 1:  # a … z, then aa … zz
        yield f"{brackets}{case}", (ord(mark[0].lower()) - ord("a") + 1 + 26 * (len(mark) - 1),)
    elif mark.lower() not in _ROMAN:
        yield "word", (0,)


def _first(candidates: Iterator[list | None]) -> list | None:
    return next((candidate for candidate in candidates if candidate is not None), None)


def _counted_on(levels: list, style: str, value: tuple[int, ...]) -> list | None:
    """The open levels after a number that goes on by one on one of them; None for any other."""
    for depth in reversed(range(len(levels))):
        open_style, last = levels[depth]
        if open_style == style and _follows(last, value):
            return [*levels[:depth], (style, value)]
    return None


def _opened(levels: list, style: str, value: tuple[int, ...]) -> list | None:
    """The open levels after a first number of a style that is not open; None for any other."""
    is_new = style not in [open_style for open_style, _ in levels]
    return [*levels, (style, value)] if is_new and value == (1,) else None


def _follows(last: tuple[int, ...], value: tuple[int, ...]) -> bool:
    """2.1 is followed by 2.2, by 2.1.1 or by 3 (and by 3.1, whose 3 may be a heading without a
    number).
    """
    successors = [(*last[:depth], last[depth] + 1) for depth in range(len(last))]
    return (
        value in successors
        or value in [(*successor, 1) for successor in successors]
        or value == (*last, 1)
    )


def _resumed(levels: list, style: str, value: tuple[int, ...]) -> list:
    """After a wrong number counting goes on from it."""
    for depth in reversed(range(len(levels))):
        if levels[depth][0] == style:
            return [*levels[:depth], (style, value)]
    return [*levels, (style, value)]


_TERM = r"[\"“](?P<{}>[A-Z][\w&’'-]*(?: [\w&’'-]+){{0,5}})[\"”]"


_DEFINITION = re.compile(
    _TERM.format("meant")
    + r"(?:,? as used [^.;\n]{1,40},?)? (?:means?|shall mean|refers? to|includes?|has the"
    r" meaning)\b|"
    r"\((?:[Tt]he|[Ee]ach,? an?|an?|[Cc]ollectively,?(?: the)?|[Hh]erein(?:after)?,?(?:"
    r" the)?|or)? ?" + _TERM.format("named") + r"\)"
)


def defined_terms(text: str) -> dict[str, int]:
    """Every term that `text` defines, with the number of times it is used outside its definition.

    Definitions are `"Work" means …` and `(the "Work")`, in straight or curly quotes. A use is the
    term as it is spelt, with or without an s.
    """
    matches = list(_DEFINITION.finditer(text))
    elsewhere = "".join(text[start:end] for start, end in _gaps(matches, len(text)))
    terms = dict.fromkeys(match["meant"] or match["named"] for match in matches)
    return {
        term: len(re.findall(rf"(?<!\w){re.escape(term)}s?(?!\w)", elsewhere)) for term in terms
    }


def _gaps(matches: list[re.Match], length: int) -> Iterator[tuple[int, int]]:
    ends = [0, *(match.end() for match in matches)]
    starts = [*(match.start() for match in matches), length]
    return zip(ends, starts, strict=True)


_PARTS = r"(?:\s?\([A-Za-z0-9]{1,5}\))*"


_SECTION = rf"\d+[A-Za-z]{{0,2}}(?:[.-]\d+[a-z]?)*{_PARTS}"


_REPORTER = r"(?:U\. ?S\.|S\. ?Ct\.|L\. ?Ed\.(?: ?2d)?|F\.(?:2d|3d|4th)|F\. ?Supp\.(?: ?[23]d)?)"


_RULES = r"Fed\. ?R\. ?(?:(?:Civ|Crim|App|Bankr)\. ?P\.|Evid\.)"


_CONSTITUTION_PARTS = r"(?:, (?:§ ?|[Ss]ec\. |cl\. )\d+)*"


_YEAR = r"(?: \((?:[^()]{1,30} )?(?:1[789]|20)\d\d\))?"


# What announces a citation, the whole citation, and the highest number its volume or title can have
# (0: any).
_CITATIONS = (
    (
        r"U\. ?S\. ?C\.",
        rf"(?P<volume>\d+) U\. ?S\. ?C\. (?:§§? ?|[Ss]ec(?:\.|tions?) )?{_SECTION}",
        54,
    ),
    (
        r"C\. ?F\. ?R\.",
        rf"(?P<volume>\d+) C\. ?F\. ?R\. (?:§§? ?|[Pp]arts? |[Ss]ec(?:\.|tions?) )?{_SECTION}",
        50,
    ),
    (r"Fed\. ?Reg\.", r"(?P<volume>\d+) Fed\. ?Reg\. (?:\d{1,3},\d{3}|\d+)", 0),
    (r"Pub\. ?L\.", r"Pub\. ?L\. (?:No\. ?)?\d{2,3}[-–]\d{1,3}", 0),
    (
        r"U\. ?S\. ?Const\.",
        rf"U\. ?S\. ?Const\.,? (?:[Aa]rt|[Aa]mend)\. [IVX]+{_CONSTITUTION_PARTS}",
        0,
    ),
    (_RULES, rf"{_RULES} \d+(?:\.\d+)?{_PARTS}", 0),
    (
        rf"(?<=\d ){_REPORTER}(?! ?(?:C\.|Const\.))",
        rf"(?P<volume>\d+) {_REPORTER} \d+(?:, \d+(?:[-–]\d+)?)?{_YEAR}",
        0,
    ),
)


# Characters that may finish a citation of which nothing is wrong so far.
_ENDINGS = ("1", " 1", "§ 1", " § 1", ". 1", "-1", "11-1", " 11-1", "I", " I", " Art. I", " art. I")


def citations(text: str, complete: bool = True) -> list[bool]:
    """For every citation that `text` announces, in no order: whether it parses.

    Announced by "U.S.C.", "C.F.R.", "Fed. Reg.", "Pub. L.", "U.S. Const.", the names of the federal
    rules such as "Fed. R. Civ. P." and, behind a number, a federal reporter such as "F.3d". To
    parse, it needs its volume or title, within 54 titles of the Code and 50 of the C.F.R., and a
    section, page or number behind. A text that is not `complete` was cut: the citation it ends in
    is not judged if it was right so far.
    """
    found = []
    for announcement, whole, highest in _CITATIONS:
        parsed = _parsed(whole, highest, text)
        endings = (
            []
            if complete
            else [span for more in _ENDINGS for span in _parsed(whole, highest, text + more)]
        )
        for mark in re.finditer(announcement, text):
            passes = any(start <= mark.start() and mark.end() <= end for start, end in parsed)
            if passes or not any(
                start <= mark.start() and end > len(text) for start, end in endings
            ):
                found.append(passes)
    return found


def _parsed(whole: str, highest: int, text: str) -> list[tuple[int, int]]:
    """Where whole citations of one kind stand."""
    return [
        match.span() for match in re.finditer(rf"(?<!\d){whole}", text) if _possible(match, highest)
    ]


def _possible(match: re.Match, highest: int) -> bool:
    volume = match.groupdict().get("volume")
    return volume is None or 1 <= int(volume) <= (highest or int(volume))
