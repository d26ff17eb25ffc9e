from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import kl3m_nb.model.estimate
from kl3m_nb.model import costs, decoder, runtime
from kl3m_nb.model.estimate import GPUS, data_sheet, estimate, estimate_table
from kl3m_nb.model.runtime import Runtime
from kl3m_nb.optim import rules
from kl3m_nb.profiles import get_profile
from tests.conftest import small_profile


@pytest.mark.parametrize(
    ("name", "settings", "tokens_per_second", "tolerance"),
    [
        ("kl3m-007-500m", {}, 75_000, 0.1),
        ("kl3m-007-500m", {"gradient_checkpointing": "on"}, 58_000, 0.1),
        ("kl3m-006-170m", {}, 240_000, 0.1),
    ],
)
def test_an_h200_is_as_fast_as_its_single_operations_add_up_to(
    name, settings, tokens_per_second, tolerance
):
    assert estimate(get_profile(name, **settings), "h200").tokens_per_second == pytest.approx(
        tokens_per_second, rel=tolerance
    )


def test_no_gpu_is_faster_than_its_products_and_its_memory_allow():
    ideal = {"kl3m-007-500m": 158_000, "kl3m-006-170m": 498_000, "kl3m-002-520m": 448_000}
    for name, ceiling in ideal.items():
        assert estimate(get_profile(name), "h200").tokens_per_second < ceiling
        assert (
            estimate(get_profile(name, compile="off"), "h200").tokens_per_second
            < estimate(get_profile(name), "h200").tokens_per_second
        )


def test_a_run_that_ends_before_its_warmup_is_warned_of():
    short, enough = (
        get_profile("kl3m-007-500m", max_steps=steps, warmup_steps=100) for steps in (100, 101)
    )
    assert (
        estimate(short, "h200")
        .table()["warning"]
        .startswith("warmup_steps 100 is not below max_steps 100: ")
    )
    assert "warning" not in estimate(enough, "h200").table()


def test_checkpointing_is_switched_on_where_memory_asks_for_it():
    large, small = (estimate(get_profile("kl3m-007-500m"), gpu) for gpu in ("h200", "4090"))
    assert not large.recompute and large.largest_kept >= 5
    assert small.recompute and small.largest_kept < 5 <= small.largest_recomputed
    assert small.memory < GPUS["4090"].memory and small.flops_per_token > large.flops_per_token
    never = estimate(get_profile("kl3m-007-500m", gradient_checkpointing="off"), "4090")
    assert not never.recompute and never.memory > GPUS["4090"].memory


def test_a_step_that_just_fits_is_not_checkpointed():
    largest = estimate(get_profile("kl3m-007-500m"), "a100").largest_kept
    fits, too_large = (
        estimate(get_profile("kl3m-007-500m", micro_batch=largest + more), "a100")
        for more in (0, 1)
    )
    assert largest > 1 and fits.memory <= 0.9 * GPUS["a100"].memory < too_large.kept.total
    assert not fits.recompute and too_large.recompute


def test_the_estimate_and_the_run_agree_on_checkpointing(monkeypatch):
    """To the byte, with a memory of which nine tenths just hold the step, or just do not."""
    profile = small_profile()
    just_enough = math.ceil(estimate(profile).kept.total / 0.9)
    expected = {
        just_enough // 2: True,
        just_enough - 2: True,
        just_enough + 1: False,
        2 * just_enough: False,
    }
    for memory, recompute in expected.items():
        monkeypatch.setattr(runtime, "device_memory", lambda device, memory=memory: memory)
        monkeypatch.setattr(
            kl3m_nb.model.estimate, "device_memory", lambda device, memory=memory: memory
        )
        assert (
            estimate(profile).recompute == runtime.choose_runtime(profile).recompute == recompute
        ), memory


def test_states_are_what_the_optimizers_hold_after_a_step():
    profile = small_profile()
    model = decoder.build_model(profile)
    muon, aux = rules.build_optimizers(model, rules.role_table(model, profile), profile)
    model(
        input_ids=(ids := model.model.embed_tokens.weight.new_ones(1, 8).long()), labels=ids
    ).loss.backward()
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
    assert estimate(profile).kept.gradients == sum(
        parameter.grad.numel() * 4 for parameter in model.parameters()
    )


def test_time_grows_with_steps_and_tokens():
    short, long = (
        estimate(small_profile(max_steps=10), "h200"),
        estimate(small_profile(max_steps=1000), "h200"),
    )
    assert long.seconds / short.seconds == pytest.approx(100)
    assert "10 steps of 128 tokens" in estimate(small_profile(max_steps=10)).sentence()


def orthogonalising(profile) -> float:
    """Operations of one Newton-Schulz iteration over the model's matrices: X·Xᵀ, its square and
    their product with X.
    """
    model = decoder.build_model(profile)
    matrices = [
        group["params"]
        for group in rules.build_optimizers(model, rules.role_table(model, profile), profile)[
            0
        ].param_groups
    ]
    sides = [sorted(matrix.shape) for group in matrices for matrix in group]
    return sum(
        2 * short * long * short + 2 * short**3 + 2 * short * short * long for short, long in sides
    )


def test_the_time_of_muon_counts(monkeypatch):
    """Two iterations more, of a batch so small that they are most of the work."""
    few, many = (
        small_profile(ns_steps=steps, ns_precision="bfloat16", micro_batch=1) for steps in (3, 5)
    )
    monkeypatch.setattr(kl3m_nb.model.estimate, "_matmul_speed", lambda device, precision: 1e9)
    for gpu, rate in (("h200", 0.4 * 989e12), ("", 0.45 * 1e9)):
        seconds = [
            needed.seconds / needed.max_steps
            for needed in (estimate(few, gpu), estimate(many, gpu))
        ]
        assert seconds[1] - seconds[0] == pytest.approx(2 * orthogonalising(few) / rate, rel=1e-6)


def test_precision_counts_on_a_named_gpu():
    """TF32 halves the rate of products; float32 also doubles what is kept and moved, so nothing is
    more than twice as slow.
    """
    needed = {
        key: estimate(get_profile("kl3m-007-500m", **settings), "h200")
        for key, settings in {
            "auto": {},
            "bfloat16": {"precision": "bfloat16"},
            "tf32": {"precision": "float32"},
            "float32": {"precision": "float32", "tf32": "off"},
        }.items()
    }
    assert needed["auto"] == needed["bfloat16"] and needed["auto"].precision == "bfloat16"
    assert (
        needed["tf32"].precision == "float32"
        and needed["tf32"].kept.activations > 1.5 * needed["auto"].kept.activations
    )
    assert needed["auto"].tokens_per_second / needed["tf32"].tokens_per_second == pytest.approx(
        2, abs=0.1
    )
    assert needed["float32"].tokens_per_second < 67e12 / needed["float32"].flops_per_token


@pytest.mark.parametrize(
    ("reported", "known"), [("NVIDIA H200", True), ("NVIDIA H200 MIG 1g.18gb", False)]
)
def test_a_known_gpu_of_this_machine_is_estimated_by_its_data_sheet(reported, known, monkeypatch):
    chosen = Runtime(
        torch.device("cuda"), "bfloat16", "sdpa", compile_blocks=True, recompute=False, tf32=True
    )
    monkeypatch.setattr(kl3m_nb.model.estimate, "choose_runtime", lambda profile: chosen)
    monkeypatch.setattr(kl3m_nb.model.estimate, "device_memory", lambda device: GPUS["h200"].memory)
    monkeypatch.setattr(kl3m_nb.model.estimate, "_matmul_speed", lambda device, precision: 1e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: reported)
    profile = get_profile("kl3m-007-500m")
    here = estimate(profile)
    assert here.device == reported and (data_sheet(reported) is not None) == known
    assert (here.tokens_per_second == estimate(profile, "h200").tokens_per_second) == known


def test_a_sliding_window_saves_time_with_flash_attention_alone():
    masked, window = (
        estimate(get_profile("kl3m-002-520m", attention=attention), "h200")
        for attention in ("auto", "flash_attention_2")
    )
    model = get_profile("kl3m-002-520m").model
    all_keys = 3.5 * 2 * model.layers * 2 * model.heads * model.head_size * 1024
    in_window = 3.5 * costs.forward_flops_per_token(model, 1024).attention
    slower = 1 / masked.tokens_per_second - 1 / window.tokens_per_second
    assert slower == pytest.approx((all_keys - in_window) / (0.4 * 989e12), rel=1e-6)
    assert masked.flops_per_token == window.flops_per_token  # what is counted as done is the same
    assert (
        "window of 256 is a mask" in masked.table()["assumed"]
        and "mask" not in window.table()["assumed"]
    )
    assert "pads its segments" in window.table()["assumed"]
    assert estimate(get_profile("kl3m-007-500m"), "h200").table()["assumed"] == "full windows"


@pytest.mark.parametrize("seq_len", [128, 256])
def test_a_window_that_is_not_shorter_than_the_sequence_masks_nothing(seq_len):
    profile = get_profile("kl3m-002-520m", seq_len=seq_len)
    unlimited = dataclasses.replace(
        profile, model=dataclasses.replace(profile.model, sliding_window=0)
    )
    assert profile.model.sliding_window == 256
    assert estimate(profile, "h200") == estimate(unlimited, "h200")
    assert "mask" in estimate(get_profile("kl3m-002-520m", seq_len=257), "h200").assumed


def test_a_step_that_does_not_fit_is_called_so():
    profile = get_profile("kl3m-007-500m", gradient_checkpointing="off")
    largest = estimate(profile, "h200").largest_kept
    for windows, fits in ((largest, True), (largest + 1, False)):
        needed = estimate(
            get_profile("kl3m-007-500m", gradient_checkpointing="off", micro_batch=windows), "h200"
        )
        assert needed.fits == fits and needed.table()["a step"].endswith("does not fit") != fits


def test_the_table_names_its_conventions_and_what_is_active():
    table = estimate(get_profile("kl3m-002-520m"), "h200").table()
    assert table["parameters"] == "520,193,024, 318,866,432 of them active per token"
    assert "1.76 GFLOP" in table["operations per token"] and "PaLM" in table["operations per token"]
    rows = estimate_table([get_profile("kl3m-007-500m")], ["h200", "a100"])
    assert [row["on"] for row in rows] == ["NVIDIA H200", "NVIDIA A100 80 GB"]
    with pytest.raises(ValueError, match="choose one of h200"):
        estimate(get_profile("tiny"), "h300")
