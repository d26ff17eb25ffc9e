"""The growth comparison in a form to read, save and pass around."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kl3m_nb import growth
from kl3m_nb.progress import replace_text

ONE_RUN = (
    "One run of each kind, on one seed, with learning rates that were not tuned for each: what growing is worth needs several of "
    "both. The ends of an interval are the two evaluations around a crossing; the scatter between seeds is not in it."
)


@dataclass(frozen=True)
class GrowthComparison:
    """Grown against scratch, at one loss and at one amount of compute; `costs` is what `growth.speedups` returns."""

    target_loss: float  # nats per token: the source's final held-out loss, or the best of the scratch run where that is lower
    losses: pd.DataFrame  # a row per run: steps, tokens, first and final held-out loss
    costs: pd.DataFrame
    equal: growth.EqualCompute
    grown: growth.Crossing  # of the target, in optimizer steps
    scratch: growth.Crossing

    def save(self, folder: str | Path) -> None:
        """Writes losses.csv, speedups.csv and equal_compute.csv."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "losses.csv", self.losses.to_csv(index=False))
        replace_text(folder / "speedups.csv", self.costs.to_csv())
        replace_text(folder / "equal_compute.csv", pd.DataFrame([self.equal._asdict()]).to_csv(index=False))

    @property
    def target(self) -> str:
        """The target with its origin, in words."""
        source = self.losses.set_index("run")["final loss"]["source"]
        origin = "the final loss of the source" if self.target_loss == source else "the best of the run from scratch"
        return f"held-out loss {self.target_loss:.3f}, {origin}"

    def verdict(self) -> str:
        """Which run took how many optimizer steps to the target, and the losses at equal compute."""
        crossings = {"grown": self.grown, "from scratch": self.scratch}
        told = ", ".join(f"{name} {_steps(crossing)}" for name, crossing in crossings.items())
        return f"{self.target}: {told}\n{self._at_equal_compute()}\n{ONE_RUN}"

    def _at_equal_compute(self) -> str:
        equal = self.equal
        scratch = f"from scratch {equal.scratch_loss:.3f} at step {equal.scratch_step:,.0f}"
        if math.isnan(equal.grown_loss):
            return f"held-out loss after {_amount(equal.flops, 'flops')}: {scratch}; the source alone took more"
        grown = f"grown {equal.grown_loss:.3f} at step {equal.grown_step:,.0f}"
        return f"held-out loss after {_amount(equal.flops, 'flops')}, the source's included: {grown}, {scratch}"

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
                    "speedup with the source": growth.speedup_in_words(row, "including"),
                    "speedup without the source": growth.speedup_in_words(row, "excluding"),
                }
            )
        return pd.DataFrame(rows)

    def _repr_html_(self) -> str:
        tables = "".join(table.to_html(index=False, border=0) for table in (self.loss_table(), self.speedup_table()))
        return f"<p>Target: {self.target}.</p>{tables}<p>{self._at_equal_compute()}.</p><p>{ONE_RUN}</p>"


def compare_growth(source: pd.DataFrame, grown: pd.DataFrame, scratch: pd.DataFrame) -> GrowthComparison:
    """The comparison of three runs by their held-out curves (columns step, tokens, flops, held_out_loss).

    The target is the source's final loss, since to come no further than the source no growing is needed, or the best loss of the
    scratch run where that is lower. Raises ValueError when a curve has less than two evaluations, or the source's none: of a run
    that was not trained yet, or stopped at once.
    """
    curves = {"source": source, "grown": grown, "scratch": scratch}
    for name, curve in curves.items():
        required = 1 if name == "source" else 2
        if len(curve) < required:
            raise ValueError(
                f"The {name} run has {len(curve)} evaluations and a comparison needs {required}; train it on (notebooks 00, 02 "
                "and 05), or name another run."
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
        costs=growth.speedups(source, grown, scratch, target),
        equal=growth.at_equal_compute(source, grown, scratch),
        grown=growth.cost_to_reach(grown, target, "step"),
        scratch=growth.cost_to_reach(scratch, target, "step"),
    )


def _steps(crossing: growth.Crossing) -> str:
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
