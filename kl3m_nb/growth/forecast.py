"""When a run will meet a reference loss, by a law that knows its schedule, or why nobody can say.

The law is that of arXiv:2408.11029; the width of its band was measured on real runs, see
`CALIBRATED`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from kl3m_nb.growth.speedups import checked_curve
from kl3m_nb.optim.schedule import lr_factor
from kl3m_nb.profiles import ScheduleSpec


@dataclass(frozen=True)
class Forecast:
    """At which evaluation a run first meets a reference loss, as far as that can be known.

    `low` and `high` are the ends of the 95% interval, steps at which the run is evaluated; `step`
    lies between them. `status` is "met" (all three are the step it was met at), "forecast", "not
    before" (`high` is infinite: it may not come in this run), "never" (the run has ended; all three
    are infinite), or "unknowable" (all three are NaN). `reason` says what the status rests on.
    `curve` is the law with its band, columns step, loss, low, high; empty when nothing was fitted.
    """

    reference_loss: float
    status: str
    step: float
    low: float
    high: float
    reason: str
    curve: pd.DataFrame

    def __str__(self) -> str:
        told = {
            "met": f"met at step {self.step:,.0f}",
            "forecast": (
                f"expected at step {self.step:,.0f}, 95% interval {self.low:,.0f} to"
                f" {self.high:,.0f}"
            ),
            "not before": f"not before step {self.low:,.0f} (95%), perhaps not in this run",
            "never": "not met",
            "unknowable": "not to be known",
        }
        return f"loss {self.reference_loss:.3f} {told[self.status]}" + (
            f": {self.reason}" if self.reason else ""
        )


FIRST_CUT = 0.3  # share of the planned steps before which no forecast was tested, and none is made


CUTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


# each run judged by a band that was measured on the others; a test counts them again
CALIBRATED = (
    "4,509 of 4,530 forecasts held (99.5%) on evaluations held back; of the 50 with an upper end"
    " 50. They are of 36 small runs, 27 from scratch and 9 grown (1,074 of 1,095 held)"
)


def forecast_match(
    held_out: pd.DataFrame, reference_loss: float, planned: ScheduleSpec
) -> Forecast:
    """When the run meets `reference_loss`: from its evaluations if it has, else by a law that knows
    its schedule `planned`.

    The interval is where the band of `loss_law` comes down to the reference, at the steps of the
    coming evaluations, so it begins after the last evaluated step and ends with the plan. The
    forecast is refused, with the reason, when there are fewer than 6 evaluations after the warmup
    and the first quarter of the run, and before 30% of the planned steps, where none was tested.
    Raises ValueError like `quality_match`, and for a plan that ends before the last evaluation.
    """
    outlook = _outlook(held_out, planned)
    status, steps = outlook.forecast(reference_loss)
    names = ("step", "loss", "low", "high")
    curve = (
        pd.DataFrame(dict(zip(names, outlook.band, strict=True)))
        if outlook.band
        else pd.DataFrame()
    )
    return Forecast(
        float(reference_loss), status, *steps, "" if status == "met" else outlook.reason, curve
    )


@dataclass(frozen=True)
class _Outlook:
    """What can be said of the rest of a run, whatever the loss asked for."""

    steps: np.ndarray
    losses: np.ndarray
    reason: str  # what it rests on, or why it is refused
    band: tuple[
        np.ndarray, ...
    ]  # step, loss, low, high of the coming evaluations; empty when refused
    has_ended: bool

    def forecast(self, loss: float) -> tuple[str, tuple[float, float, float]]:
        """Status, and the steps `step`, `low`, `high` of a Forecast."""
        step = _first_step(self.steps, self.losses <= loss)
        if math.isfinite(step) or self.has_ended:
            return "met" if math.isfinite(step) else "never", (step,) * 3
        if not self.band:
            return "unknowable", (math.nan,) * 3
        later, *levels = self.band
        middle, low, high = (_first_step(later, level <= loss) for level in levels)
        return "not before" if math.isinf(high) else "forecast", (
            middle,
            min(low, float(later[-1])),
            high,
        )


def _outlook(held_out: pd.DataFrame, planned: ScheduleSpec) -> _Outlook:
    curve = checked_curve(held_out, "step")
    steps, losses = curve["step"].to_numpy(int), curve["held_out_loss"].to_numpy(float)
    begin, last, end = steps[0], steps[-1], planned.max_steps
    if end < last:
        raise ValueError(
            f"max_steps is {end}, but the run was evaluated at step {last}; give the run's own"
            " schedule."
        )
    fitted = int(usable(steps, planned).sum())
    refused = ""
    if last == end:
        refused = f"the run has ended, its best is {losses.min():.3f}"
    elif fitted < FEWEST_EVALUATIONS:
        refused = (
            f"{fitted} evaluations after the warmup and the first quarter of the run are too few to"
            " extrapolate"
        )
    elif last - begin < FIRST_CUT * (end - begin):
        refused = f"less than {FIRST_CUT:.0%} of the {end:,} planned steps were seen"
    if refused:
        return _Outlook(steps, losses, refused, (), last == end)
    later = np.append(
        np.arange(last, end, last - steps[-2])[1:], end
    )  # as far apart as the last two; the last step is always one
    band = fit_band(steps, losses, planned, later)
    reason = f"extrapolated from {fitted} evaluations to step {last:,}"
    return _Outlook(steps, losses, reason, (later, band.loss, band.low, band.high), False)


def back_test(held_out: pd.DataFrame, planned: ScheduleSpec) -> pd.DataFrame:
    """How forecasts made earlier in a run have turned out: a row for each of `CUTS` that allows
    one, and each loss asked for.

    Asked is for every new minimum of the evaluations that were held back, and for losses 0.05 and
    0.1 below all, which were not met. Columns: `seen`, the last step that the forecast knew;
    `reference_loss`; `status`, `low` and `high` of the forecast; `step`, the first evaluated one
    that met the loss, infinite when none did; `held`, whether the interval holds it.
    """
    curve = checked_curve(held_out, "step")
    steps, losses = curve["step"].to_numpy(int), curve["held_out_loss"].to_numpy(float)
    rows = []
    for cut in CUTS:
        seen = steps <= steps[0] + cut * (planned.max_steps - steps[0])
        outlook = _outlook(curve[seen], planned)
        later, level = steps[~seen], losses[~seen]
        for loss in (
            *np.unique(np.minimum.accumulate(level)),
            losses.min() - 0.05,
            losses.min() - 0.1,
        ):
            status, (_, low, high) = outlook.forecast(loss)
            if status not in ("forecast", "not before"):
                continue
            step = _first_step(later, level <= loss)
            # that it was not met so far is against a forecast only when it was to be met by now
            held = high > steps[-1] if math.isinf(step) else low <= step <= high
            rows.append((outlook.steps[-1], loss, status, low, high, step, held))
    return pd.DataFrame(
        rows, columns=["seen", "reference_loss", "status", "low", "high", "step", "held"]
    )


def coverage(tested: pd.DataFrame) -> str:
    """The rows of `back_test`, of one run or several, in words."""
    if tested.empty:
        return "no forecast could be tested on evaluations held back"
    ended = tested[tested["status"] == "forecast"]
    held = (
        f"{tested['held'].sum():,} of {len(tested):,} forecasts held ({tested['held'].mean():.1%})"
    )
    if ended.empty:
        return (
            f"{held} on evaluations held back; none had an upper end, so each failed only if the"
            " loss was met earlier than its lower end"
        )
    return (
        f"{held} on evaluations held back; of the {len(ended):,} with an upper end"
        f" {ended['held'].sum():,}"
    )


def _first_step(steps: np.ndarray, met: np.ndarray) -> float:
    return float(steps[met.argmax()]) if met.any() else math.inf


FEWEST_EVALUATIONS = 6  # twice the parameters of the law


# evaluations before this share of what was seen are left out: the first fall follows another law
FIRST_SHARE = 0.25


SCATTERS = (
    3.0  # how many standard deviations of the evaluations the width has beside the law's fall
)


BELOW, ABOVE = (
    2.443,
    0.871,
)  # multiples of the width, from `calibrate` on benchmarks/results/loss_curves.csv


class Band(NamedTuple):
    """The law at some later steps: arrays of one entry a step, in nats per token."""

    loss: np.ndarray
    width: np.ndarray

    @property
    def low(self) -> np.ndarray:
        """Lower end."""
        return self.loss - BELOW * self.width

    @property
    def high(self) -> np.ndarray:
        """Upper end."""
        return self.loss + ABOVE * self.width


def usable(steps: np.ndarray, planned: ScheduleSpec) -> np.ndarray:
    """Which evaluations the law is fitted to: those after the first quarter of what was seen and
    after the warmup.
    """
    begins = steps[0] + max(planned.warmup_steps, FIRST_SHARE * (steps[-1] - steps[0]))
    return (steps > steps[0]) & (steps >= begins)


def fit_band(
    steps: np.ndarray, losses: np.ndarray, planned: ScheduleSpec, later: np.ndarray
) -> Band:
    """The law fitted to the usable ones of the evaluations `losses` at `steps`, at the steps
    `later`, all within `planned`.

    `steps` rise and begin where the run began, at 0 unless it continued a model.
    """
    chosen = usable(steps, planned)
    seen = _terms(steps[chosen], int(steps[0]), planned)
    # least squares with a constant of either sign and two coefficients that are not negative
    design = np.column_stack([seen[:, :1], -seen[:, :1], -seen[:, 1:]])
    (plus, minus, *slopes), error = nnls(design, losses[chosen])
    coefficients = np.array([plus - minus, *np.negative(slopes)])
    ahead = _terms(later, int(steps[0]), planned) @ coefficients
    scatter = error / np.sqrt(max(1, chosen.sum() - len(coefficients)))
    fall = np.maximum(seen[-1] @ coefficients - ahead, 0.0)
    return Band(ahead, SCATTERS * scatter + fall)


def _terms(steps: np.ndarray, first_step: int, planned: ScheduleSpec) -> np.ndarray:
    """[steps, 3]: 1, ln S1, 1 − lr / lr_peak, after that many updates."""
    rates = _rates(first_step, planned)
    index = np.asarray(steps, dtype=int) - first_step - 1
    return np.column_stack(
        [np.ones(len(index)), np.log(np.cumsum(rates)[index]), 1.0 - rates[index]]
    )


@functools.cache
def _rates(first_step: int, planned: ScheduleSpec) -> np.ndarray:
    return np.array(
        [lr_factor(update, planned, first_step) for update in range(first_step, planned.max_steps)]
    )


def calibrate(
    bands: list[Band], truths: list[np.ndarray], share: float = 0.97
) -> tuple[float, float]:
    """(below, above): the multiples of the width at which a `share` of the bands hold all of their
    later losses `truths`.
    """
    below, above = (
        [
            float(np.max(sign * (band.loss - truth) / band.width))
            for band, truth in zip(bands, truths, strict=True)
        ]
        for sign in (1, -1)
    )
    level = 1 - (1 - share) / 2
    return float(np.quantile(below, level)), float(np.quantile(above, level))
