"""How a held-out loss goes on under its learning-rate schedule, with a band that was measured on real runs.

The law is that of arXiv:2408.11029, loss = L0 + A·S1^−α − C·S2, with as many parameters as twenty evaluations can tell apart:
loss = a − b·ln S1(s) − c·(1 − lr(s) / lr_peak), b and c not negative. S1 is the sum of the learning rates up to step s; its
logarithm is the power law of small α. The last term is the paper's S2 without its memory of some hundred steps.

No law is exact, so the band does not come from the scatter of the evaluations alone. Its width is a multiple of three times that
scatter plus the fall that the law foretells. The multiples are measured on the runs of `benchmarks/loss_curves.py`, cut off at 30
to 90% of their steps: in 97% of the cases the band holds all later evaluations at once. They are taken for runs from scratch and
for grown ones apart, and the larger counts, since grown runs fall late. Whether much larger runs are like these is not known.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from kl3m_nb.profiles import ScheduleSpec
from kl3m_nb.schedule import lr_factor

FEWEST_EVALUATIONS = 6  # twice the parameters of the law
FIRST_SHARE = 0.25  # evaluations before this share of what was seen are left out: the first fall follows another law
SCATTERS = 3.0  # how many standard deviations of the evaluations the width has beside the law's fall
BELOW, ABOVE = 2.443, 0.871  # multiples of the width, from `calibrate` on benchmarks/results/loss_curves.csv


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
    """Which evaluations the law is fitted to: those after the first quarter of what was seen and after the warmup."""
    begins = steps[0] + max(planned.warmup_steps, FIRST_SHARE * (steps[-1] - steps[0]))
    return (steps > steps[0]) & (steps >= begins)


def fit_band(steps: np.ndarray, losses: np.ndarray, planned: ScheduleSpec, later: np.ndarray) -> Band:
    """The law fitted to the usable ones of the evaluations `losses` at `steps`, at the steps `later`, all within `planned`.

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
    return np.column_stack([np.ones(len(index)), np.log(np.cumsum(rates)[index]), 1.0 - rates[index]])


@functools.cache
def _rates(first_step: int, planned: ScheduleSpec) -> np.ndarray:
    return np.array([lr_factor(update, planned, first_step) for update in range(first_step, planned.max_steps)])


def calibrate(bands: list[Band], truths: list[np.ndarray], share: float = 0.97) -> tuple[float, float]:
    """(below, above): the multiples of the width at which a `share` of the bands hold all of their later losses `truths`."""
    below, above = (
        [float(np.max(sign * (band.loss - truth) / band.width)) for band, truth in zip(bands, truths, strict=True)]
        for sign in (1, -1)
    )
    level = 1 - (1 - share) / 2
    return float(np.quantile(below, level)), float(np.quantile(above, level))
