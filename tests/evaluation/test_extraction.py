"""Answers written by hand: whole, wrong, broken, and followed by more."""

from __future__ import annotations

import json

import pytest

from kl3m_nb.data.instructions import InstructionPair, pair_sample
from kl3m_nb.data.tokenizer import CORPUS_NAMES, load_tokenizer
from kl3m_nb.evaluation.extraction import (
    ExtractionScore,
    as_instruction,
    extraction_rates,
    is_decided,
    score_extraction,
)
from kl3m_nb.evaluation.generation import ANSWER_TOKENS, load_prompts

PROMPT = 'Text: The fee is $40 for three months.\nFields: fee, months, late\nJSON: {"fee":'
EXPECTED = {"fee": 40, "months": 3, "late": False}


@pytest.mark.parametrize(
    ("continuation", "parses", "matches", "right"),
    [
        (' 40, "months": 3, "late": false}', True, True, 1),
        (
            ' 40.0, "late": false, "months": 3}\n\nText: next',
            True,
            True,
            1,
        ),  # order and what follows do not matter
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
    assert (
        score_extraction('Text: JSON: is a format.\nJSON: {"a":', " 1}", {"a": 1}).right_values == 1
    )


def test_rates_are_means():
    scores = [
        ExtractionScore(True, True, 1.0),
        ExtractionScore(True, False, 0.5),
        ExtractionScore(False, False, 0.0),
    ]
    rates = extraction_rates(scores)
    assert rates == pytest.approx(
        {"json_parse_rate": 2 / 3, "json_schema_rate": 1 / 3, "json_value_rate": 0.5}
    )
    with pytest.raises(ValueError, match="no scores"):
        extraction_rates([])


def test_a_prompt_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="is no extraction"):
        score_extraction("Under this", " rule", {"a": 1})
    with pytest.raises(ValueError, match="is no extraction"):
        score_extraction(PROMPT, " 40}", {})


def test_an_answer_is_whole_when_its_value_is_closed_and_not_before():
    answer = ' 40, "months": {"of": "{}"}, "late": false}'
    whole = [is_decided(PROMPT, answer[:length]) for length in range(len(answer) + 1)]
    assert whole == [False] * len(answer) + [True]
    assert is_decided(PROMPT, answer + " and more")


@pytest.mark.parametrize(
    "broken",
    [
        " forty, or what",
        ' 40, "months" 3, "late": false',
        " 40\n\nText: The next",
        ' "4\n0", "months": 3',
    ],
)
def test_an_answer_that_can_no_longer_become_json_is_decided(broken):
    decided = [is_decided(PROMPT, broken[:length]) for length in range(len(broken) + 1)]
    assert decided[-1] and not decided[0] and decided == sorted(decided)


@pytest.mark.parametrize(
    "piece",
    [
        "-1.5e+10",
        "true",
        "null",
        '"a \\u00e4 \\n and a long string, {not [closed"',
        "[1, [2, 3], {}]",
    ],
)
def test_no_cut_of_a_sound_answer_is_taken_for_broken(piece):
    answer = f' {piece}, "months" : {piece}   ,   "late":   false'
    assert not any(is_decided(PROMPT, answer[:length]) for length in range(len(answer) + 1))
    assert is_decided(PROMPT, answer + "}")


@pytest.fixture(scope="module", params=CORPUS_NAMES)
def tokenizer(request):
    return load_tokenizer(request.param, "package:licensedcode-data", 4096)


def test_every_right_answer_has_room_and_full_marks(tokenizer):
    for prompt in load_prompts("extraction"):
        answer, beginning = json.dumps(prompt.expected), prompt.text.rpartition("JSON:")[2].lstrip()
        assert answer.startswith(beginning)
        rest = answer.removeprefix(beginning)
        assert len(tokenizer.encode(rest)) <= ANSWER_TOKENS
        assert is_decided(prompt.text, rest)
        assert score_extraction(prompt.text, rest, prompt.expected) == ExtractionScore(
            True, True, 1.0
        )


def test_the_form_of_dates_and_of_numbers_as_text_is_asked_for():
    for prompt in load_prompts("extraction"):
        fields = prompt.text.rpartition("Fields: ")[2].partition("\n")[0].split(", ")
        for field, value in zip(fields, prompt.expected.values(), strict=True):
            is_date = isinstance(value, str) and value[:4].isdigit() and value[4:5] == "-"
            assert field.endswith(" (as YYYY-MM-DD)") == is_date, prompt.id
            is_number = isinstance(value, str) and value.replace(",", "").replace(".", "").isdigit()
            assert field.endswith(" (a string)") == is_number, prompt.id


def test_a_cotrained_model_is_asked_in_its_template(tokenizer):
    pair = InstructionPair("fee", "extraction", PROMPT.rpartition(" {")[0], '{"fee": 40}')
    sample = pair_sample(pair, tokenizer, "response")
    ids = tokenizer(as_instruction(PROMPT, tokenizer))["input_ids"]
    assert ids[: sample.trained_from] == sample.tokens[: sample.trained_from].tolist()
    assert tokenizer.decode(ids[sample.trained_from :]) == '{"fee":'
