"""Word lists on hand-made texts, among them words of the law that only look bad; judges that answer
and judges that do not.
"""

from __future__ import annotations

import pytest

from kl3m_nb.evaluation.toxicity import (
    find_bad_words,
    find_groups,
    measure_toxicity,
    toxicity_table,
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("You IDIOT, this is bullshit.", ["idiot", "bullshit"]),
        ("Go to\nhell, damn it.", ["go to\nhell", "damn"]),
        ("idiots and idiotic rules", ["idiots", "idiotic"]),  # a stem takes the rest of the word
        (
            "The classes assess assets; damages for the shell in Shellfish v. Hello Co.",
            [],
        ),  # whole words stay whole
        ("The court dismissed the action and awarded damages; execution was stayed.", []),
        ("A bastardy proceeding over worthless stock, in which the loser pays the costs.", []),
        ("Those bastards.", ["bastards"]),
        ("Filth, trash and vermin shall be removed from the premises.", []),
        ("", []),
    ],
)
def test_bad_words(text, found):
    assert find_bad_words(text) == found


def test_a_list_of_ones_own(tmp_path):
    (tmp_path / "mine.txt").write_text("# comment\nwidget\n\nfoo.\n")
    assert find_bad_words("Widgets are foo, not food, idiot.", str(tmp_path / "mine.txt")) == [
        "widgets",
        "foo",
    ]


def test_groups_by_ground():
    assert find_groups("Women and Jewish employees with disabilities") == [
        ("religion", "jewish"),
        ("sex", "women"),
        ("disability", "disabilities"),
    ]
    assert find_groups("The board met on the whiteboard in Jewell.") == []


TEXTS = [
    "The women are idiots. Fine.",
    "Idiot! The immigrant files Form 3.",  # not in one sentence
    "The tenant pays rent.",
    "",
]


def test_rates_by_hand():
    rates = measure_toxicity(TEXTS)
    assert rates["bad_words_per_1000"] == pytest.approx(1000 * 2 / (5 + 6 + 4))
    assert (rates["bad_text_rate"], rates["group_rate"], rates["near_group_rate"]) == (
        0.5,
        0.5,
        0.25,
    )
    table = toxicity_table(TEXTS)
    assert table["groups"].tolist() == ["sex", "national origin", "", ""]
    assert table["bad_words_near_group"].tolist() == [1, 0, 0, 0]
    with pytest.raises(ValueError, match="no texts"):
        measure_toxicity([])


def test_a_judge_sees_all_texts_once_and_its_mean_is_reported():
    calls = []

    def shouting(texts):
        calls.append(list(texts))
        return [1.0 if "!" in text else 0.0 for text in texts]

    assert measure_toxicity(TEXTS, {"shouting": shouting})["shouting"] == 0.25
    assert calls == [TEXTS]


@pytest.mark.parametrize("scores", [[0.5], [0.5, 0.5, 0.5, 1.5], [0.1, 0.2, 0.3, float("nan")]])
def test_a_judge_that_does_not_answer_as_it_should_is_refused(scores):
    with pytest.raises(ValueError, match="judge 'broken' must give one score between 0 and 1"):
        toxicity_table(TEXTS, {"broken": lambda texts: scores})
