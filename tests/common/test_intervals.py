"""Intervals against scipy's own where that has them, and against planted truths at the sizes they
are used at.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from kl3m_nb.common.intervals import difference_interval, mean_interval, share_interval, verdict
from kl3m_nb.data import corpus

TRIALS = 2000  # the standard error of a coverage near 95% is half a percent


@pytest.fixture(scope="module")
def judged():
    """Bytes and families of the documents that notebook 04 judges on: every other of those held
    out.
    """
    documents = corpus.preview("package:licensedcode-data", held_out=True)[::2]
    return np.array([len(document.text.encode()) for document in documents]), [
        corpus.family(d) for d in documents
    ]


# Each of mean 0.
DISTRIBUTIONS = {
    "normal": lambda rng, size: rng.normal(size=size),
    "exponential": lambda rng, size: rng.exponential(size=size) - 1,
    "log-normal": lambda rng, size: rng.lognormal(size=size) - math.exp(0.5),
}


def coverage(intervals) -> float:
    return float(np.mean([interval.low <= 0 <= interval.high for interval in intervals]))


@pytest.mark.parametrize(
    "shared", [0.0, 0.5, 1.0], ids=["by document", "half by family", "by family"]
)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_an_interval_of_the_held_out_documents_holds_the_truth_as_often_as_it_says(
    judged, distribution, shared
):
    """The values planted are drawn for each document, for each family, or half and half."""
    rng, draw = np.random.default_rng(0), DISTRIBUTIONS[distribution]
    sizes, families = judged
    _, family = np.unique(families, return_inverse=True)
    of_family, own = (
        draw(rng, (TRIALS, family.max() + 1))[:, family],
        draw(rng, (TRIALS, len(sizes))),
    )
    values = math.sqrt(shared) * of_family + math.sqrt(1 - shared) * own
    assert 0.92 <= coverage(mean_interval(row, sizes, families) for row in values) <= 0.98


@pytest.mark.parametrize("windows", [8, 16])
@pytest.mark.parametrize("shape", [4, math.inf], ids=["skewed", "normal"])
def test_an_interval_of_a_few_windows_holds_the_truth_as_often_as_it_says(windows, shape):
    """As for the loss when two copies change places; the skewness of a gamma distribution of shape
    4 is 1.
    """
    rng, size = np.random.default_rng(1), (TRIALS, windows)
    values = rng.normal(size=size) if shape == math.inf else rng.gamma(shape, size=size) - shape
    assert 0.92 <= coverage(map(mean_interval, values)) <= 0.98


def test_an_interval_of_a_gap_between_two_sets_of_passages_holds_the_truth_as_often_as_it_says():
    """Shares of 24 tokens that are rarely right, as many of both sets; the chance varies by
    passage.
    """
    rng = np.random.default_rng(2)
    chances = rng.beta(0.5, 19.5, size=(TRIALS, 2, 40))
    right = rng.binomial(24, chances) / 24
    assert 0.92 <= coverage(difference_interval(*sets) for sets in right) <= 0.98


def test_the_licences_that_are_judged_on_count_as_four(judged):
    sizes, families = judged
    by_family = {
        family: sum(size for size, of in zip(sizes, families, strict=True) if of == family)
        for family in families
    }
    expected = sum(by_family.values()) ** 2 / sum(size**2 for size in by_family.values())
    assert mean_interval(np.zeros(len(sizes)), sizes, families).effective == pytest.approx(expected)
    assert 3.5 < expected < 4.5 and len(sizes) == 22


def test_values_of_one_weight_have_scipys_t_interval():
    values = np.random.default_rng(5).normal(3.0, 2.0, size=12)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert mean_interval(torch.tensor(values), level=0.9) == pytest.approx(
        (values.mean(), low, high, 12)
    )


def test_two_samples_have_scipys_welch_interval():
    rng = np.random.default_rng(6)
    first, second = rng.normal(1, 2, size=9), rng.normal(size=30)
    low, high = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert difference_interval(first, second) == pytest.approx(
        (first.mean() - second.mean(), low, high, 9)
    )


def test_a_family_counts_as_one_value_with_its_weight():
    whole = mean_interval([1.0, 2.0, 5.0, 4.0], [1, 3, 2, 2], ["a", "a", "b", "c"])
    assert whole == pytest.approx(mean_interval([1.75, 5.0, 4.0], [4, 2, 2]))
    assert whole.mean == pytest.approx((1 + 6 + 10 + 8) / 8) and whole.effective == pytest.approx(
        64 / 24
    )
    copies = difference_interval([1.0, 1.0, 3.0, 3.0], [0.0, 2.0], ["a", "a", "b", "b"])
    assert copies == pytest.approx(difference_interval([1.0, 3.0], [0.0, 2.0]))


def test_equal_values_have_an_interval_of_no_width():
    assert mean_interval([2.5] * 10, range(1, 11))[:3] == pytest.approx((2.5, 2.5, 2.5))
    assert difference_interval([2.5] * 3, [1.0] * 4)[:3] == pytest.approx((1.5, 1.5, 1.5))


def test_one_unit_alone_has_no_interval():
    for found in (
        mean_interval([2.0]),
        mean_interval([2.0, 3.0], families=["a", "a"]),
        difference_interval([2.0], [0.0, 0.0]),
        difference_interval([2.0, 2.0], [0.0, 0.0], None, ["a", "a"]),
    ):
        assert math.isfinite(found.mean) and math.isnan(found.low) and math.isnan(found.high)
        assert verdict(found) == "not resolved"
    assert mean_interval([2.0]).effective == 1


def test_a_share_has_scipys_wilson_interval_and_a_width_when_all_are_right():
    low, high = stats.binomtest(16, 64).proportion_ci(0.95, method="wilson")
    assert share_interval([True] * 16 + [False] * 48) == pytest.approx((0.25, low, high, 64))
    assert share_interval([True] * 10).low < 0.75 and share_interval([False] * 10).high > 0.25
    with pytest.raises(ValueError, match="no outcomes"):
        share_interval([])


def test_a_verdict_needs_the_whole_interval_on_one_side():
    assert verdict(mean_interval([-1.0, -1.1, -0.9])) == "better"
    assert verdict(mean_interval([1.0, 1.1, 0.9])) == "worse"
    assert verdict(mean_interval([-1.0, 1.1, 0.9])) == "not resolved"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(values=[]), "two one-dimensional sequences"),
        (dict(values=[1.0, 2.0], weights=[1.0]), "two one-dimensional sequences"),
        (dict(values=[1.0, 2.0], weights=[1.0, 0.0]), "must be positive"),
        (dict(values=[1.0, 2.0], families=["a"]), "2 values of 1 families"),
        (dict(values=[1.0], level=95), "between 0 and 1"),
    ],
)
def test_bad_samples_for_an_interval_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mean_interval(**arguments)
