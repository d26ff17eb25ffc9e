"""The rules that every instruction pair keeps.

`validate_pairs` says in words what is wrong with a set of pairs. It compares the JSON answers with
their sources: a date, number or string of an answer that the instruction does not contain, letter
for letter, is a made-up value, and a model trained on such answers learns to invent them. Whether a
legal statement is true it cannot know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import date
from decimal import Decimal
from itertools import combinations, pairwise

from kl3m_nb.data.instructions import USES, InstructionPair

MIN_WORDS, MAX_WORDS = 20, 250


# Two instructions that share this part of their distinct words are the same request in other
# clothes.
NEAR_IDENTICAL = 0.7


MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


_ONES = "one two three four five six seven eight nine ten"


_TEENS = "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"


_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


NUMBER_WORDS = {word: value for value, word in enumerate(f"{_ONES} {_TEENS}".split(), 1)}
NUMBER_WORDS |= {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}


SCALES = {"": 1, "thousand": 10**3, "million": 10**6, "billion": 10**9}


DIGITS = re.compile(r"(\d[\d,]*(?:\.\d+)?)(?:\s+(thousand|million|billion))?")


ISO_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


_MONTH = rf"(?:{'|'.join(MONTHS)})[a-z]*\.?"


_WRITTEN_DATES = (
    rf"{_MONTH}\s+\d{{1,2}},?\s+\d{{4}}",
    rf"\d{{1,2}}\s+{_MONTH},?\s+\d{{4}}",
    r"\d{1,2}/\d{1,2}/\d{4}",
)


WRITTEN_DATE = re.compile("|".join(_WRITTEN_DATES), re.IGNORECASE)


CITATION = re.compile(r"\d U\.S\.C\. |\bC\.F\.R\.|\bUnited States Code\b|\d U\.S\. \d")


BLANK = re.compile(r"_{3,}|\[[^\]]*\]")


def validate_pairs(pairs: Sequence[InstructionPair]) -> list[str]:
    """What is wrong with `pairs`, one sentence a problem, each beginning with the id; empty when
    nothing is.
    """
    problems = [f"{pair.id}: {problem}." for pair in pairs for problem in _problems_of(pair)]
    bags = [(pair.id, set(re.findall(r"\w+", pair.instruction.casefold()))) for pair in pairs]
    for (first, words), (second, others) in combinations(bags, 2):
        if first == second:
            problems.append(f"{first}: the id is used twice.")
        if len(words & others) >= NEAR_IDENTICAL * len(words | others) > 0:
            problems.append(f"{second}: the instruction is nearly that of {first}.")
    return problems


def _problems_of(pair: InstructionPair) -> Iterator[str]:
    if pair.use not in USES:
        yield f"the use {pair.use!r} is none of {', '.join(USES)}"
    for name, part in (
        ("id", pair.id),
        ("instruction", pair.instruction),
        ("response", pair.response),
    ):
        if not part.strip():
            yield f"the {name} is empty"
        if len(part.split()) > MAX_WORDS:
            yield f"the {name} has more than {MAX_WORDS} words"
    # The prose of a pair: an extraction has it in its source text, the other uses in their answer.
    name, prose = (
        ("instruction", pair.instruction)
        if pair.use == "extraction"
        else ("response", pair.response)
    )
    if 0 < len(prose.split()) < MIN_WORDS:
        yield f"the {name} has fewer than {MIN_WORDS} words"
    if pair.use == "extraction":
        yield from _extraction_problems(pair)
    else:
        if pair.fields:
            yield "only an extraction states fields"
        if BLANK.search(pair.response):
            yield "the response leaves a blank to be filled in"
        if (
            pair.use == "regulation"
            and pair.response.strip()
            and not CITATION.search(pair.response)
        ):
            yield "the response cites no statute, regulation or decision"


def _extraction_problems(pair: InstructionPair) -> Iterator[str]:
    if not re.search(r"\b(?:json|schema)\b", pair.instruction, re.IGNORECASE):
        yield "the instruction does not ask for JSON"
    for field in pair.fields:
        if not re.search(rf"\b{re.escape(field)}\b", pair.instruction):
            yield f"the instruction does not name the field {field!r}"
    try:
        answer = json.loads(pair.response, parse_int=Decimal, parse_float=Decimal)
    except json.JSONDecodeError:
        yield "the response is not JSON and nothing else"
        return
    if not isinstance(answer, dict):
        yield "the response is not a JSON object"
        return
    if not pair.fields or sorted(answer) != sorted(pair.fields):
        yield (
            f"the response has the keys {sorted(answer)}, the stated fields are"
            f" {sorted(pair.fields)}"
        )
    text = " ".join(pair.instruction.split())
    for value in _leaves(answer):
        yield from _value_problems(value, text)


def _value_problems(value: str | Decimal | float | bool | None, text: str) -> Iterator[str]:
    """`text` is the instruction with single spaces. True, false and null need a reader; they are
    not looked up.
    """
    if isinstance(value, Decimal | float):
        if value not in _numbers(text.casefold()):
            yield f"the number {value} does not stand in the instruction"
    elif isinstance(value, str) and ISO_DATE.fullmatch(value):
        try:
            found = _has_date(text.casefold(), date.fromisoformat(value))
        except ValueError:
            yield f"{value!r} is not a day of the calendar"
            return
        if not found:
            yield f"the date {value} does not stand in the instruction"
    elif isinstance(value, str):
        if WRITTEN_DATE.fullmatch(value):
            yield f"the date {value!r} is not in the ISO form YYYY-MM-DD"
        plain = " ".join(value.split())
        if not plain or not re.search(rf"(?<!\w){re.escape(plain)}(?!\w)", text):
            yield f"the text {value!r} does not stand in the instruction"


def _leaves(value: object) -> Iterator:
    """The values at the ends of nested JSON lists and objects."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value


def _numbers(text: str) -> set[Decimal]:
    """Every number of `text`, which is in lower case: 12,500 and 3.5, $1.5 million, eleven,
    twenty-four.
    """
    found = {
        Decimal(digits.replace(",", "")) * SCALES[scale] for digits, scale in DIGITS.findall(text)
    }
    words = [NUMBER_WORDS.get(word, 0) for word in re.findall(r"[a-z]+", text)]
    found.update(Decimal(word) for word in words if word)
    found.update(
        Decimal(ten + unit) for ten, unit in pairwise(words) if ten >= 20 and 0 < unit < 10
    )
    return found


def _has_date(text: str, day: date) -> bool:
    """Whether `text`, in lower case, names the day.

    March 4, 2019; Nov. 2, 2016; 14 June 2021; 28th day of October, 2022; 6/3/2021; or ISO.
    """
    month = rf"{MONTHS[day.month - 1]}[a-z]*\.?"
    of_month = rf"0?{day.day}(?:st|nd|rd|th)?"
    forms = (
        rf"{month} {of_month},? {day.year}",
        rf"{of_month} (?:day of )?{month},? {day.year}",
        rf"0?{day.month}/0?{day.day}/{day.year}",
        day.isoformat(),
    )
    return re.search(rf"\b(?:{'|'.join(forms)})\b", text) is not None
