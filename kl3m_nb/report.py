"""The growth comparison in a form to read, save and pass around."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kl3m_nb import growth
from kl3m_nb.progress import replace_text


@dataclass(frozen=True)
class GrowthComparison:
    """Grown against scratch at the loss that scratch reached; `costs` is what `growth.speedups` returns."""

    target_loss: float  # nats per token, the best held-out loss of the scratch run
    losses: pd.DataFrame  # a row per run: steps, tokens, first and final held-out loss
    costs: pd.DataFrame
    grown_step: float  # optimizer steps to the target; NaN when it was never reached
    scratch_step: float

    def save(self, folder: str | Path) -> None:
        """Writes losses.csv and speedups.csv."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "losses.csv", self.losses.to_csv(index=False))
        replace_text(folder / "speedups.csv", self.costs.to_csv())

    def verdict(self) -> str:
        """Which run took how many optimizer steps to the target, in one line. That growing loses is a result too."""
        steps = {"from scratch": self.scratch_step, "grown": self.grown_step}
        told = (f"{name} {'never' if math.isnan(step) else f'after {step:.0f} steps'}" for name, step in steps.items())
        return f"held-out loss {self.target_loss:.3f}, the best from scratch: reached {', '.join(told)}"

    def loss_table(self) -> pd.DataFrame:
        """The held-out losses in words, one row per run."""
        counts = {name: self.losses[name].map("{:,}".format) for name in ("steps", "tokens")}
        names = {"loss at step 0": "held-out loss at step 0", "final loss": "final held-out loss"}
        losses = {told: self.losses[name].map("{:.3f}".format) for name, told in names.items()}
        return self.losses[["run"]].assign(**counts, **losses)

    def speedup_table(self) -> pd.DataFrame:
        """The speedups in words, one row per kind of cost."""
        rows = []
        for cost, row in self.costs.iterrows():
            rows.append(
                {
                    "cost in": cost,
                    "scratch": _amount(row.scratch, cost),
                    "grown": _amount(row.grown, cost),
                    "source": _amount(row.source, cost),
                    "speedup without the source": _percent(row.speedup_excluding_source),
                    "speedup with the source": _percent(row.speedup_including_source),
                }
            )
        return pd.DataFrame(rows)

    def _repr_html_(self) -> str:
        tables = "".join(table.to_html(index=False, border=0) for table in (self.loss_table(), self.speedup_table()))
        return f"<p>Target: held-out loss {self.target_loss:.3f} nats per token, the best of scratch.</p>{tables}"


def compare_growth(source: pd.DataFrame, grown: pd.DataFrame, scratch: pd.DataFrame) -> GrowthComparison:
    """The comparison of three runs by their held-out curves (columns step, tokens, seconds, flops, held_out_loss).

    Raises ValueError when a curve has less than two evaluations: of a run that was not trained yet, or stopped at once.
    """
    curves = {"source": source, "grown": grown, "scratch": scratch}
    for name, curve in curves.items():
        if len(curve) < 2:
            raise ValueError(
                f"The {name} run has {len(curve)} evaluations and a comparison needs two; train it on (notebooks 00, 02 and 05), "
                "or name another run."
            )
    target = float(scratch.held_out_loss.min())
    losses = pd.DataFrame(
        {
            "run": name,
            "steps": int(curve.step.iloc[-1]),
            "tokens": int(curve.tokens.iloc[-1]),
            "loss at step 0": curve.held_out_loss.iloc[0],
            "final loss": curve.held_out_loss.iloc[-1],
        }
        for name, curve in curves.items()
    )
    return GrowthComparison(
        target_loss=target,
        losses=losses,
        costs=growth.speedups(source, grown, scratch, target),
        grown_step=growth.cost_to_reach(grown, target, "step"),
        scratch_step=growth.cost_to_reach(scratch, target, "step"),
    )


def _amount(value: float, cost: str) -> str:
    if pd.isna(value):
        return "never reached"
    if cost == "seconds":
        return f"{value:,.0f} s"
    return f"{value / 1e12:,.1f} TFLOP" if cost == "flops" else f"{value:,.0f} tokens"


def _percent(value: float) -> str:
    if pd.isna(value):
        return "never reached"
    return f"{value:+.0%}" if math.isfinite(value) else "reached before the first step"
