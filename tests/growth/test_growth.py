"""Speedups on curves whose crossing can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kl3m_nb.growth.speedups import (
    COSTS,
    at_equal_compute,
    cost_to_reach,
    quality_match,
    speedup_in_words,
    speedups,
)


def curve(
    losses, tokens_per_step=10, seconds_per_step=2.0, flops_per_step=5.0, steps=None
) -> pd.DataFrame:
    """A run evaluated at steps 0, 10, 20, … unless told otherwise."""
    steps = np.arange(len(losses)) * 10 if steps is None else np.asarray(steps)
    return pd.DataFrame(
        {
            "step": steps,
            "tokens": steps * tokens_per_step,
            "seconds": steps * seconds_per_step,
            "flops": steps * flops_per_step,
            "held_out_loss": losses,
        }
    )


def test_crossing_is_interpolated_between_the_evaluations_around_it():
    # From 4 at step 10 to 3 at step 20: 3.25 lies three quarters of the way, at step 17.5.
    assert cost_to_reach(curve([5.0, 4.0, 3.0]), 3.25, "step").cost == pytest.approx(17.5)
    assert cost_to_reach(curve([5.0, 4.0, 3.0]), 3.25, "tokens").cost == pytest.approx(175)
    assert cost_to_reach(curve([5.0, 4.0, 3.0]), 3.25, "seconds").cost == pytest.approx(35)


def test_a_loss_met_exactly_costs_what_that_evaluation_cost():
    assert cost_to_reach(curve([5.0, 4.0, 3.0]), 4.0, "step").cost == 10


def test_a_rise_of_the_loss_does_not_undo_the_first_crossing():
    # 4.5 is met between steps 0 and 10, then lost again; 3.5 is met between the best so far, 4.0,
    # and 3.0, after the spike.
    spiked = curve([5.0, 4.0, 9.0, 3.0])
    assert cost_to_reach(spiked, 4.5, "step").cost == pytest.approx(5)
    assert cost_to_reach(spiked, 3.5, "step").cost == pytest.approx(25)


def test_never_reached_is_nan():
    assert math.isnan(cost_to_reach(curve([5.0, 4.0, 3.0]), 2.99, "flops").cost)


def test_met_at_the_first_evaluation():
    assert cost_to_reach(curve([3.0, 2.0]), 3.5, "tokens").cost == 0
    assert cost_to_reach(curve([3.0, 2.0], steps=[25, 50]), 3.5, "tokens").cost == 250


@pytest.mark.parametrize("broken", [math.nan, math.inf, None])
def test_a_diverged_evaluation_is_passed_over(broken):
    assert cost_to_reach(curve([5.0, broken, 3.0]), 4.0, "step").cost == pytest.approx(10)


def test_order_of_rows_does_not_matter():
    shuffled = curve([5.0, 4.0, 3.0]).iloc[[2, 0, 1]]
    assert cost_to_reach(shuffled, 3.25, "step").cost == pytest.approx(17.5)


@given(
    st.lists(st.floats(1, 10), min_size=1, max_size=12),
    st.floats(1, 10),
    st.floats(0, 3),
)
def test_an_easier_target_never_costs_more(losses, target, easier_by):
    hard, easy = (
        cost_to_reach(curve(losses), loss, "tokens") for loss in (target, target + easier_by)
    )
    assert math.isnan(hard.cost) or easy.cost <= hard.cost
    assert easy.low <= hard.low and easy.high <= hard.high
    assert not hard.reached or hard.low <= hard.cost <= hard.high


@pytest.mark.parametrize("every", [1, 3, 20])
@pytest.mark.parametrize("truth", [23.5, 77.0, 140.2])
def test_the_interval_of_a_crossing_holds_the_planted_one_however_rarely_the_run_is_evaluated(
    every, truth
):
    """On a convex curve the crossing between two evaluations is too late by interpolation; between
    them it is, always.
    """
    steps = np.arange(0, 201, every)
    planted = curve(5 * np.exp(-steps / 50), steps=steps)
    crossing = cost_to_reach(planted, 5 * math.exp(-truth / 50), "step")
    assert (
        crossing.reached
        and crossing.low <= truth <= crossing.high
        and crossing.high - crossing.low == every
    )
    assert truth <= crossing.cost <= truth + every


def test_a_loss_that_was_never_met_costs_more_than_the_whole_run():
    assert cost_to_reach(curve([5.0, 4.0, 3.0]), 2.0, "tokens")[1:] == (200, math.inf)
    assert cost_to_reach(curve([5.0, 4.0], steps=[25, 50]), 6.0, "step")[1:] == (0, 25)


def test_the_ends_of_a_speedup_are_those_of_the_crossings():
    tokens = speedups(
        curve([5.0, 4.5]), curve([4.5, 4.1, 3.0]), curve([5.0, 4.5, 4.2, 3.0]), 4.0
    ).loc["tokens"]
    assert tokens[["grown_low", "grown_high", "scratch_low", "scratch_high"]].tolist() == [
        100,
        200,
        200,
        300,
    ]
    assert tokens["speedup_including_source_low"] == pytest.approx(200 / (100 + 200) - 1)
    assert tokens["speedup_including_source_high"] == pytest.approx(300 / (100 + 100) - 1)
    assert (
        tokens["speedup_excluding_source_low"] == 0 and tokens["speedup_excluding_source_high"] == 2
    )


def test_against_a_target_that_one_run_never_met_the_speedup_has_one_end():
    source, met, missed = (
        curve([5.0, 4.5]),
        curve([5.0, 4.5, 3.0]),
        curve([5.0, 4.9, 4.8, 4.7, 4.6, 4.5]),
    )
    better = speedups(source, met, missed, 4.0).loc["tokens"]
    assert better["speedup_including_source_low"] == pytest.approx(500 / (100 + 200) - 1)
    assert better["speedup_including_source_high"] == math.inf
    assert speedup_in_words(better, "including") == "more than +67%"
    worse = speedups(source, missed, met, 4.0).loc["tokens"]
    assert worse["speedup_including_source_high"] == pytest.approx(200 / (100 + 500) - 1)
    assert speedup_in_words(worse, "including") == "less than -67%"


def test_at_equal_compute_the_sources_operations_are_in_the_grown_runs():
    """Scratch ends at 200 operations; the grown run has 50 of the source behind it, and 150 of its
    own at step 30.
    """
    source, grown = curve([5.0, 4.5]), curve([4.4, 4.2, 4.0, 3.8, 3.6, 3.4])
    equal = at_equal_compute(source, grown, curve([5.0, 4.0, 3.9, 3.85, 3.9]))
    assert equal == (200, 3.8, 30, 3.9, 40)
    first = at_equal_compute(source, grown[:2], curve([5.0, 4.0, 3.0]))
    assert first.flops == 100 and first.grown_loss == 4.2 and first.scratch_loss == 3.0
    early = at_equal_compute(curve([5.0] * 9), grown, curve([5.0, 4.0]))
    assert early.flops == 50 and math.isnan(early.grown_loss) and early.scratch_loss == 4.0


@pytest.mark.parametrize(
    ("frame", "cost", "message"),
    [
        (curve([5.0, 4.0]).drop(columns="flops"), "flops", "lacks the columns flops"),
        (curve([5.0, 4.0]), "dollars", "no cost 'dollars'"),
        (curve([math.nan]), "step", "no evaluation"),
        (curve([5.0, 4.0]).assign(seconds=[9.0, 1.0]), "seconds", "counted from the start"),
    ],
)
def test_unusable_curves_are_refused(frame, cost, message):
    with pytest.raises(ValueError, match=message):
        cost_to_reach(frame, 4.0, cost)


def test_the_papers_figures():
    """G_stack, 7B: 300 B tokens from scratch against 194 B grown is a 54.6% speedup, and 35.3%
    fewer tokens, source included.
    """
    scratch = curve([9.0, 2.0], tokens_per_step=30)
    source = curve([9.0, 2.5], tokens_per_step=4)
    grown = curve([5.0, 2.0], tokens_per_step=15.4)
    tokens = speedups(source, grown, scratch, 2.0).loc["tokens"]
    assert tokens[["scratch", "grown", "source"]].tolist() == pytest.approx([300, 154, 40])
    assert tokens["speedup_including_source"] == pytest.approx(0.546, abs=5e-4)
    assert tokens["saved_including_source"] == pytest.approx(0.353, abs=5e-4)
    assert tokens["speedup_excluding_source"] == pytest.approx(300 / 154 - 1)
    assert tokens["saved_excluding_source"] == pytest.approx(1 - 154 / 300)
    assert tokens["reached"] == "both"


def test_each_cost_is_compared_in_its_own_unit():
    """A grown model that needs half the steps but twice the operations a step gains tokens and no
    operations.
    """
    scratch, source = curve([5.0, 4.0, 3.0]), curve([5.0, 4.9])
    grown = curve([3.5, 3.0], flops_per_step=10.0)
    table = speedups(source, grown, scratch, 3.0)
    assert tuple(table.index) == COSTS == ("tokens", "flops")
    assert table.loc["tokens", "speedup_excluding_source"] == pytest.approx(1.0)
    assert table.loc["flops", "speedup_excluding_source"] == pytest.approx(0.0)
    assert table.loc["flops", "speedup_including_source"] == pytest.approx(100 / (50 + 100) - 1)
    assert table.loc["flops", "saved_including_source"] == pytest.approx(-1 / 2)


def test_the_sources_whole_cost_counts_after_its_best_loss_too():
    source = curve([5.0, 3.0, 4.0, 4.0])
    table = speedups(source, curve([4.0, 3.0]), curve([5.0, 3.0]), 3.5)
    assert table["source"].to_dict() == {"tokens": 300, "flops": 150}


@pytest.mark.parametrize(
    ("grown", "scratch", "reached"),
    [
        ([4.0, 3.0], [5.0, 4.0], "grown only"),
        ([4.0, 3.9], [5.0, 3.0], "scratch only"),
        ([4.0, 3.9], [5.0, 4.0], "neither"),
    ],
)
def test_never_reached_is_said_and_gives_no_speedup(grown, scratch, reached):
    table = speedups(curve([5.0, 4.5]), curve(grown), curve(scratch), 3.5)
    assert set(table["reached"]) == {reached}
    derived = [
        f"{what}_{which}_source"
        for what in ("speedup", "saved")
        for which in ("including", "excluding")
    ]
    assert table[derived].isna().all(axis=None)
    assert table["source"].notna().all()


def test_a_stack_that_starts_below_the_target_cost_only_its_source():
    tokens = speedups(curve([5.0, 4.5]), curve([3.0, 2.5]), curve([5.0, 3.0]), 3.5).loc["tokens"]
    assert tokens["grown"] == 0
    assert tokens["speedup_excluding_source"] == math.inf
    assert tokens["saved_excluding_source"] == 1
    assert tokens["speedup_including_source"] == pytest.approx(75 / 100 - 1)


def test_against_a_target_that_scratch_meets_untrained_nothing_is_saved():
    tokens = speedups(curve([5.0, 4.5]), curve([5.0, 3.0]), curve([3.0, 2.5]), 3.5).loc["tokens"]
    assert tokens["speedup_excluding_source"] == tokens["speedup_including_source"] == -1
    assert tokens["saved_excluding_source"] == tokens["saved_including_source"] == -math.inf


def test_quality_match_names_the_first_evaluation_that_meets_the_reference():
    match = quality_match(curve([5.0, 4.0, 4.5, 3.0]), 4.0)
    assert (match.reached, match.step, match.best_loss, match.last_step) == (True, 10, 3.0, 30)
    assert str(match) == "loss 4.000 met at step 10"


def test_quality_match_does_not_extrapolate():
    match = quality_match(curve([5.0, 4.0, 3.5]), 3.4)
    assert (match.reached, match.step) == (False, None)
    assert str(match) == "loss 3.400 not reached by step 20: the best, 3.500, is 0.100 above"
