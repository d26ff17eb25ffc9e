"""Speedups on curves whose crossing can be worked out by hand, and FLOPs against figures derived another way."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kl3m_nb.growth import COSTS, cost_to_reach, forecast_match, quality_match, speedups


def curve(losses, tokens_per_step=10, seconds_per_step=2.0, flops_per_step=5.0, steps=None) -> pd.DataFrame:
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
    assert cost_to_reach(curve([5.0, 4.0, 3.0]), 3.25, "step") == pytest.approx(17.5)
    assert cost_to_reach(curve([5.0, 4.0, 3.0]), 3.25, "tokens") == pytest.approx(175)
    assert cost_to_reach(curve([5.0, 4.0, 3.0]), 3.25, "seconds") == pytest.approx(35)


def test_a_loss_met_exactly_costs_what_that_evaluation_cost():
    assert cost_to_reach(curve([5.0, 4.0, 3.0]), 4.0, "step") == 10


def test_a_rise_of_the_loss_does_not_undo_the_first_crossing():
    # 4.5 is met between steps 0 and 10, then lost again; 3.5 is met between the best so far, 4.0, and 3.0, after the spike.
    spiked = curve([5.0, 4.0, 9.0, 3.0])
    assert cost_to_reach(spiked, 4.5, "step") == pytest.approx(5)
    assert cost_to_reach(spiked, 3.5, "step") == pytest.approx(25)


def test_never_reached_is_nan():
    assert math.isnan(cost_to_reach(curve([5.0, 4.0, 3.0]), 2.99, "flops"))


def test_met_at_the_first_evaluation():
    assert cost_to_reach(curve([3.0, 2.0]), 3.5, "tokens") == 0
    assert cost_to_reach(curve([3.0, 2.0], steps=[25, 50]), 3.5, "tokens") == 250


@pytest.mark.parametrize("broken", [math.nan, math.inf, None])
def test_a_diverged_evaluation_is_passed_over(broken):
    assert cost_to_reach(curve([5.0, broken, 3.0]), 4.0, "step") == pytest.approx(10)


def test_order_of_rows_does_not_matter():
    shuffled = curve([5.0, 4.0, 3.0]).iloc[[2, 0, 1]]
    assert cost_to_reach(shuffled, 3.25, "step") == pytest.approx(17.5)


@given(
    st.lists(st.floats(1, 10), min_size=1, max_size=12),
    st.floats(1, 10),
    st.floats(0, 3),
)
def test_an_easier_target_never_costs_more(losses, target, easier_by):
    hard, easy = cost_to_reach(curve(losses), target, "tokens"), cost_to_reach(curve(losses), target + easier_by, "tokens")
    assert math.isnan(hard) or easy <= hard


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
    """G_stack, 7B: 300 B tokens from scratch against 194 B grown is a 54.6% speedup, and 35.3% fewer tokens, source included."""
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
    """A grown model that needs half the steps but twice the time a step gains tokens and no seconds."""
    scratch, source = curve([5.0, 4.0, 3.0]), curve([5.0, 4.9])
    grown = curve([3.5, 3.0], seconds_per_step=4.0)
    table = speedups(source, grown, scratch, 3.0)
    assert tuple(table.index) == COSTS
    assert table.loc["tokens", "speedup_excluding_source"] == pytest.approx(1.0)
    assert table.loc["seconds", "speedup_excluding_source"] == pytest.approx(0.0)
    assert table.loc["seconds", "speedup_including_source"] == pytest.approx(40 / (20 + 40) - 1)
    assert table.loc["seconds", "saved_including_source"] == pytest.approx(-0.5)


def test_the_sources_whole_cost_counts_after_its_best_loss_too():
    source = curve([5.0, 3.0, 4.0, 4.0])
    table = speedups(source, curve([4.0, 3.0]), curve([5.0, 3.0]), 3.5)
    assert table["source"].to_dict() == {"tokens": 300, "flops": 150, "seconds": 60}


@pytest.mark.parametrize(
    ("grown", "scratch", "reached"),
    [([4.0, 3.0], [5.0, 4.0], "grown only"), ([4.0, 3.9], [5.0, 3.0], "scratch only"), ([4.0, 3.9], [5.0, 4.0], "neither")],
)
def test_never_reached_is_said_and_gives_no_speedup(grown, scratch, reached):
    table = speedups(curve([5.0, 4.5]), curve(grown), curve(scratch), 3.5)
    assert set(table["reached"]) == {reached}
    derived = [column for column in table.columns if column.startswith(("speedup", "saved"))]
    assert len(derived) == 4
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


def power_law(seen: int, noise: float, seed: int, floor=2.0, scale=20.0, exponent=0.5) -> pd.DataFrame:
    """Evaluations every 100 steps up to `seen` of loss = floor + scale · step^−exponent."""
    steps = np.arange(100, seen + 1, 100)
    losses = floor + scale * steps**-exponent + np.random.default_rng(seed).normal(scale=noise, size=len(steps))
    return curve(losses, steps=steps)


def test_a_forecast_from_an_exact_law_is_the_laws_own_step():
    # 2 + 20/√t = 2.5 at t = 1600, seen to 1000
    forecast = forecast_match(power_law(1000, 0.0, 0), 2.5, planned_steps=5000)
    assert forecast.status == "forecast"
    assert forecast.step == pytest.approx(1600, rel=0.01)
    assert "step 1,000" in str(forecast)


def test_the_interval_of_a_forecast_holds_the_truth_about_as_often_as_it_says():
    forecasts = [forecast_match(power_law(2000, 0.004, seed), 2.4, 10**6, resamples=200) for seed in range(40)]
    known = [forecast for forecast in forecasts if forecast.status == "forecast"]
    assert len(known) >= 30
    assert sum(forecast.low <= 2500 <= forecast.high for forecast in known) >= 0.85 * len(known)


@pytest.mark.parametrize("evaluations", [6, 8])
def test_the_band_is_as_wide_as_least_squares_with_three_parameters_says(evaluations):
    """Fitted values vary, summed over the evaluations, by 3·RSS / (n - 3).

    The scatter is at right angles to all that the three parameters can do to the law, so that RSS is its own sum of squares.
    """
    steps = np.geomspace(500, 2000, evaluations).round()
    power = (steps / 2000) ** -0.5
    parameters, _ = np.linalg.qr(np.column_stack([np.ones_like(power), power, power * np.log(steps)]))
    variances = []
    for seed in range(8):
        scatter = np.random.default_rng(seed).normal(size=evaluations)
        scatter -= parameters @ (parameters.T @ scatter)
        scatter *= 0.02 / np.linalg.norm(scatter)
        band = forecast_match(curve(2 + power + scatter, steps=steps), 1.0, 10**6, resamples=300).curve
        deviation = np.interp(np.log(steps), np.log(band["step"]), (band["high"] - band["low"]) / (2 * 1.96))
        variances.append(np.sum(deviation**2))
    assert np.mean(variances) == pytest.approx(3 * 0.02**2 / (evaluations - 3), rel=0.2)


def test_noise_widens_the_interval():
    quiet, loud = (forecast_match(power_law(2000, noise, 1), 2.4, 10**6) for noise in (0.0005, 0.004))
    assert quiet.high - quiet.low < 0.5 * (loud.high - loud.low)


@pytest.mark.parametrize(
    ("frame", "reference", "planned", "reason"),
    [
        (power_law(2000, 0.004, 0), 1.9, 10**6, "never come down"),  # below the floor of the law
        (power_law(2000, 0.05, 0), 2.2, 10**6, "never come down|more than three times"),  # lost in the noise
        (power_law(2000, 0.0, 0), 2.1, 10**6, "more than three times"),  # at step 40,000
        (power_law(2000, 0.0005, 0), 2.4, 2200, "beyond the 2,200 steps"),
        (power_law(500, 0.0, 0), 2.5, 10**6, "4 evaluations after the first quarter"),
        (curve([3.0, 3.1, 3.0, 3.1, 3.0, 3.1, 3.0, 3.1, 3.0, 3.1]), 2.9, 10**6, "never come down"),
    ],
)
def test_what_cannot_be_known_is_said(frame, reference, planned, reason):
    forecast = forecast_match(frame, reference, planned)
    assert forecast.status == "unknowable" and math.isnan(forecast.step)
    assert re.search(reason, forecast.reason)
    assert "not to be known" in str(forecast)


def test_a_run_that_continues_a_model_is_cut_by_its_own_steps():
    """Begun at step 37,000 and seen to 38,000: its first quarter ends at 37,250, and three times what was seen is 40,000."""
    steps = np.arange(37_000, 38_001, 50)
    frame = curve(2.0 + 20.0 * steps**-0.5, steps=steps)
    band = forecast_match(frame, 1.0, 10**6, first_step=37_000).curve
    assert band["step"].iloc[0] == 37_250 and band["step"].iloc[-1] == pytest.approx(40_000)
    few = forecast_match(frame.head(7), 1.0, 10**6, first_step=37_000)
    assert "5 evaluations after the first quarter" in few.reason


def test_a_loss_already_met_needs_no_forecast():
    forecast = forecast_match(curve([5.0, 4.0, 3.0]), 4.0, planned_steps=20)
    assert (forecast.status, forecast.step, forecast.low, forecast.high) == ("met", 10, 10, 10)
    with pytest.raises(ValueError, match="planned_steps is 10"):
        forecast_match(curve([5.0, 4.0, 3.0]), 2.0, planned_steps=10)


def test_the_band_of_a_forecast_covers_what_was_seen_and_goes_on():
    frame = power_law(2000, 0.002, 0)
    band = forecast_match(frame, 2.4, 10**6).curve
    assert band["step"].iloc[0] == 500 and band["step"].iloc[-1] == pytest.approx(6000)
    assert (band["low"] <= band["loss"]).all() and (band["loss"] <= band["high"]).all()
    np.testing.assert_allclose(
        np.interp([600, 1200, 1900], band["step"], band["loss"]), 2 + 20 / np.sqrt([600, 1200, 1900]), atol=0.01
    )
