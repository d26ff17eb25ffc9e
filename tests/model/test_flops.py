"""FLOPs against torch's own counter on a real model and against the project's published figures."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from kl3m_nb.model import decoder
from kl3m_nb.model.costs import (
    block_matmul_parameters,
    flops_per_token,
    forward_flops_per_token,
    mean_keys_seen,
    model_flops_per_token,
    muon_flops_per_step,
    palm_flops_per_token,
    run_flops,
)
from kl3m_nb.optim import muon
from kl3m_nb.optim.rules import build_optimizers, role_table
from kl3m_nb.profiles import PROFILES, ModelSpec, get_profile

SMALL = ModelSpec(
    layers=3, hidden=48, mlp=80, heads=6, kv_heads=2, head_size=8, vocabulary=96, context=64
)


@pytest.mark.parametrize(
    ("name", "needed", "gigaflop", "with_recompute"),
    [
        ("kl3m-007-500m", 4.70, 4.98, 6.40),
        ("kl3m-006-170m", 1.51, 1.59, 1.94),
        ("kl3m-002-520m", 1.76, 1.76, 2.28),
    ],
)
def test_published_figures(name, needed, gigaflop, with_recompute):
    spec = PROFILES[name].model
    assert round(model_flops_per_token(spec, spec.context) / 1e9, 2) == needed
    assert round(flops_per_token(spec, spec.context) / 1e9, 2) == gigaflop
    assert round(flops_per_token(spec, spec.context, recompute=True) / 1e9, 2) == with_recompute


def test_parts_of_the_forward_pass_of_the_500m():
    forward = forward_flops_per_token(PROFILES["kl3m-007-500m"].model, 4096)
    shares = [
        round(part / forward.total, 2)
        for part in (forward.blocks, forward.attention, forward.lm_head)
    ]
    assert shares == [0.54, 0.36, 0.10]


def test_matrix_products_agree_with_torchs_counter():
    config = LlamaConfig(
        vocab_size=SMALL.vocabulary,
        hidden_size=SMALL.hidden,
        intermediate_size=SMALL.mlp,
        num_hidden_layers=SMALL.layers,
        num_attention_heads=SMALL.heads,
        num_key_value_heads=SMALL.kv_heads,
        head_dim=SMALL.head_size,
        max_position_embeddings=SMALL.context,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    positions = 16
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, positions, dtype=torch.int64), use_cache=False)
    # The counter takes the score matrix as full: every position sees all keys.
    forward = forward_flops_per_token(SMALL, positions)
    full_attention = forward.attention * positions / mean_keys_seen(positions)
    expected = positions * (forward.blocks + full_attention + forward.lm_head)
    assert counter.get_total_flops() == pytest.approx(
        expected, rel=2e-4
    )  # room for the rotary table, if it is counted


@pytest.mark.parametrize(
    ("seq_len", "window"), [(1, 0), (7, 0), (7, 3), (7, 7), (7, 20), (1024, 256)]
)
def test_keys_seen_equals_the_mask_counted(seq_len, window):
    query, key = torch.arange(seq_len)[:, None], torch.arange(seq_len)[None, :]
    mask = (key <= query) & (key > query - (window or seq_len))
    assert mean_keys_seen(seq_len, window) == pytest.approx(mask.sum().item() / seq_len)


def test_a_model_needs_what_torch_counts_forward_and_backward_and_recomputed_scores_are_beside_it():
    """With eager attention, which keeps its scores. Windows have one token, as the counter knows no
    causal attention.
    """
    config = LlamaConfig(
        vocab_size=SMALL.vocabulary,
        hidden_size=SMALL.hidden,
        intermediate_size=SMALL.mlp,
        num_hidden_layers=SMALL.layers,
        num_attention_heads=SMALL.heads,
        num_key_value_heads=SMALL.kv_heads,
        head_dim=SMALL.head_size,
        max_position_embeddings=SMALL.context,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(8, 1, dtype=torch.int64), use_cache=False).logits.sum().backward()
    assert counter.get_total_flops() == pytest.approx(8 * model_flops_per_token(SMALL, 1), rel=1e-3)
    again = flops_per_token(SMALL, 1) - model_flops_per_token(SMALL, 1)
    assert again == forward_flops_per_token(SMALL, 1).attention / 2  # one product of the two


def test_only_active_experts_and_the_router_count():
    dense = dataclasses.replace(SMALL, mlp=2 * SMALL.mlp)
    sparse = dataclasses.replace(SMALL, experts=4, active_experts=2)
    assert block_matmul_parameters(sparse) - block_matmul_parameters(dense) == SMALL.hidden * 4


def test_palm_convention_is_six_n_for_the_familys_parameter_counts():
    """Without the attention term N remains: 500,309,568 for the tied 500M, and the 520M's active
    count less its embedding.
    """
    tied, untied = PROFILES["kl3m-007-500m"].model, PROFILES["kl3m-002-520m"].model
    attention = 12 * 120 * 576 * 4096
    assert palm_flops_per_token(tied, 4096) - attention == 6 * 500_309_568
    assert palm_flops_per_token(untied, 1024) - 12 * 16 * 1024 * 1024 == 6 * (
        318_866_432 - 32_768 * 1024
    )


def test_palm_counts_36_percent_more_than_three_causal_forwards():
    spec = PROFILES["kl3m-007-500m"].model
    assert palm_flops_per_token(spec, 4096) / (
        3 * forward_flops_per_token(spec, 4096).total
    ) == pytest.approx(1.36, abs=0.005)


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="seq_len is 0"):
        flops_per_token(SMALL, 0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny", {}),
        ("tiny-moe", {}),
        ("tiny", {"kv_heads": 4}),
        ("tiny", {"mlp": 128}),
        ("tiny", {"heads": 2, "head_size": 32}),
    ],
)
def test_muons_products_agree_with_torchs_counter(name, changes):
    """Shapes that coincide, as of queries and keys without grouping, are counted each."""
    profile = get_profile(name, layers=2, growth_factor=1, **changes)
    rules = [
        rule
        for rule in role_table(decoder.build_model(profile, "meta"), profile)
        if rule.optimizer == "muon"
    ]
    with FlopCounterMode(display=False) as counter:
        for rule in rules:
            rows, cols = rule.shape[-2] // rule.fused, rule.shape[-1]
            count = torch.Size(rule.shape).numel() // (rows * cols)
            muon.orthogonalize(torch.randn(count, rows, cols), steps=3)
    assert counter.get_total_flops() == muon_flops_per_step(profile.model, 3)


def test_a_runs_operations_are_those_that_torch_counts_in_a_real_step_with_muon():
    """Forward, backward and update of a whole step; attention apart, which torch counts as full and
    without recomputation.
    """
    profile = get_profile(
        "tiny", layers=2, growth_factor=1, vocabulary=512, seq_len=32, micro_batch=2, ns_steps=4
    )
    model = decoder.build_model(profile, attention="eager")
    optimizer, _ = build_optimizers(model, role_table(model, profile), profile)
    ids = torch.zeros(2, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.float().logsumexp(-1).mean().backward()
        optimizer.step()
    forward = forward_flops_per_token(profile.model, 32)
    full = 3 * forward.attention * 32 / mean_keys_seen(32)
    expected = run_flops(profile, 1, profile.tokens_per_step) + profile.tokens_per_step * (
        full - 3.5 * forward.attention
    )
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)
    share = muon_flops_per_step(profile.model, 4) / expected
    assert share > 0.1  # at this size it is no small thing


def test_newton_schulz_is_a_seventh_of_a_laptop_step():
    """By hand: q and o are 128 × 128, k and v 64 × 128, the three of the MLP 344 × 128, in each of
    12 layers, 5 iterations.
    """
    tiny = get_profile("tiny")
    by_hand = (
        12
        * 5
        * sum(
            count * (4 * m**2 * n + 2 * m**3)
            for count, m, n in [(2, 128, 128), (2, 64, 128), (3, 128, 344)]
        )
    )
    assert muon_flops_per_step(tiny.model, 5) == by_hand
    step = run_flops(tiny, 1, tiny.tokens_per_step)
    assert step - flops_per_token(tiny.model, 256) * 2048 == pytest.approx(by_hand)
    assert by_hand / step == pytest.approx(0.146, abs=5e-4)
