from __future__ import annotations

import pytest
from conftest import small_profile

from kl3m_nb import models, roles
from kl3m_nb.estimate import GPUS, estimate, estimate_table
from kl3m_nb.profiles import get_profile


@pytest.mark.parametrize(
    ("name", "settings", "tokens_per_second", "tolerance"),
    [
        ("kl3m-007-500m", {}, 75_000, 0.1),
        ("kl3m-007-500m", {"gradient_checkpointing": "on"}, 58_000, 0.1),
        ("kl3m-006-170m", {}, 240_000, 0.1),
    ],
)
def test_an_h200_is_as_fast_as_its_single_operations_add_up_to(name, settings, tokens_per_second, tolerance):
    assert estimate(get_profile(name, **settings), "h200").tokens_per_second == pytest.approx(tokens_per_second, rel=tolerance)


def test_no_gpu_is_faster_than_its_products_and_its_memory_allow():
    ideal = {"kl3m-007-500m": 158_000, "kl3m-006-170m": 498_000, "kl3m-002-520m": 448_000}
    for name, ceiling in ideal.items():
        assert estimate(get_profile(name), "h200").tokens_per_second < ceiling
        assert (
            estimate(get_profile(name, compile="off"), "h200").tokens_per_second
            < estimate(get_profile(name), "h200").tokens_per_second
        )


def test_checkpointing_is_switched_on_where_memory_asks_for_it():
    large, small = (estimate(get_profile("kl3m-007-500m"), gpu) for gpu in ("h200", "4090"))
    assert not large.recompute and large.largest_kept >= 5
    assert small.recompute and small.largest_kept < 5 <= small.largest_recomputed
    assert small.memory < GPUS["4090"].memory and small.flops_per_token > large.flops_per_token
    never = estimate(get_profile("kl3m-007-500m", gradient_checkpointing="off"), "4090")
    assert not never.recompute and never.memory > GPUS["4090"].memory


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
    assert estimate(profile).kept.optimizer_states == held
    assert estimate(profile).kept.gradients == sum(parameter.grad.numel() * 4 for parameter in model.parameters())


def test_time_grows_with_steps_and_tokens():
    short, long = estimate(small_profile(max_steps=10), "h200"), estimate(small_profile(max_steps=1000), "h200")
    assert long.seconds / short.seconds == pytest.approx(100)
    assert "10 steps of 128 tokens" in estimate(small_profile(max_steps=10)).sentence()


def test_the_table_names_its_conventions_and_what_is_active():
    table = estimate(get_profile("kl3m-002-520m"), "h200").table()
    assert table["parameters"] == "520,193,024, 318,866,432 of them active per token"
    assert "1.76 GFLOP" in table["operations per token"] and "PaLM" in table["operations per token"]
    rows = estimate_table([get_profile("kl3m-007-500m")], ["h200", "a100"])
    assert [row["on"] for row in rows] == ["NVIDIA H200", "NVIDIA A100 80 GB"]
    with pytest.raises(ValueError, match="choose one of h200"):
        estimate(get_profile("tiny"), "h300")
