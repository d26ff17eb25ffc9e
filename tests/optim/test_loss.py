from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from kl3m_nb.model import decoder
from kl3m_nb.optim import loss
from kl3m_nb.profiles import ObjectiveSpec
from tests.conftest import small_profile


def _expected(model, windows, spec) -> dict[str, torch.Tensor]:
    """∂term/∂h by autograd of the formulas written out in full, in float64, from the
    full logits.
    """
    norm, head = model.model.norm, model.lm_head.weight.detach().double()
    residual = (
        decoder.forward_body(model, windows[:, :-1]).residual.detach().double().requires_grad_()
    )
    scale = (residual.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    logits, labels = (
        (norm.weight.detach().double() * residual * scale @ head.T).flatten(0, 1),
        windows[:, 1:].flatten(),
    )
    log_p = logits.log_softmax(-1)
    bits = -(log_p.exp() * log_p).sum(-1) / math.log(2)
    plain = F.cross_entropy(logits, labels)
    terms = {
        "cross_entropy": plain,
        "label_smoothing": (
            F.cross_entropy(logits, labels, label_smoothing=spec.label_smoothing) - plain
        ),
        "entropy_bonus": -spec.entropy_bonus * bits.mean(),
        "entropy_target": (
            spec.entropy_target_weight * (bits - spec.entropy_target_bits).square().mean()
        ),
        "entropy_target: offset": (
            spec.entropy_target_weight * (bits.mean() - spec.entropy_target_bits).square()
        ),
        "entropy_target: spread": spec.entropy_target_weight * bits.var(correction=0),
        "activation_norm": spec.activation_norm * residual.square().mean(),
    }
    return {
        name: torch.autograd.grad(term, residual, retain_graph=True)[0].flatten()
        for name, term in terms.items()
    }


@pytest.mark.parametrize("experts", [0, 4])
def test_each_terms_gradient_is_that_of_its_formula(experts):
    model = decoder.build_model(small_profile(experts=experts, active_experts=experts // 2))
    with torch.no_grad():
        model.lm_head.weight *= (
            30  # fresh logits are flat, where every entropy term has almost no gradient
        )
    windows, spec = torch.randint(0, 512, (2, 33)), ObjectiveSpec()
    table, expected = loss.term_pulls(model, windows, spec), _expected(model, windows, spec)
    assert list(table.index) == list(expected)
    reference = expected["cross_entropy"]
    for term, gradient in expected.items():
        assert table.norm[term] == pytest.approx(gradient.norm().item(), rel=1e-3)
        assert table.relative[term] == pytest.approx(
            (gradient.norm() / reference.norm()).item(), rel=1e-3
        )
        assert table.cosine[term] == pytest.approx(
            torch.cosine_similarity(gradient, reference, dim=0).item(), abs=1e-3
        )


def test_a_term_that_is_off_does_not_pull():
    model = decoder.build_model(small_profile())
    table = loss.term_pulls(
        model, torch.randint(0, 512, (1, 33)), ObjectiveSpec(entropy_bonus=0.0, activation_norm=0.0)
    )
    assert (
        table.norm[["entropy_bonus", "activation_norm"]].eq(0).all()
        and table.norm["entropy_target"] > 0
    )
    assert table.cosine[["entropy_bonus", "activation_norm"]].isna().all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_entropy_targets_value_is_offset_and_spread():
    bits, spec = torch.rand(5, 100) * 12, ObjectiveSpec()
    target = spec.entropy_target_weight * (bits - spec.entropy_target_bits).square().mean(1)
    train = pd.DataFrame({"step": range(5), "entropy_bits": bits.mean(1), "entropy_target": target})
    parts = loss.entropy_target_parts(train, spec)
    assert parts.spread.tolist() == pytest.approx(
        (spec.entropy_target_weight * bits.var(1, correction=0)).tolist(), rel=1e-3
    )
    assert (parts.offset + parts.spread).tolist() == pytest.approx(target.tolist())


def test_over_the_batch_there_is_no_spread():
    model, windows = decoder.build_model(small_profile()), torch.randint(0, 512, (2, 33))
    table = loss.term_pulls(model, windows, ObjectiveSpec(entropy_target_over="batch"))
    assert (
        table.norm[loss.TARGET_SPREAD]
        == 0
        < table.norm[loss.TARGET_OFFSET]
        == table.norm["entropy_target"]
    )
