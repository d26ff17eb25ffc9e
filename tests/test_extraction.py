"""Answers written by hand: whole, wrong, broken, and followed by more."""

from __future__ import annotations

import pytest

from kl3m_nb.extraction import ExtractionScore, extraction_rates, score_extraction

PROMPT = 'Text: The fee is $40 for three months.\nFields: fee, months, late\nJSON: {"fee":'
EXPECTED = {"fee": 40, "months": 3, "late": False}


@pytest.mark.parametrize(
    ("continuation", "parses", "matches", "right"),
    [
        (' 40, "months": 3, "late": false}', True, True, 1),
        (' 40.0, "late": false, "months": 3}\n\nText: next', True, True, 1),  # order and what follows do not matter
        (' 40, "months": 4, "late": false}', True, True, 2 / 3),
        (' "40", "months": 3, "late": false}', True, False, 2 / 3),  # a string is no number
        (' 40, "months": 3, "late": 0}', True, False, 2 / 3),  # nor is zero false
        (' 40, "months": 3}', True, False, 2 / 3),
        (' 40, "months": 3, "late": false, "more": 1}', True, False, 1),
        (' 40, "months": 3, "late": false', False, False, 0),
        (' forty, "months": 3}', False, False, 0),
        ("", False, False, 0),
    ],
)
def test_scores(continuation, parses, matches, right):
    score = score_extraction(PROMPT, continuation, EXPECTED)
    assert (score.parses, score.matches_schema) == (parses, matches)
    assert score.right_values == pytest.approx(right)


def test_an_answer_that_is_no_object_parses_and_has_no_fields():
    assert score_extraction("JSON:", " [1, 2]", {"fee": 1}) == ExtractionScore(True, False, 0.0)


def test_only_the_last_mark_begins_the_answer():
    assert score_extraction('Text: JSON: is a format.\nJSON: {"a":', " 1}", {"a": 1}).right_values == 1


def test_rates_are_means():
    scores = [ExtractionScore(True, True, 1.0), ExtractionScore(True, False, 0.5), ExtractionScore(False, False, 0.0)]
    rates = extraction_rates(scores)
    assert rates == pytest.approx({"json_parse_rate": 2 / 3, "json_schema_rate": 1 / 3, "json_value_rate": 0.5})
    with pytest.raises(ValueError, match="no scores"):
        extraction_rates([])


def test_a_prompt_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="is no extraction"):
        score_extraction("Under this", " rule", {"a": 1})
    with pytest.raises(ValueError, match="is no extraction"):
        score_extraction(PROMPT, " 40}", {})
