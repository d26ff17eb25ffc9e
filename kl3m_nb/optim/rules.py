"""The role of every parameter, and what follows from it: optimizer, learning rate, weight decay,
clamp.

One table decides for all of them. It can be printed, is shown in notebook 02, and a parameter that
no rule knows is an error rather than a silent default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kl3m_nb.model.roles import MUON_ROLES, block_number, fused_matrices, parameter_roles
from kl3m_nb.optim.model_clamp import ClampEvent, ClampTarget
from kl3m_nb.optim.muon import Muon
from kl3m_nb.profiles import MLP_ROLES, Profile


@dataclass(frozen=True)
class ParameterRule:
    """How one parameter is trained. `lr` is the peak of its schedule; `max_condition` 0.0 says it
    is never clamped.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    optimizer: str  # muon | adamw
    lr: float
    weight_decay: float
    max_condition: float

    @property
    def fused(self) -> int:
        """How many matrices are stacked along dim -2, as `fused_matrices` says."""
        return len(fused_matrices(self.role))

    @property
    def layer(self) -> int:
        """The block it belongs to; -1 for embedding, head and final norm."""
        return block_number(self.name)


def role_table(model: nn.Module, profile: Profile) -> list[ParameterRule]:
    """One rule for every parameter of `model`, in the model's own order."""
    spec = profile.optimizer
    multipliers = {
        "q_proj": spec.attention_outer_multiplier,
        "o_proj": spec.attention_outer_multiplier,
        "k_proj": spec.attention_inner_multiplier,
        "v_proj": spec.attention_inner_multiplier,
        "lm_head": spec.lm_head_multiplier,
        **{role: spec.mlp_multiplier for role in MLP_ROLES},
    }
    parameters = dict(model.named_parameters())
    rules = []
    for name, role in parameter_roles(model).items():
        with_muon = role in MUON_ROLES
        peak = profile.muon_lr if with_muon else spec.aux_lr
        is_matrix = parameters[name].ndim >= 2
        rules.append(
            ParameterRule(
                name=name,
                role=role,
                shape=tuple(parameters[name].shape),
                optimizer="muon" if with_muon else "adamw",
                lr=peak * multipliers.get(role, 1.0),
                weight_decay=spec.weight_decay if with_muon else spec.aux_weight_decay * is_matrix,
                max_condition=profile.clamp.max_condition(role),
            )
        )
    return rules


def build_optimizers(
    model: nn.Module, rules: list[ParameterRule], profile: Profile
) -> tuple[Muon, torch.optim.AdamW]:
    """Muon and AdamW over the groups of the table; every group carries its peak LR as `peak_lr` for
    the schedule.
    """
    spec = profile.optimizer
    parameters = dict(model.named_parameters())
    groups: dict[str, dict[tuple, dict]] = {"muon": {}, "adamw": {}}
    for rule in rules:
        settings = {"lr": rule.lr, "weight_decay": rule.weight_decay}
        if rule.optimizer == "muon":
            settings["fused"] = rule.fused
        group = groups[rule.optimizer].setdefault(
            tuple(settings.values()), {"params": [], "peak_lr": rule.lr, **settings}
        )
        group["params"].append(parameters[rule.name])
    muon = Muon(
        list(groups["muon"].values()),
        lr=profile.muon_lr,
        momentum=spec.momentum,
        nesterov=spec.nesterov,
        ns_steps=spec.ns_steps,
        adjust_lr=spec.adjust_lr,
        coefficients=spec.ns_coefficients,
        precision=spec.ns_precision,
    )
    aux = torch.optim.AdamW(
        list(groups["adamw"].values()),
        lr=spec.aux_lr,
        betas=(spec.aux_beta1, spec.aux_beta2),
        foreach=True,
    )
    return muon, aux


def clamp_targets(
    model: nn.Module, rules: list[ParameterRule], profile: Profile
) -> list[ClampTarget]:
    """The matrices that the spectral clamp walks, each with the ceiling of its role."""
    parameters = dict(model.named_parameters())
    return [
        ClampTarget(
            rule.name,
            parameters[rule.name],
            rule.max_condition,
            profile.clamp.sigma_floor,
            rule.fused,
        )
        for rule in rules
        if rule.max_condition
    ]


def clamp_columns(events: Sequence[ClampEvent], rules: Sequence[ParameterRule]) -> dict[str, list]:
    """A clamp as columns to log, an entry for each matrix: the event's fields; role, layer and
    ceiling of its parameter.
    """
    columns = {
        column.name: [getattr(event, column.name) for event in events]
        for column in dataclasses.fields(ClampEvent)
    }
    rule_of = {rule.name: rule for rule in rules}
    parents = [
        rule_of[event.name.partition("[")[0]] for event in events
    ]  # name[expert] is a matrix of the parameter name
    return columns | {
        column: [getattr(rule, column) for rule in parents]
        for column in ("role", "layer", "max_condition")
    }
