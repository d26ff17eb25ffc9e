from __future__ import annotations

import pytest
from conftest import small_profile

from kl3m_nb import models, roles
from kl3m_nb.estimate import estimate
from kl3m_nb.profiles import get_profile

GB = 1e9


def test_the_real_models_need_what_is_known_of_them():
    grown = estimate(get_profile("kl3m-007-500m", precision="bfloat16"))
    assert grown.parameters == 500_309_568
    # four float32 numbers a parameter under AdamW, three under Muon: 6.3 GB were measured
    assert grown.weights + grown.gradients + grown.optimizer_states == pytest.approx(6.3e9, rel=0.05)
    assert grown.activations == pytest.approx(60e9, rel=0.25)
    assert grown.flops_per_token == pytest.approx(4.98e9, rel=0.01)
    recomputed = estimate(get_profile("kl3m-007-500m", precision="bfloat16", gradient_checkpointing=True))
    assert recomputed.activations < grown.activations / 8
    assert recomputed.flops_per_token == pytest.approx(6.40e9, rel=0.01)


def test_states_are_what_the_optimizers_hold_after_a_step():
    profile = small_profile()
    model = models.build_model(profile)
    muon, aux = roles.build_optimizers(model, roles.role_table(model, profile), profile)
    model(input_ids=(ids := model.model.embed_tokens.weight.new_ones(1, 8).long()), labels=ids).loss.backward()
    muon.step()
    aux.step()
    held = sum(
        value.numel() * value.element_size()
        for optimizer in (muon, aux)
        for state in optimizer.state.values()
        for value in state.values()
        if value.ndim
    )
    assert estimate(profile).optimizer_states == held
    assert estimate(profile).gradients == sum(parameter.grad.numel() * 4 for parameter in model.parameters())


def test_time_grows_with_steps_and_tokens():
    short, long = estimate(small_profile(max_steps=10)), estimate(small_profile(max_steps=1000))
    assert 20 < long.seconds / short.seconds < 500
    assert "10 steps of 128 tokens" in short.sentence()
