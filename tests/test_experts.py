from __future__ import annotations

import json

import torch
from conftest import small_profile

from kl3m_nb import experts, models
from kl3m_nb.profiles import get_profile


def _mixture(**settings):
    return models.build_model(small_profile(experts=4, active_experts=2, tied_embeddings=False, **settings))


def test_grouped_products_are_transformers_own_and_so_are_their_gradients():
    inputs = torch.randint(0, 512, (2, 32))
    results = []
    for grouped in (False, True):
        model = _mixture()
        if grouped:
            experts.use_grouped_experts(model)
        logits = model(inputs).logits
        logits.square().mean().backward()
        results.append((logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}))
    (logits, gradients), (grouped_logits, grouped_gradients) = results
    torch.testing.assert_close(grouped_logits, logits)
    torch.testing.assert_close(grouped_gradients, gradients)


def test_under_autocast_the_products_run_in_bfloat16(monkeypatch):
    dtypes = set()
    original = torch.nn.functional.grouped_mm

    def watched(rows, weight, **settings):
        dtypes.update((rows.dtype, weight.dtype))
        return original(rows, weight, **settings)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", watched)
    model = _mixture()
    exact = model(torch.arange(32).view(1, -1)).logits
    experts.use_grouped_experts(model)
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(torch.arange(32).view(1, -1)).logits
    assert dtypes == {torch.bfloat16}
    assert (rounded.float() - exact).abs().max() < 0.02 * exact.abs().max()


def test_an_expert_that_no_token_chose_is_fine():
    module = _mixture().model.layers[0].mlp.experts
    hidden, weights = torch.randn(6, 32), torch.full((6, 2), 0.5)
    chosen = torch.tensor([[0, 3]] * 6)
    expected = torch.zeros_like(hidden)
    for expert in (0, 3):
        gate, up = (hidden @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
        expected += 0.5 * (torch.nn.functional.silu(gate) * up) @ module.down_proj[expert].T
    torch.testing.assert_close(experts.grouped_experts(module, hidden, chosen, weights), expected)


def test_the_choice_of_products_stays_out_of_the_checkpoint(tmp_path):
    model = _mixture()
    experts.use_grouped_experts(model)
    model.save_pretrained(tmp_path)
    assert experts.IMPLEMENTATION not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["num_local_experts"] == 4


def test_counts_by_hand():
    logits = torch.tensor([[3.0, 2.0, 1.0], [0.0, 5.0, 4.0], [9.0, 0.0, 8.0], [1.0, 2.0, 3.0]])
    counts = experts.expert_counts((logits, -logits), active=2)
    assert counts.tolist() == [[2, 3, 3], [2, 3, 3]]
    mask = torch.tensor([[True, True], [False, True]])
    assert experts.expert_counts((logits, -logits), 2, mask).tolist() == [[1, 3, 2], [2, 2, 2]]


def test_a_dense_model_is_left_as_it_is():
    model = models.build_model(get_profile("tiny", layers=1, growth_factor=1), device="meta")
    experts.use_grouped_experts(model)
    assert not hasattr(model.config, "num_local_experts")


def test_a_batch_of_nothing_but_padding_has_no_balance_to_speak_of():
    logits = torch.randn(6, 4, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    counts = experts.expert_counts([logits], 2, mask)
    loss = experts.load_balancing_loss([logits], counts, mask)
    loss.backward()
    assert loss.item() == 0.0 and not counts.any() and not logits.grad.any()
