"""Paired differences and rankings that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kl3m_nb.evaluation.comparison import (
    differences_table,
    paired_difference,
    rank_agreement,
    side_by_side,
    steps_table,
    summary_table,
)
from kl3m_nb.evaluation.documents import Prediction


def prediction(bits_per_byte, size=100, identifiers=None) -> Prediction:
    bits = np.asarray(bits_per_byte, dtype=float)
    documents = pd.DataFrame(
        {
            "identifier": identifiers or [f"d{number}" for number in range(len(bits))],
            "domain": "x",
            "family": identifiers or range(len(bits)),
            "tokens": 25,
            "bytes": size,
            "loss": bits * size / 25 * math.log(2),
            "entropy_bits": 3.0,
            "bits_per_byte": bits,
        }
    )
    return Prediction(
        documents, pd.DataFrame({"confidence": [0.5], "accuracy": [0.4], "tokens": [10]})
    )


HARD = np.random.default_rng(3).uniform(
    1, 5, size=40
)  # what makes texts easy or hard for every model
MODELS = {
    "source": prediction(HARD),
    "trained": prediction(HARD - 0.1),
    "stack": prediction(HARD + 0.2),
    "twin": prediction(HARD),
}


def test_side_by_side_counts_are_whole_and_the_rest_has_its_decimals():
    table = pd.DataFrame(
        {"tokens": [24502, 7], "loss": [5.0386, 1.0], "rate": [0.5, math.nan]},
        index=["trained", "source"],
    )
    shown = side_by_side(table)
    assert shown.to_dict() == {
        "trained": {"tokens": "24,502", "loss": "5.039", "rate": "0.500"},
        "source": {"tokens": "7", "loss": "1.000", "rate": "–"},
    }
    assert side_by_side(summary_table(MODELS)).loc["documents"].tolist() == ["40"] * 4


def test_the_best_comes_first():
    table = summary_table({name: MODELS[name] for name in ("source", "stack", "trained")})
    assert list(table.index) == ["trained", "source", "stack"]
    assert table.loc["trained", "bits_per_byte"] == pytest.approx(HARD.mean() - 0.1)


def test_pairing_finds_what_the_two_intervals_hide():
    source, trained = MODELS["source"], MODELS["trained"]
    assert trained.bits_per_byte.high > source.bits_per_byte.low, (
        "the intervals of the models overlap"
    )
    assert paired_difference(trained, source) == pytest.approx((-0.1, -0.1, -0.1, 40))


def test_a_verdict_for_every_other_model():
    noisy = prediction(HARD + np.random.default_rng(1).normal(scale=1, size=40))
    table = differences_table({**MODELS, "noisy": noisy}, "source").set_index("model")
    assert table["verdict"].to_dict() == {
        "trained": "better",
        "stack": "worse",
        "twin": "not resolved",
        "noisy": "not resolved",
    }
    assert table["better_on"].to_dict() == pytest.approx(
        {"trained": 1, "stack": 0, "twin": 0, "noisy": table.better_on["noisy"]}
    )
    with pytest.raises(ValueError, match="no model 'other'"):
        differences_table(MODELS, "other")


def test_long_documents_weigh_more():
    first, second = prediction([1.0, 1.0], size=[10, 30]), prediction([2.0, 1.0], size=[10, 30])
    assert paired_difference(second, first).mean == pytest.approx(10 / 40)


@pytest.mark.parametrize(
    "other",
    [
        prediction([1.0]),
        prediction([1.0, 2.0], identifiers=["d1", "d0"]),
        prediction([1.0, 2.0], size=9),
    ],
)
def test_other_documents_are_refused(other):
    with pytest.raises(ValueError, match="on the same documents in the same order"):
        paired_difference(prediction([1.0, 2.0]), other)


def test_rankings_and_kendalls_tau():
    figures = pd.DataFrame(
        {"loss": [3.0, 2.0, 1.0], "accuracy": [0.1, 0.3, 0.2], "same": [9.0, 8.0, 7.0]},
        index=["a", "b", "c"],
    )
    table = rank_agreement(
        figures, "loss", {"loss": True, "accuracy": False, "same": True}
    ).set_index("figure")
    assert table["ranking"].to_dict() == {
        "loss": "a < b < c",
        "accuracy": "a < c < b",
        "same": "a < b < c",
    }
    # what is compared with has no agreement with itself to show
    nothing = {"loss": math.nan}
    assert table["tau"].to_dict() == pytest.approx(
        {**nothing, "accuracy": 1 / 3, "same": 1}, nan_ok=True
    )
    assert table["by_chance"].to_dict() == pytest.approx(
        {**nothing, "accuracy": 1 / 2, "same": 1 / 6}, nan_ok=True
    )
    reversed_table = rank_agreement(figures, "loss", {"loss": True, "same": False})
    assert reversed_table[["tau", "by_chance"]].iloc[1].tolist() == pytest.approx([-1, 1])


@pytest.mark.parametrize("models", [4, 5])
def test_the_chance_of_an_agreement_is_that_of_all_orders(models):
    """Against scipy's exact distribution of tau, which has no ties."""
    figures = pd.DataFrame(
        {"loss": range(models), "other": [1, 0, *range(2, models)]},
        index=[*"abcdef"[:models]],
        dtype=float,
    )
    other = rank_agreement(figures, "loss", {"loss": True, "other": True}).iloc[1]
    expected = stats.kendalltau(figures.loss, figures.other, method="exact", alternative="greater")
    assert (other.tau, other.by_chance) == pytest.approx((expected.statistic, expected.pvalue))


def test_a_figure_that_is_missing_or_the_same_for_all_has_no_tau():
    figures = pd.DataFrame(
        {"loss": [3.0, 2.0, 1.0], "tied": [1.0, 1.0, 1.0], "missing": [1.0, math.nan, 2.0]}
    )
    figures.index = ["a", "b", "c"]
    table = rank_agreement(figures, "loss", {"loss": True, "tied": True, "missing": True})
    assert table[["tau", "by_chance"]].isna().all(axis=None)
    assert rank_agreement(figures[:1], "loss", {"loss": True})["tau"].isna().all()
    with pytest.raises(ValueError, match="'speed'"):
        rank_agreement(figures, "loss", {"loss": True, "speed": True})


def test_checkpoints_over_the_steps_are_held_against_each_other_on_the_documents_that_all_have():
    older = prediction(HARD[:9:3] + 1, identifiers=["d0", "d3", "d6"])
    twice = steps_table(
        {step: prediction(HARD[:3], identifiers=["a", "a", "b"]) for step in (0, 1)}
    )
    assert twice[["low", "high"]].isna().all(axis=None), "one document has no interval"
    assert set(twice["documents"]) == {1} and set(twice["difference"]) == {0.0}
    table = steps_table({200: MODELS["trained"], 0: MODELS["stack"], 100: older})
    assert list(table["step"]) == [0, 100, 200] and set(table["documents"]) == {3}
    assert table["bits_per_byte"].tolist() == pytest.approx(
        [HARD[:9:3].mean() + more for more in (0.2, 1, -0.1)]
    )
    # The documents are of very different difficulty, which a difference paired by document does not
    # see.
    expected = [[more] * 3 for more in (0, 0.8, -0.3)]
    np.testing.assert_allclose(table[["difference", "low", "high"]], expected, atol=1e-9)
