"""The shipped pairs keep every rule, and every rule finds the fault planted for it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from kl3m_nb.data import instructions
from kl3m_nb.data.instructions import USES, InstructionPair, load_pairs
from tests.data.validate_pairs import validate_pairs

PROSE = InstructionPair(
    id="drafting-costs",
    use="drafting",
    instruction="Who pays the costs of the audit? Write a clause.",
    response=(
        "Costs. The Supplier shall bear the costs of the audit if the audit shows an overcharge of"
        " more than five percent; otherwise the Customer shall bear them."
    ),
)
SOURCE = (
    "Give buyer, price, rate, closing, notice_days, seats and parts as JSON. Marsh Wren LLC will"
    " pay $1.5 million at 4.25% on March 4, 2019,\nafter twenty-four days' notice, for 1,200 seats,"
    " a stage and a\ncurtain."
)
ANSWER = {
    "buyer": "Marsh Wren LLC",
    "price": 1500000,
    "rate": 4.25,
    "closing": "2019-03-04",
    "notice_days": 24,
    "seats": 1200,
    "parts": [{"name": "stage"}, {"name": "a curtain"}, {"name": None}],
}
EXTRACTION = InstructionPair(
    "extraction-theatre", "extraction", SOURCE, json.dumps(ANSWER), tuple(ANSWER)
)

SHORT = InstructionPair(
    "extraction-short",
    "extraction",
    "Give buyer as JSON: Marsh Wren",
    '{"buyer": "Marsh Wren"}',
    ("buyer",),
)


def answering(**changes) -> InstructionPair:
    return replace(EXTRACTION, response=json.dumps(ANSWER | changes))


def test_shipped_pairs_have_no_problems():
    assert validate_pairs(load_pairs()) == []


def test_every_use_has_at_least_52_pairs_of_its_own():
    pairs = load_pairs()
    counts = Counter(pair.use for pair in pairs)
    assert set(counts) == set(USES)
    assert min(counts.values()) >= 52
    assert [pair for use in USES for pair in load_pairs(use)] == pairs
    assert all(bool(pair.fields) == (pair.use == "extraction") for pair in pairs)


def test_sound_pairs_pass():
    assert validate_pairs([PROSE, EXTRACTION]) == []


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (replace(PROSE, use="poetry"), "the use 'poetry' is none of"),
        (replace(PROSE, instruction=" \n"), "the instruction is empty"),
        (replace(PROSE, response=""), "the response is empty"),
        (replace(PROSE, response="Each party bears its own costs."), "fewer than 20 words"),
        (replace(PROSE, response=PROSE.response * 10), "the response has more than 250 words"),
        (
            replace(PROSE, instruction=PROSE.instruction * 30),
            "the instruction has more than 250 words",
        ),
        (replace(PROSE, fields=("costs",)), "only an extraction states fields"),
        (replace(PROSE, response=PROSE.response.replace("five", "____")), "leaves a blank"),
        (replace(PROSE, response=PROSE.response.replace("Supplier", "[NAME]")), "leaves a blank"),
        (replace(PROSE, use="regulation"), "cites no statute, regulation or decision"),
        (replace(EXTRACTION, instruction=SOURCE.replace(" as JSON", "")), "does not ask for JSON"),
        (SHORT, "the instruction has fewer than 20 words"),
        (
            replace(EXTRACTION, response="Here it is: " + EXTRACTION.response),
            "not JSON and nothing else",
        ),
        (replace(EXTRACTION, response="[1200]"), "not a JSON object"),
        (replace(EXTRACTION, fields=EXTRACTION.fields[1:]), "the response has the keys"),
        (answering(seller="Marsh Wren LLC"), "the response has the keys"),
        (replace(EXTRACTION, fields=(), response="{}"), "the response has the keys"),
        (
            replace(EXTRACTION, instruction=SOURCE.replace("notice_days", "notice")),
            "does not name the field 'notice_days'",
        ),
        (answering(buyer="Marsh Wren Inc."), "the text 'Marsh Wren Inc.' does not stand"),
        (answering(buyer="marsh wren LLC"), "the text 'marsh wren LLC' does not stand"),
        (answering(buyer="Marsh W"), "the text 'Marsh W' does not stand"),
        (answering(buyer=""), "the text '' does not stand"),
        (answering(parts=[{"name": "trapdoor"}]), "the text 'trapdoor' does not stand"),
        (answering(price=1.6e6), "the number 1600000.0 does not stand"),
        (answering(rate=4.2), "the number 4.2 does not stand"),
        (answering(notice_days=25), "the number 25 does not stand"),
        (answering(seats=float("nan")), "the number nan does not stand"),
        (answering(closing="2019-04-03"), "the date 2019-04-03 does not stand"),
        (answering(closing="2019-02-30"), "'2019-02-30' is not a day of the calendar"),
        (answering(closing="March 4, 2019"), "'March 4, 2019' is not in the ISO form"),
    ],
)
def test_a_planted_fault_is_the_only_problem_named(pair, words):
    problems = validate_pairs([pair])
    assert len(problems) == 1
    assert problems[0].startswith(f"{pair.id}: ")
    assert words in problems[0]


def test_twins_are_named():
    same_id = replace(EXTRACTION, id=PROSE.id)
    assert validate_pairs([PROSE, same_id]) == ["drafting-costs: the id is used twice."]
    reworded = replace(
        PROSE,
        id="drafting-costs-2",
        instruction="Write a clause: who pays all the costs of the audit?",
    )
    assert validate_pairs([PROSE, reworded]) == [
        "drafting-costs-2: the instruction is nearly that of drafting-costs."
    ]


@pytest.mark.parametrize(
    "written",
    ["4 March 2019", "Mar. 4, 2019", "4th day of March, 2019", "03/04/2019", "2019-03-04"],
)
def test_a_date_may_be_written_in_any_usual_form(written):
    assert (
        validate_pairs([replace(EXTRACTION, instruction=SOURCE.replace("March 4, 2019", written))])
        == []
    )


def test_a_day_is_not_found_inside_a_longer_number():
    problems = validate_pairs(
        [replace(EXTRACTION, instruction=SOURCE.replace("March 4", "March 14"))]
    )
    assert problems == [
        "extraction-theatre: the date 2019-03-04 does not stand in the instruction."
    ]


def test_a_use_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="choose one of regulation, drafting, extraction"):
        load_pairs("poetry")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 must be an object"),
        ('{"id": "x", "use": "drafting", "instruction": "y"}', "line 2 must be an object"),
        (
            '{"id": "x", "use": "regulation", "instruction": "y", "response": "z"}',
            "of use 'drafting'",
        ),
    ],
)
def test_a_line_that_is_no_pair_is_refused_with_its_place(tmp_path, monkeypatch, line, words):
    good = '{"id": "a", "use": "drafting", "instruction": "b", "response": "c"}'
    (tmp_path / "drafting.jsonl").write_text(f"{good}\n{line}\n", encoding="utf-8")
    monkeypatch.setattr(instructions, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"drafting\.jsonl") as error:
        load_pairs("drafting")
    assert words in str(error.value)
