"""Growth: what a grown model saves against one trained from scratch, at the same held-out loss,
with nothing left out.

A curve is a DataFrame with the columns `step`, `tokens`, `seconds`, `flops`, `held_out_loss`, one
row an evaluation on the same fixed held-out set, costs counted from the start of that run. A
speedup is cost of scratch over cost of growth, minus 1, as in G_stack (arXiv:2405.15319), whose own
figures include the source's cost; a speedup of 54% saves 35% of the cost, not 54%. Speedups are
taken in tokens and in operations. Seconds depend on what else the machine does, so they are not
compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from kl3m_nb.common.files import replace_text

COSTS = ("tokens", "flops")


CURVE_COLUMNS = ("step", "tokens", "seconds", "flops", "held_out_loss")


class Crossing(NamedTuple):
    """What a run had spent when it first met a loss, and the two evaluations that this is known
    from.

    `low` is the cost at the last evaluation above the loss, 0 when there is none, and `high` that
    at the first evaluation at or below it. Of a loss that was never met `cost` is NaN, `low` the
    cost at the last evaluation, and `high` infinite.
    """

    cost: float
    low: float
    high: float

    @property
    def reached(self) -> bool:
        """Whether the loss was met."""
        return math.isfinite(self.high)


def cost_to_reach(held_out: pd.DataFrame, target_loss: float, cost: str) -> Crossing:
    """What the run had spent when its best loss so far first met `target_loss`.

    `cost` names the column to read: tokens, flops, seconds, or step. Between the last evaluation
    above the target and the first at or below it the best loss is taken to fall linearly in the
    cost; a curve whose first evaluation meets the target gives the cost of that one. Evaluations
    whose loss is not finite are passed over. Raises ValueError for a missing column, a curve
    without a usable evaluation, or a cost that falls while steps rise.
    """
    curve = checked_curve(held_out, cost)
    costs = curve[cost].to_numpy(dtype=float)
    best = curve["held_out_loss"].cummin().to_numpy(dtype=float)
    met = best <= target_loss
    if not met.any():
        return Crossing(math.nan, float(costs[-1]), math.inf)
    after = int(met.argmax())
    if after == 0:
        return Crossing(float(costs[0]), 0.0, float(costs[0]))
    before = after - 1
    fraction = (best[before] - target_loss) / (best[before] - best[after])
    between = float(costs[before] + fraction * (costs[after] - costs[before]))
    return Crossing(between, float(costs[before]), float(costs[after]))


def speedups(
    source: pd.DataFrame, grown: pd.DataFrame, scratch: pd.DataFrame, target_loss: float
) -> pd.DataFrame:
    """Costs and speedups of `grown` against `scratch` at `target_loss`: a row each for tokens and
    flops.

    `source` is the curve of the model that was stacked, up to the checkpoint that was used: its
    whole cost counts, whatever its loss. Columns: `scratch` and `grown`, the cost to reach the
    target; `source`; `reached`, one of "both", "grown only", "scratch only", "neither";
    `speedup_excluding_source` = scratch / grown − 1; `speedup_including_source` = scratch / (source
    + grown) − 1; `saved_excluding_source` and `saved_including_source` = 1 − 1 / (1 + speedup), the
    share of scratch's cost that was not needed, negative for a loss. The same names with `_low` and
    `_high` are the ends of what the evaluations leave open, see `Crossing`: where scratch never
    came to the target, the speedup is more than `_low`. What was never reached, and what follows
    from it, is NaN. A grown model that meets the target before its first step has an infinite
    speedup when the source is left out; against a scratch model that does so the saved share is
    minus infinity.
    """
    rows = []
    for cost in COSTS:
        of_scratch, of_grown = (
            cost_to_reach(scratch, target_loss, cost),
            cost_to_reach(grown, target_loss, cost),
        )
        source_cost = float(_sorted(source)[cost].iloc[-1])
        row = {"cost": cost, "source": source_cost, "reached": _who_reached(of_grown, of_scratch)}
        # a dear scratch run and a cheap grown one make a large speedup, so the low end is low
        # against high
        for end, from_scratch, growing in (
            ("", of_scratch.cost, of_grown.cost),
            ("_low", of_scratch.low, of_grown.high),
            ("_high", of_scratch.high, of_grown.low),
        ):
            excluding, including = (
                _speedup(from_scratch, growing),
                _speedup(from_scratch, source_cost + growing),
            )
            row |= {
                f"speedup_excluding_source{end}": excluding,
                f"speedup_including_source{end}": including,
            }
        for name, crossing in (("scratch", of_scratch), ("grown", of_grown)):
            row |= {name: crossing.cost, f"{name}_low": crossing.low, f"{name}_high": crossing.high}
        for which in ("excluding", "including"):
            row[f"saved_{which}_source"] = _saved(row[f"speedup_{which}_source"])
        rows.append(row)
    return pd.DataFrame(rows).set_index("cost")


def speedup_in_words(costs: pd.Series, which: str) -> str:
    """A speedup of a row of `speedups` with its ends; `which` is "including" or "excluding" the
    source.
    """
    speedup, low, high = (costs[f"speedup_{which}_source{end}"] for end in ("", "_low", "_high"))
    if costs["reached"] == "neither":
        return "not known"
    if costs["reached"] == "grown only":
        return f"more than {low:+.0%}"
    if costs["reached"] == "scratch only":
        return f"less than {high:+.0%}"
    if math.isinf(speedup):
        return "reached before the first step"
    return (
        f"{speedup:+.0%} (between {low:+.0%} and {high:+.0%})"
        if math.isfinite(high)
        else f"{speedup:+.0%} (above {low:+.0%})"
    )


class EqualCompute(NamedTuple):
    """Held-out losses after the same number of operations. Of a model that was not there yet, loss
    and step are NaN.
    """

    flops: float  # the source's included
    grown_loss: float
    grown_step: float
    scratch_loss: float
    scratch_step: float


def at_equal_compute(
    source: pd.DataFrame, grown: pd.DataFrame, scratch: pd.DataFrame
) -> EqualCompute:
    """The losses of grown and scratch run where the one that ends first, the source's operations
    counted in, has ended.

    Between two evaluations a loss is taken to go linearly. The longer run is read in the middle of
    its schedule, so its loss is higher than that of a run whose learning rate had come down there.
    """
    spent = float(_sorted(source)["flops"].iloc[-1])
    curves = {
        "grown": (checked_curve(grown, "flops"), spent),
        "scratch": (checked_curve(scratch, "flops"), 0.0),
    }
    common = min(float(curve["flops"].iloc[-1]) + offset for curve, offset in curves.values())
    read = {}
    for name, (curve, offset) in curves.items():
        for column, what in (("held_out_loss", "loss"), ("step", "step")):
            read[f"{name}_{what}"] = float(
                np.interp(common - offset, curve["flops"], curve[column], left=math.nan)
            )
    return EqualCompute(common, **read)


@dataclass(frozen=True)
class QualityMatch:
    """Whether and when a run met a reference loss, e.g. the final loss of another model on the same
    held-out set.
    """

    reference_loss: float
    reached: bool
    step: (
        int | None
    )  # first evaluated step at or below the reference; None exactly when it was not reached
    best_loss: float  # lowest loss of the run
    last_step: int  # how far the run was looked at

    def __str__(self) -> str:
        if self.reached:
            return f"loss {self.reference_loss:.3f} met at step {self.step}"
        best = (
            f"the best, {self.best_loss:.3f}, is {self.best_loss - self.reference_loss:.3f} above"
        )
        return f"loss {self.reference_loss:.3f} not reached by step {self.last_step}: {best}"


def quality_match(held_out: pd.DataFrame, reference_loss: float) -> QualityMatch:
    """The first evaluation of the run that meets `reference_loss`, not interpolated;
    `forecast_match` extrapolates.
    """
    curve = checked_curve(held_out, "step")
    met = curve[curve["held_out_loss"] <= reference_loss]
    return QualityMatch(
        reference_loss=float(reference_loss),
        reached=not met.empty,
        step=None if met.empty else int(met["step"].iloc[0]),
        best_loss=float(curve["held_out_loss"].min()),
        last_step=int(curve["step"].iloc[-1]),
    )


def _sorted(curve: pd.DataFrame) -> pd.DataFrame:
    return curve.sort_values("step", kind="stable")


def checked_curve(held_out: pd.DataFrame, cost: str) -> pd.DataFrame:
    """The usable evaluations in the order of their steps."""
    if cost not in CURVE_COLUMNS[:-1]:
        raise ValueError(
            f"There is no cost {cost!r}; choose one of {', '.join(CURVE_COLUMNS[:-1])}."
        )
    missing = [
        column for column in ("step", cost, "held_out_loss") if column not in held_out.columns
    ]
    if missing:
        raise ValueError(
            f"The curve lacks the columns {', '.join(missing)}; it needs"
            f" {', '.join(CURVE_COLUMNS)}."
        )
    usable = np.isfinite(held_out["held_out_loss"].astype(float)) & held_out[cost].notna()
    curve = _sorted(held_out[usable])
    if curve.empty:
        raise ValueError(
            "The curve holds no evaluation with a held-out loss; evaluate the run at least once."
        )
    if not curve[cost].is_monotonic_increasing:
        raise ValueError(
            f"The {cost} of the curve fall while its steps rise; costs must be counted from the"
            " start of the run."
        )
    return curve


def _speedup(reference: float, cost: float) -> float:
    if reference == cost and (cost == 0 or math.isinf(cost)):
        return math.nan
    return math.inf if cost == 0 else reference / cost - 1  # NaN where one of them is


def _saved(speedup: float) -> float:
    return -math.inf if speedup == -1 else 1 - 1 / (1 + speedup)


def _who_reached(grown: Crossing, scratch: Crossing) -> str:
    if grown.reached and scratch.reached:
        return "both"
    return "grown only" if grown.reached else "scratch only" if scratch.reached else "neither"


ONE_RUN = (
    "One run of each kind, on one seed, with learning rates that were not tuned for each: what"
    " growing is worth needs several of both. The ends of an interval are the two evaluations"
    " around a crossing; the scatter between seeds is not in it."
)


@dataclass(frozen=True)
class GrowthComparison:
    """Grown against scratch, at one loss and at one amount of compute; `costs` is what
    `growth.speedups` returns.
    """

    # nats per token: the source's final held-out loss, or the best of the scratch run where that is
    # lower
    target_loss: float
    losses: pd.DataFrame  # a row per run: steps, tokens, first and final held-out loss
    costs: pd.DataFrame
    equal: EqualCompute
    grown: Crossing  # of the target, in optimizer steps
    scratch: Crossing

    def save(self, folder: str | Path) -> None:
        """Writes losses.csv, speedups.csv and equal_compute.csv."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "losses.csv", self.losses.to_csv(index=False))
        replace_text(folder / "speedups.csv", self.costs.to_csv())
        replace_text(
            folder / "equal_compute.csv", pd.DataFrame([self.equal._asdict()]).to_csv(index=False)
        )

    @property
    def target(self) -> str:
        """The target with its origin, in words."""
        source = self.losses.set_index("run")["final loss"]["source"]
        origin = (
            "the final loss of the source"
            if self.target_loss == source
            else "the best of the run from scratch"
        )
        return f"held-out loss {self.target_loss:.3f}, {origin}"

    def verdict(self) -> str:
        """Which run took how many optimizer steps to the target, and the losses at
        equal compute.
        """
        crossings = {"grown": self.grown, "from scratch": self.scratch}
        told = ", ".join(f"{name} {_steps(crossing)}" for name, crossing in crossings.items())
        return f"{self.target}: {told}\n{self._at_equal_compute()}\n{ONE_RUN}"

    def _at_equal_compute(self) -> str:
        equal = self.equal
        scratch = f"from scratch {equal.scratch_loss:.3f} at step {equal.scratch_step:,.0f}"
        if math.isnan(equal.grown_loss):
            return (
                f"held-out loss after {_amount(equal.flops, 'flops')}: {scratch}; the source alone"
                " took more"
            )
        grown = f"grown {equal.grown_loss:.3f} at step {equal.grown_step:,.0f}"
        return (
            f"held-out loss after {_amount(equal.flops, 'flops')}, the source's included: {grown},"
            f" {scratch}"
        )

    def loss_table(self) -> pd.DataFrame:
        """The held-out losses in words, one row per run."""
        counts = {name: self.losses[name].map("{:,}".format) for name in ("steps", "tokens")}
        names = {"loss at step 0": "held-out loss at step 0", "final loss": "final held-out loss"}
        losses = {told: self.losses[name].map(_loss) for name, told in names.items()}
        return self.losses[["run"]].assign(**counts, **losses)

    def speedup_table(self) -> pd.DataFrame:
        """The speedups in words, one row per kind of cost."""
        rows = []
        for cost, row in self.costs.iterrows():
            rows.append(
                {
                    "cost in": {"flops": "operations"}.get(cost, cost),
                    "source": _amount(row.source, cost),
                    "grown": _between(row, "grown", cost),
                    "scratch": _between(row, "scratch", cost),
                    "reached by": row.reached,
                    "speedup with the source": speedup_in_words(row, "including"),
                    "speedup without the source": speedup_in_words(row, "excluding"),
                }
            )
        return pd.DataFrame(rows)

    def _repr_html_(self) -> str:
        tables = "".join(
            table.to_html(index=False, border=0)
            for table in (self.loss_table(), self.speedup_table())
        )
        return (
            "<p>Target:"
            f" {self.target}.</p>{tables}<p>{self._at_equal_compute()}.</p><p>{ONE_RUN}</p>"
        )


def compare_growth(
    source: pd.DataFrame, grown: pd.DataFrame, scratch: pd.DataFrame
) -> GrowthComparison:
    """The comparison of three runs by their held-out curves (columns step, tokens, flops,
    held_out_loss).

    The target is the source's final loss, since to come no further than the source no growing is
    needed, or the best loss of the scratch run where that is lower. Raises ValueError when a curve
    has less than two evaluations, or the source's none: of a run that was not trained yet, or
    stopped at once.
    """
    curves = {"source": source, "grown": grown, "scratch": scratch}
    for name, curve in curves.items():
        required = 1 if name == "source" else 2
        if len(curve) < required:
            raise ValueError(
                f"The {name} run has {len(curve)} evaluations and a comparison needs {required};"
                " train it on (notebooks 00, 02 and 05), or name another run."
            )
    target = float(min(source.held_out_loss.iloc[-1], scratch.held_out_loss.min()))
    losses = pd.DataFrame(
        {
            "run": name,
            "steps": int(curve.step.iloc[-1]),
            "tokens": int(curve.tokens.iloc[-1]),
            "loss at step 0": curve.held_out_loss.iloc[0] if curve.step.iloc[0] == 0 else math.nan,
            "final loss": curve.held_out_loss.iloc[-1],
        }
        for name, curve in curves.items()
    )
    return GrowthComparison(
        target_loss=target,
        losses=losses,
        costs=speedups(source, grown, scratch, target),
        equal=at_equal_compute(source, grown, scratch),
        grown=cost_to_reach(grown, target, "step"),
        scratch=cost_to_reach(scratch, target, "step"),
    )


def _steps(crossing: Crossing) -> str:
    if not crossing.reached:
        return f"had not reached it at its end, step {crossing.low:,.0f}"
    return f"reached it between steps {crossing.low:,.0f} and {crossing.high:,.0f}"


def _between(row: pd.Series, run: str, cost: str) -> str:
    if pd.isna(row[run]):
        return f"not in {_amount(row[f'{run}_low'], cost)}"
    return f"{_amount(row[f'{run}_low'], cost)} to {_amount(row[f'{run}_high'], cost)}"


def _amount(value: float, cost: str) -> str:
    return f"{value / 1e12:,.1f} TFLOP" if cost == "flops" else f"{value:,.0f} tokens"


def _loss(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
