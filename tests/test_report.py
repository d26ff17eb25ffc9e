from __future__ import annotations

import math

import pandas as pd
import pytest

from kl3m_nb.report import compare_growth


def _curve(losses, cost_per_step=1.0):
    steps = range(0, 10 * len(losses), 10)
    return pd.DataFrame(
        {
            "step": list(steps),
            "tokens": [100 * step for step in steps],
            "seconds": [cost_per_step * step for step in steps],
            "flops": [1e12 * cost_per_step * step for step in steps],
            "held_out_loss": losses,
        }
    )


def test_the_target_is_scratchs_best_and_costs_are_those_to_reach_it():
    source, grown, scratch = _curve([8, 5], 0.25), _curve([6, 4, 3]), _curve([8, 6, 5, 4])
    comparison = compare_growth(source, grown, scratch)
    assert comparison.target_loss == 4 and (comparison.grown_step, comparison.scratch_step) == (10, 30)
    seconds = comparison.costs.loc["seconds"]
    assert seconds.speedup_excluding_source == pytest.approx(30 / 10 - 1)
    assert seconds.speedup_including_source == pytest.approx(30 / (10 + 2.5) - 1)
    assert "+200%" in comparison._repr_html_() and "+140%" in comparison._repr_html_()


def test_losses_are_told_as_held_out_and_to_one_precision():
    table = compare_growth(_curve([8, 5]), _curve([6, 5.16]), _curve([8.3521, 5.7076])).loss_table()
    assert list(table["held-out loss at step 0"]) == ["8.000", "6.000", "8.352"]
    assert list(table["final held-out loss"]) == ["5.000", "5.160", "5.708"] and list(table["tokens"]) == ["1,000"] * 3


def test_what_was_never_reached_is_said(tmp_path):
    comparison = compare_growth(_curve([8, 5]), _curve([6, 5, 4.5]), _curve([8, 6, 4]))
    assert math.isnan(comparison.grown_step)
    assert comparison.verdict() == "held-out loss 4.000, the best from scratch: reached from scratch after 20 steps, grown never"
    assert "never reached" in comparison.speedup_table().to_string()
    comparison.save(tmp_path)
    assert pd.read_csv(tmp_path / "speedups.csv").grown.isna().all()


def test_a_run_without_evaluations_is_named():
    whole = _curve([8, 6])
    for curve, count in ((pd.DataFrame(), 0), (_curve([8]), 1)):
        with pytest.raises(ValueError, match=f"scratch run has {count} evaluations and a comparison needs two"):
            compare_growth(whole, whole, curve)
