from __future__ import annotations

import math

import pandas as pd
import pytest

from kl3m_nb.growth.speedups import compare_growth


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


def test_the_target_is_scratchs_best_where_that_is_below_the_sources_final_loss():
    source, grown, scratch = _curve([8, 5], 0.25), _curve([6, 4, 3]), _curve([8, 6, 5, 4])
    comparison = compare_growth(source, grown, scratch)
    assert comparison.target_loss == 4 and (comparison.grown.cost, comparison.scratch.cost) == (
        10,
        30,
    )
    flops = comparison.costs.loc["flops"]
    assert flops.speedup_excluding_source == pytest.approx(30 / 10 - 1)
    assert flops.speedup_including_source == pytest.approx(30 / (10 + 2.5) - 1)
    assert "+200%" in comparison._repr_html_() and "+140%" in comparison._repr_html_()


@pytest.mark.parametrize("scratch", [[8, 6, 5.5], [8, 6, 4.5, 4.6]])
def test_the_target_is_never_above_the_sources_final_loss(scratch):
    """Else the source alone would have done. It is the final loss, not the best, of what was
    stacked.
    """
    comparison = compare_growth(_curve([8, 4.9, 5]), _curve([6, 4, 3]), _curve(scratch))
    assert comparison.target_loss == min(5, *scratch)
    reached = comparison.costs["reached"].tolist()
    assert reached == ["both" if min(scratch) <= 5 else "grown only"] * 2


def test_what_one_run_is_stands_beside_its_figures():
    """Interval of the crossing, loss at equal compute with the source's, one seed, rates not tuned;
    no seconds.
    """
    comparison = compare_growth(_curve([8, 5], 0.25), _curve([6, 4, 3]), _curve([8, 6, 5.5]))
    verdict, page = comparison.verdict(), comparison._repr_html_()
    assert "grown reached it between steps 0 and 10" in verdict
    assert comparison.equal == (20e12, 3.25, 17.5, 5.5, 20)
    for text in (verdict, page):
        assert "3.250" in text and "5.500" in text and "one seed" in text and "not tuned" in text
        assert "seconds" not in text and " s<" not in text


def test_a_source_of_which_only_the_end_is_known_is_counted():
    end = pd.DataFrame(
        [
            {
                "step": 63_000,
                "tokens": 15_830,
                "seconds": math.nan,
                "flops": 5e12,
                "held_out_loss": 4.0,
            }
        ]
    )
    comparison = compare_growth(end, _curve([6, 3]), _curve([8, 6, 3.5]))
    assert comparison.target_loss == 3.5 and comparison.costs.loc["tokens", "source"] == 15_830
    assert list(comparison.loss_table()["held-out loss at step 0"]) == ["–", "6.000", "8.000"]


def test_losses_are_told_as_held_out_and_to_one_precision():
    table = compare_growth(_curve([8, 5]), _curve([6, 5.16]), _curve([8.3521, 5.7076])).loss_table()
    assert list(table["held-out loss at step 0"]) == ["8.000", "6.000", "8.352"]
    assert (
        list(table["final held-out loss"]) == ["5.000", "5.160", "5.708"]
        and list(table["tokens"]) == ["1,000"] * 3
    )


def test_what_was_never_reached_is_said(tmp_path):
    comparison = compare_growth(_curve([8, 5]), _curve([6, 5, 4.5]), _curve([8, 6, 4]))
    assert math.isnan(comparison.grown.cost)
    assert (
        "grown had not reached it at its end, step 20, from scratch reached it between steps 10"
        " and 20" in comparison.verdict()
    )
    assert set(comparison.speedup_table()["reached by"]) == {"scratch only"}
    comparison.save(tmp_path)
    assert pd.read_csv(tmp_path / "speedups.csv").grown.isna().all()


def test_a_run_without_evaluations_is_named():
    whole = _curve([8, 6])
    for curve, count in ((pd.DataFrame(), 0), (_curve([8]), 1)):
        with pytest.raises(
            ValueError, match=f"scratch run has {count} evaluations and a comparison needs 2"
        ):
            compare_growth(whole, whole, curve)
    with pytest.raises(ValueError, match="source run has 0 evaluations and a comparison needs 1"):
        compare_growth(pd.DataFrame(), whole, whole)
