"""Conditions after a clamp, against full SVDs in float64 of the matrices that it left."""

import dataclasses
import math
import statistics

import pytest
import torch

from kl3m_nb.common import linalg
from kl3m_nb.optim.model_clamp import ClampConditions, ClampTarget, GroupConditions, SpectralClamp
from tests.svd_reference import CONDITION, FLOOR, geometric, with_spectrum

ROLES = {
    "a": "q_proj",
    "b": "k_proj",
    "c": "o_proj",
    "d": "up_proj",
    "e": "down_proj",
    "f": "lm_head",
    "g": "lm_head",
}


@pytest.fixture
def targets() -> list[ClampTarget]:
    """Far above the ceiling, near it, healthy; healthy twice; below the floor as a whole; all zero.
    Each 40 x 90.
    """
    conditions = {"a": 20_000.0, "b": 2500.0, "c": 30.0, "d": 4.0, "e": 6.0, "f": 50.0}
    weights = {
        name: with_spectrum(geometric(40, condition, 3.0), 40, 90, torch.float32)
        for name, condition in conditions.items()
    }
    weights["f"] *= 1e-8
    weights["g"] = torch.zeros(40, 90)
    return [ClampTarget(name, weight, CONDITION, FLOOR) for name, weight in weights.items()]


def clamped(clamp: SpectralClamp, step: int) -> ClampConditions:
    events = [dataclasses.asdict(event) for event in clamp.clamp()]
    row = {column: [event[column] for event in events] for column in events[0]}
    return ClampConditions.after(
        {"step": step, "role": [ROLES[name] for name in row["name"]], **row}
    )


def true_conditions(targets: list[ClampTarget], names: str) -> list[float]:
    spectra = [
        torch.linalg.svdvals(target.parameter.double())
        for target in targets
        if target.name in names
    ]
    return [(sigma[0] / sigma[-1]).item() for sigma in spectra]


@pytest.mark.parametrize("tested", [False, True])
def test_they_are_those_of_the_matrices_as_they_were_left(targets, tested, monkeypatch):
    if tested:
        monkeypatch.setattr(linalg, "EIGENVALUES_UP_TO", 0)
    known = clamped(SpectralClamp(targets), 40)
    assert known.step == 40 and list(known.groups) == ["attention", "MLP", "LM head"]
    for name, members in {"attention": "abc", "MLP": "de", "LM head": "f"}.items():
        found, true = known.groups[name], true_conditions(targets, members)
        least = 0.9 if found.estimated else 1 - 1e-3
        for value, expected in (
            (found.median, statistics.median(true)),
            (found.maximum, max(true)),
        ):
            assert least * expected <= value <= 1.001 * expected, name
    assert true_conditions(targets, "a") == pytest.approx([CONDITION], rel=1e-3)
    counts = {
        name: (g.matrices, g.measured, g.estimated, g.certified, g.zero)
        for name, g in known.groups.items()
    }
    assert counts == {
        "attention": (3, 3, 2 * tested, 0, 0),
        "MLP": (2, 2, 2 * tested, 0, 0),
        "LM head": (2, 1, 0, 0, 1),
    }


def test_what_a_certificate_spared_from_being_looked_at_has_no_condition(targets):
    clamp = SpectralClamp(targets)
    clamp.clamp()
    clamp.note_movement({name: (0.02 if name in "abf" else 1e-6, 0.0) for name in ROLES})
    known = clamped(clamp, 60).groups
    assert (known["attention"].measured, known["attention"].certified) == (2, 1)
    assert known["attention"].median == pytest.approx(
        statistics.median(true_conditions(targets, "ab")), rel=1e-3
    )
    assert (known["MLP"].measured, known["MLP"].certified) == (0, 2) and math.isnan(
        known["MLP"].median
    )
    assert (known["LM head"].measured, known["LM head"].certified, known["LM head"].zero) == (
        1,
        0,
        1,
    )


def test_a_training_state_keeps_them_and_one_of_an_earlier_version_has_none():
    known = ClampConditions(40, {"attention": GroupConditions(4, 3, 2, 1, 7.0, 9.0)})
    assert ClampConditions.from_state(dataclasses.asdict(known)) == known
    assert (
        ClampConditions.from_state({"step": 40, "by_role": {"attention": (7.0, 9.0)}})
        == ClampConditions()
    )
