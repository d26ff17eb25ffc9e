"""What a clamp knows of the condition σ₁/σ_min of its matrices as it leaves them: attention, MLP and LM head apart.

A certificate spares a healthy matrix from being looked at, so a clamp does not know every condition. What it does not know is
counted here and never filled in by a bound.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from kl3m_nb.model_clamp import LOOKED_AT
from kl3m_nb.profiles import ATTENTION_ROLES, MLP_ROLES

_COLUMNS = ("route", "sigma_max", "sigma_min", "tau")
_GROUPS = {"attention": ATTENTION_ROLES, "MLP": MLP_ROLES, "LM head": ("lm_head",)}


@dataclass(frozen=True)
class GroupConditions:
    """`measured` of `matrices` were looked at; `median` and `maximum` are of σ₁/σ_min of these, NaN when there are none.

    `estimated` of the measured were tested: their values are estimates from below, good to some percent. `certified` matrices
    were proved to be below their ceiling without being looked at. What remains is all zero and has no condition.
    """

    matrices: int
    measured: int
    estimated: int
    certified: int
    median: float = float("nan")
    maximum: float = float("nan")

    @property
    def zero(self) -> int:
        """How many matrices are all zero."""
        return self.matrices - self.measured - self.certified


@dataclass(frozen=True)
class ClampConditions:
    """The groups that the clamp at `step` walked, by name; none before the first clamp."""

    step: int = 0
    groups: dict[str, GroupConditions] = field(default_factory=dict)

    @classmethod
    def after(cls, row: Mapping) -> ClampConditions:
        """From a clamp's row of the metrics: its `step` and the columns of `roles.clamp_columns`."""
        groups = {}
        for name, roles in _GROUPS.items():
            places = [place for place, role in enumerate(row["role"]) if role in roles]
            if places:
                groups[name] = _group(*([row[column][place] for place in places] for column in _COLUMNS))
        return cls(row["step"], groups)

    @classmethod
    def from_state(cls, state: Mapping) -> ClampConditions:
        """From what `dataclasses.asdict` made of one for a training state."""
        if "groups" not in state:  # an earlier version mixed values from before the repair with bounds
            return cls()
        return cls(state["step"], {name: GroupConditions(**group) for name, group in state["groups"].items()})


def _group(routes: list[str], sigma_max: list[float], sigma_min: list[float], tau: list[float]) -> GroupConditions:
    left = [
        # The clamp has raised to τ what was below: σ_min of a repaired matrix, and σ₁ where the floor lies above it.
        max(largest, raised_to) / max(smallest, raised_to)
        for route, largest, smallest, raised_to in zip(routes, sigma_max, sigma_min, tau, strict=True)
        if route in LOOKED_AT
    ]
    counts = len(routes), len(left), routes.count("tested"), routes.count("certified")
    return GroupConditions(*counts, statistics.median(left), max(left)) if left else GroupConditions(*counts)
