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
    """The first evaluation of the run that meets `reference_loss`, not interpolated; `forecast_match` extrapolates."""
    curve = _checked_curve(held_out, "step")
    met = curve[curve["held_out_loss"] <= reference_loss]
    return QualityMatch(
        reference_loss=float(reference_loss),
        reached=not met.empty,
        step=None if met.empty else int(met["step"].iloc[0]),
        best_loss=float(curve["held_out_loss"].min()),
        last_step=int(curve["step"].iloc[-1]),
    )


@dataclass(frozen=True)
class MatchForecast:
    """When a run meets a reference loss, or why nobody can say.

    `status` is "met", "forecast" or "unknowable". `step`, `low` and `high` are the step it was met at; the median and the 95%
    interval of a forecast; NaN when unknowable. `reason` says in words what the status rests on. `curve` is the fitted loss with
    its 95% band, columns step, loss, low, high; empty when nothing was fitted.
    """

    reference_loss: float
    status: str
    step: float
    low: float
    high: float
    reason: str
    curve: pd.DataFrame

    def __str__(self) -> str:
        if self.status == "met":
            return f"loss {self.reference_loss:.3f} met at step {self.step:,.0f}"
        if self.status == "forecast":
            interval = f"95% interval {self.low:,.0f} to {self.high:,.0f}"
            return f"loss {self.reference_loss:.3f} expected at step {self.step:,.0f}, {interval}: {self.reason}"
        return f"loss {self.reference_loss:.3f}: not to be known, {self.reason}"


FEWEST_EVALUATIONS = 6  # twice the parameters of the fitted law
FARTHEST_FORECAST = 3.0  # times the last evaluated step: no law fitted to less of a run is worth more


def forecast_match(
    held_out: pd.DataFrame,
    reference_loss: float,
    planned_steps: int,
    resamples: int = 500,
    seed: int = 0,
    first_step: int = 0,
) -> MatchForecast:
    """When the run meets `reference_loss`: from its evaluations if it has, else by extrapolating them, if they allow it.

    The law is loss = E + A · step^−α, fitted by least squares to the evaluations after the first quarter of the run (before,
    warmup shapes the curve); its uncertainty comes from refitting to resampled residuals. The forecast is refused, with the
    reason, when there are fewer than 6 such evaluations, when more than 2.5% of the refits never come down to the reference,
    or when the interval reaches beyond three times the steps evaluated or beyond `planned_steps`, where the learning rate has run
    out and the curve's law with it. `first_step` is where the run began: above 0 where it continues a published model. The
    interval knows the scatter of the evaluations, not whether the law holds.
    Raises ValueError like `quality_match`, and for planned steps before the last evaluation.
    """
    match = quality_match(held_out, reference_loss)
    if planned_steps < match.last_step:
        raise ValueError(
            f"planned_steps is {planned_steps}, but the run was evaluated at step {match.last_step}; give its max_steps."
        )
    if match.reached:
        return MatchForecast(match.reference_loss, "met", match.step, match.step, match.step, "evaluated", pd.DataFrame())

    def unknowable(reason: str, curve: pd.DataFrame) -> MatchForecast:
        return MatchForecast(match.reference_loss, "unknowable", math.nan, math.nan, math.nan, reason, curve)

    curve = _checked_curve(held_out, "step")
    seen = match.last_step - first_step
    tail = curve[(curve["step"] > first_step) & (curve["step"] >= first_step + seen / 4)]
    farthest = first_step + FARTHEST_FORECAST * seen
    if len(tail) < FEWEST_EVALUATIONS:
        return unknowable(
            f"{len(tail)} evaluations after the first quarter of the run are too few to extrapolate", pd.DataFrame()
        )
    laws = _resampled_laws(tail["step"].to_numpy(float), tail["held_out_loss"].to_numpy(float), resamples, seed)
    steps = np.geomspace(tail["step"].iloc[0], min(planned_steps, farthest), 60)
    low, middle, high = np.quantile(laws.loss(steps), [0.025, 0.5, 0.975], axis=1)
    band = pd.DataFrame({"step": steps, "loss": middle, "low": low, "high": high})
    crossings = np.sort(laws.step_of(reference_loss))
    # order statistics rather than interpolated quantiles: between a number and infinity there is nothing to interpolate
    first, median, last = (crossings[int(share * (resamples - 1))] for share in (0.025, 0.5, 0.975))
    if math.isinf(last):
        never = np.isinf(crossings).mean()
        return unknowable(f"{never:.0%} of the curves that fit the evaluations never come down to it", band)
    if last > planned_steps:
        return unknowable(
            f"the interval reaches to step {last:,.0f}, beyond the {planned_steps:,} steps the run is planned for", band
        )
    if last > farthest:
        return unknowable(f"the interval reaches to step {last:,.0f}, more than three times what was seen", band)
    reason = f"extrapolated from {len(tail)} evaluations to step {match.last_step:,}"
    return MatchForecast(match.reference_loss, "forecast", float(median), float(first), float(last), reason, band)


@dataclass(frozen=True)
class _Laws:
    """Fitted laws loss = floor + scale · step^−exponent, arrays of one entry a refit."""

    floor: np.ndarray
    scale: np.ndarray
    exponent: np.ndarray

    def loss(self, steps: np.ndarray) -> np.ndarray:
        """[steps, refits]"""
        return self.floor + self.scale * steps[:, None] ** -self.exponent

    def step_of(self, loss: float) -> np.ndarray:
        """Where each law comes down to `loss`; infinite where it never does."""
        ratio = self.scale / np.where(self.floor < loss, loss - self.floor, np.nan)
        with np.errstate(over="ignore"):
            steps = np.where(ratio > 0, ratio, np.nan) ** (1 / self.exponent)
        return np.nan_to_num(steps, nan=math.inf, posinf=math.inf)


def _resampled_laws(steps: np.ndarray, losses: np.ndarray, resamples: int, seed: int) -> _Laws:
    """Laws refitted to the best fit plus residuals drawn with replacement, enlarged for the three parameters they paid for."""
    best = _fit_laws(steps, losses[:, None])
    fitted = best.loss(steps)[:, 0]
    residuals = (losses - fitted) * math.sqrt(len(losses) / (len(losses) - 3))
    drawn = np.random.default_rng(seed).choice(residuals - residuals.mean(), (len(losses), resamples))
    return _fit_laws(steps, fitted[:, None] + drawn)


def _fit_laws(steps: np.ndarray, losses: np.ndarray) -> _Laws:
    """One law for each column of `losses` [evaluations, columns]: the best exponent of a grid, the rest by least squares."""
    exponents = np.geomspace(0.03, 3.0, 80)
    best = np.full(losses.shape[1], np.inf)
    floor, scale, exponent = np.zeros_like(best), np.zeros_like(best), np.ones_like(best)
    for candidate in exponents:
        powers = (steps / steps[-1]) ** -candidate  # scaled, or the least squares are ill-conditioned
        design = np.column_stack([np.ones_like(powers), powers])
        (constant, slope), *_ = np.linalg.lstsq(design, losses, rcond=None)
        error = ((design @ np.array([constant, slope]) - losses) ** 2).sum(axis=0)
        better = error < best
        best = np.where(better, error, best)
        floor, scale = np.where(better, constant, floor), np.where(better, slope * steps[-1] ** candidate, scale)
        exponent = np.where(better, candidate, exponent)
    return _Laws(floor, scale, exponent)


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
