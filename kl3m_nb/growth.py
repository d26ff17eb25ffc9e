"""Growth: what a grown model saves against one trained from scratch, at the same held-out loss, with nothing left out.

A curve is a DataFrame with the columns `step`, `tokens`, `seconds`, `flops`, `held_out_loss`, one row an evaluation on the same
fixed held-out set, costs counted from the start of that run. A speedup is cost of scratch over cost of growth, minus 1, as in
G_stack (arXiv:2405.15319), whose own figures include the source's cost; a speedup of 54% saves 35% of the cost, not 54%.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

COSTS = ("tokens", "flops", "seconds")
CURVE_COLUMNS = ("step", "tokens", "seconds", "flops", "held_out_loss")


def cost_to_reach(held_out: pd.DataFrame, target_loss: float, cost: str) -> float:
    """What the run had spent when its best loss so far first met `target_loss`; NaN means that it never did.

    `cost` names the column to read: tokens, flops, seconds, or step. Between the last evaluation above the target and the first
    at or below it the best loss is taken to fall linearly in the cost; a curve whose first evaluation meets the target gives the
    cost of that one. Evaluations whose loss is not finite are passed over.
    Raises ValueError for a missing column, a curve without a usable evaluation, or a cost that falls while steps rise.
    """
    curve = _checked_curve(held_out, cost)
    costs = curve[cost].to_numpy(dtype=float)
    best = curve["held_out_loss"].cummin().to_numpy(dtype=float)
    met = best <= target_loss
    if not met.any():
        return math.nan
    after = int(met.argmax())
    if after == 0:
        return float(costs[0])
    before = after - 1
    fraction = (best[before] - target_loss) / (best[before] - best[after])
    return float(costs[before] + fraction * (costs[after] - costs[before]))


def speedups(source: pd.DataFrame, grown: pd.DataFrame, scratch: pd.DataFrame, target_loss: float) -> pd.DataFrame:
    """Costs and speedups of `grown` against `scratch` at `target_loss`: a row each for tokens, flops and seconds.

    `source` is the curve of the model that was stacked, up to the checkpoint that was used: its whole cost counts, whatever its
    loss. Columns: `scratch` and `grown`, the cost to reach the target; `source`; `reached`, one of "both", "grown only",
    "scratch only", "neither"; `speedup_excluding_source` = scratch / grown − 1; `speedup_including_source` =
    scratch / (source + grown) − 1; `saved_excluding_source` and `saved_including_source` = 1 − 1 / (1 + speedup), the share of
    scratch's cost that was not needed, negative for a loss. What was never reached, and what follows from it, is NaN; a grown
    model that meets the target before its first step has an infinite speedup when the source is left out, and against a scratch
    model that does so the saved share is minus infinity.
    """
    rows = []
    for cost in COSTS:
        scratch_cost = cost_to_reach(scratch, target_loss, cost)
        grown_cost = cost_to_reach(grown, target_loss, cost)
        source_cost = float(_checked_curve(source, cost)[cost].iloc[-1])
        excluding = _speedup(scratch_cost, grown_cost)
        including = _speedup(scratch_cost, source_cost + grown_cost)
        rows.append(
            {
                "cost": cost,
                "scratch": scratch_cost,
                "grown": grown_cost,
                "source": source_cost,
                "reached": _who_reached(grown_cost, scratch_cost),
                "speedup_excluding_source": excluding,
                "speedup_including_source": including,
                "saved_excluding_source": _saved(excluding),
                "saved_including_source": _saved(including),
            }
        )
    return pd.DataFrame(rows).set_index("cost")


@dataclass(frozen=True)
class QualityMatch:
    """Whether and when a run met a reference loss, e.g. the final loss of another model on the same held-out set."""

    reference_loss: float
    reached: bool
    step: int | None  # first evaluated step at or below the reference; None exactly when it was not reached
    best_loss: float  # lowest loss of the run
    last_step: int  # how far the run was looked at

    def __str__(self) -> str:
        if self.reached:
            return f"loss {self.reference_loss:.3f} met at step {self.step}"
        best = f"the best, {self.best_loss:.3f}, is {self.best_loss - self.reference_loss:.3f} above"
        return f"loss {self.reference_loss:.3f} not reached by step {self.last_step}: {best}"


def quality_match(held_out: pd.DataFrame, reference_loss: float) -> QualityMatch:
    """The first evaluation of the run that meets `reference_loss`, not interpolated and never extrapolated."""
    curve = _checked_curve(held_out, "step")
    met = curve[curve["held_out_loss"] <= reference_loss]
    return QualityMatch(
        reference_loss=float(reference_loss),
        reached=not met.empty,
        step=None if met.empty else int(met["step"].iloc[0]),
        best_loss=float(curve["held_out_loss"].min()),
        last_step=int(curve["step"].iloc[-1]),
    )


def _checked_curve(held_out: pd.DataFrame, cost: str) -> pd.DataFrame:
    """The usable evaluations in the order of their steps."""
    if cost not in CURVE_COLUMNS[:-1]:
        raise ValueError(f"There is no cost {cost!r}; choose one of {', '.join(CURVE_COLUMNS[:-1])}.")
    missing = [column for column in ("step", cost, "held_out_loss") if column not in held_out.columns]
    if missing:
        raise ValueError(f"The curve lacks the columns {', '.join(missing)}; it needs {', '.join(CURVE_COLUMNS)}.")
    usable = np.isfinite(held_out["held_out_loss"].astype(float)) & held_out[cost].notna()
    curve = held_out[usable].sort_values("step", kind="stable")
    if curve.empty:
        raise ValueError("The curve holds no evaluation with a held-out loss; evaluate the run at least once.")
    if not curve[cost].is_monotonic_increasing:
        raise ValueError(f"The {cost} of the curve fall while its steps rise; costs must be counted from the start of the run.")
    return curve


def _speedup(reference: float, cost: float) -> float:
    if math.isnan(reference) or math.isnan(cost) or reference == cost == 0:
        return math.nan
    return math.inf if cost == 0 else reference / cost - 1


def _saved(speedup: float) -> float:
    return -math.inf if speedup == -1 else 1 - 1 / (1 + speedup)


def _who_reached(grown_cost: float, scratch_cost: float) -> str:
    grown, scratch = not math.isnan(grown_cost), not math.isnan(scratch_cost)
    if grown and scratch:
        return "both"
    return "grown only" if grown else "scratch only" if scratch else "neither"
