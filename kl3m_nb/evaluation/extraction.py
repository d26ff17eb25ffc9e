"""JSON extraction, judged: does the answer parse, has it the fields asked for, are its values those
of the text?

A prompt of the kind `extraction` ends inside the answer, behind `JSON:`, and carries the answer
expected. What follows the first whole JSON value is not judged: a model without instruction tuning
goes on writing, unless it is stopped where all `is_decided`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kl3m_nb.data import instructions

ANSWER_MARK = "JSON:"


_LONGEST_PIECE = (
    12  # characters: an error so far back is no literal, number or escape that is only cut
)


@dataclass(frozen=True)
class ExtractionScore:
    """How good one answer is. What does not parse matches no schema and has no right value."""

    parses: bool
    matches_schema: (
        bool  # an object with exactly the fields expected, each of the expected JSON type
    )
    right_values: float  # share of the expected fields whose value is the expected one


def as_instruction(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`prompt` for a model that was cotrained on instructions: the question in the template, the
    answer begun behind it.
    """
    question, mark, beginning = prompt.rpartition(ANSWER_MARK)
    return instructions.instruction_prompt(question + mark, tokenizer) + beginning.lstrip()


def is_decided(prompt: str, continuation: str) -> bool:
    """Whether more text would change nothing: the JSON value that `prompt` begins is closed, or can
    no longer become one.
    """
    text = _answer_text(prompt, continuation)
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        return (
            not error.msg.startswith("Unterminated string")
            and error.pos < len(text.rstrip()) - _LONGEST_PIECE
        )
    return True


def score_extraction(
    prompt: str, continuation: str, expected: Mapping[str, object]
) -> ExtractionScore:
    """The score of `continuation` as the rest of the answer that `prompt` begins behind its last
    `JSON:`.

    Strings must be equal to the letter, numbers in value. Raises ValueError for a prompt without
    the mark or without an expected answer.
    """
    if ANSWER_MARK not in prompt or not expected:
        raise ValueError(
            f"The prompt {prompt[:40]!r} is no extraction; it needs the mark {ANSWER_MARK!r} and an"
            " expected answer."
        )
    try:
        value, _ = json.JSONDecoder().raw_decode(_answer_text(prompt, continuation))
    except json.JSONDecodeError:
        return ExtractionScore(parses=False, matches_schema=False, right_values=0.0)
    if not isinstance(value, dict):
        return ExtractionScore(parses=True, matches_schema=False, right_values=0.0)
    same_types = value.keys() == expected.keys() and all(
        _json_type(value[key]) == _json_type(expected[key]) for key in expected
    )
    right = sum(
        key in value and _json_type(value[key]) == _json_type(wanted) and value[key] == wanted
        for key, wanted in expected.items()
    )
    return ExtractionScore(
        parses=True, matches_schema=same_types, right_values=right / len(expected)
    )


def extraction_rates(scores: Iterable[ExtractionScore]) -> dict[str, float]:
    """Means over `scores`: `json_parse_rate`, `json_schema_rate`, `json_value_rate`. Raises
    ValueError without scores.
    """
    scores = list(scores)
    if not scores:
        raise ValueError("extraction_rates was given no scores; score at least one answer.")
    return {
        "json_parse_rate": sum(score.parses for score in scores) / len(scores),
        "json_schema_rate": sum(score.matches_schema for score in scores) / len(scores),
        "json_value_rate": sum(score.right_values for score in scores) / len(scores),
    }


def _answer_text(prompt: str, continuation: str) -> str:
    return (prompt.rpartition(ANSWER_MARK)[2] + continuation).lstrip()


def _json_type(value: object) -> str:
    """The JSON type; Python's True is also an integer, JSON's true is not."""
    names = (
        (bool, "boolean"),
        ((int, float), "number"),
        (str, "string"),
        (list, "array"),
        (dict, "object"),
    )
    return next((name for kinds, name in names if isinstance(value, kinds)), "null")
