from __future__ import annotations

import json

import pytest
import torch

from kl3m_nb.data.windows import Batch
from kl3m_nb.model import decoder, experts
from kl3m_nb.optim.loss import training_loss
from kl3m_nb.profiles import get_profile
from tests.conftest import small_profile


def _mixture(**settings):
    return decoder.build_model(
        small_profile(experts=4, active_experts=2, tied_embeddings=False, **settings)
    )


def test_grouped_products_are_transformers_own_and_so_are_their_gradients():
    inputs = torch.randint(0, 512, (2, 32))
    results = []
    for grouped in (False, True):
        model = _mixture()
        if grouped:
            experts.use_grouped_experts(model)
        logits = model(inputs).logits
        logits.square().mean().backward()
        results.append(
            (
                logits.detach(),
                {name: parameter.grad for name, parameter in model.named_parameters()},
            )
        )
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
    model = decoder.build_model(get_profile("tiny", layers=1, growth_factor=1), device="meta")
    experts.use_grouped_experts(model)
    assert not hasattr(model.config, "num_local_experts")


def switch_loss(
    logits: torch.Tensor, active: int, counts: torch.Tensor | None = None
) -> torch.Tensor:
    """Equations 4 to 6 of Switch Transformer for one layer's logits [tokens, experts], from
    `counts` or its own choices.
    """
    number = logits.shape[1]
    if counts is None:
        counts = torch.tensor(
            [(logits.topk(active).indices == expert).sum() for expert in range(number)]
        )
    share = active * counts.to(logits.dtype) / counts.sum()
    return number * sum(
        share[expert] * logits.softmax(-1)[:, expert].mean() for expert in range(number)
    )


def _loss(logits, active, mask=None):
    return experts.load_balancing_loss(
        logits, experts.expert_counts(logits, active, mask), active, mask
    )


def test_the_routers_loss_is_the_mean_of_the_layers_own():
    torch.manual_seed(0)
    logits = [torch.randn(64, 4, dtype=torch.float64).mul_(3).requires_grad_() for _ in range(3)]
    loss, reference = _loss(logits, 2), sum(switch_loss(layer, 2) for layer in logits) / 3
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits), torch.autograd.grad(reference, logits)
    )
    mask = torch.rand(4, 16) < 0.7
    reference = sum(switch_loss(layer[mask.flatten()], 2) for layer in logits) / 3
    torch.testing.assert_close(_loss(logits, 2, mask), reference)


def test_layers_that_leave_out_different_experts_do_not_make_up_for_each_other():
    """Even use gives 2; two dead experts in every layer give 4, and a gradient against them."""
    noise = 0.01 * torch.randn(
        2, 4096, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    dead = torch.tensor([[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]], dtype=torch.float64)
    logits = [(noise[layer] + dead[layer]).requires_grad_() for layer in range(2)]
    loss = _loss(logits, 2)
    loss.backward()
    assert loss.item() == pytest.approx(4.0, abs=0.01)
    assert all(
        layer.grad.sum(0)[bias == 0.0].max() < -1e-4
        for layer, bias in zip(logits, dead, strict=True)
    )
    even = [
        torch.eye(4, dtype=torch.float64).repeat(8, 1) + torch.eye(4).roll(1, 0).repeat(8, 1)
        for _ in range(2)
    ]
    assert _loss(even, 2).item() == pytest.approx(2.0)


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
def test_micro_batches_add_up_to_the_step_and_the_covariance_of_what_they_count(micro_batches):
    """With the counts of the whole step the sum is its loss exactly; with their own it is larger by
    what the docstring says.
    """
    torch.manual_seed(0)
    layers, active = 3, 2
    windows = [
        torch.randn(8, 16, 4, dtype=torch.float64) + 2 * torch.randn(8, 1, 4, dtype=torch.float64)
        for _ in range(layers)
    ]
    mask = torch.rand(8, 16) < torch.linspace(0.3, 1.0, 8).unsqueeze(1)
    whole = [layer.flatten(0, 1) for layer in windows]
    counts = experts.expert_counts(whole, active, mask)
    reference = sum(switch_loss(layer[mask.flatten()], active) for layer in whole) / layers
    of_step, of_its_own, covariance = 0.0, 0.0, 0.0
    for rows in torch.arange(8).chunk(micro_batches):
        part, part_mask = [layer[rows].flatten(0, 1) for layer in windows], mask[rows]
        weight = part_mask.sum() / mask.sum()
        own = experts.expert_counts(part, active, part_mask)
        of_step += weight * experts.load_balancing_loss(part, counts, active, part_mask)
        of_its_own += weight * experts.load_balancing_loss(part, own, active, part_mask)
        probabilities = torch.stack(
            [layer[part_mask.flatten()].softmax(-1).mean(0) for layer in part]
        )
        excess = active * (own / own.sum(1, keepdim=True) - counts / counts.sum(1, keepdim=True))
        covariance += weight * 4 * (excess * probabilities).sum(1).mean()
    torch.testing.assert_close(of_step, reference)
    torch.testing.assert_close(of_its_own, reference + covariance)
    assert covariance > 0.01 if micro_batches > 1 else covariance == 0


def test_a_micro_batch_weighs_as_its_routed_tokens_and_not_as_its_labels():
    """Instruction pairs have labels on the response only; the router sees all of them."""
    profile = small_profile(experts=4, active_experts=2, router_aux_loss=0.05)
    model = decoder.build_model(profile)
    torch.manual_seed(0)
    tokens, mask = (
        torch.randint(0, 512, (4, 32)),
        torch.arange(32) < torch.tensor([[32], [20], [9], [31]]),
    )
    labels = tokens.masked_fill(
        ~mask | (torch.arange(32) < torch.tensor([[30], [0], [0], [0]])), -100
    )
    rows = [
        Batch(tokens[row : row + 1], labels[row : row + 1], mask[row : row + 1]) for row in range(4)
    ]
    valid, routed = (
        sum(getattr(row, what) for row in rows) for what in ("valid_tokens", "routed_tokens")
    )
    assert (valid, routed) == (62, 92)
    total = sum(
        training_loss(model, row, valid, routed, profile, False, False)[1]["router_loss"]
        for row in rows
    )
    alone = [
        decoder.forward_body(model, row.input_ids, row.attention_mask).router_loss.item()
        for row in rows
    ]
    assert total.item() == pytest.approx(
        0.05 * sum(row.routed_tokens * loss for row, loss in zip(rows, alone, strict=True)) / 92
    )


def test_router_logits_have_the_precision_of_the_weights_under_autocast_too():
    model = _mixture()
    router = model.model.layers[0].mlp.gate
    hidden = torch.randn(64, 32)
    exact = hidden.double() @ router.weight.detach().double().T
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights, _ = router(hidden)
    assert logits.dtype == weights.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-6 * exact.abs().max()


def test_the_idlest_expert_of_each_layer_is_logged_and_named_below_a_fifth_of_an_even_share():
    counts = torch.tensor([[25.0, 25, 25, 25], [4.0, 32, 32, 32], [6.0, 31, 31, 32]])
    columns = experts.expert_columns(counts)
    assert columns["share"][4:8] == [0.04, 0.32, 0.32, 0.32]
    assert columns["least_share"] == [0.25] * 4 + [0.04] * 4 + [0.06] * 4
    watch = experts.IdleExperts()
    with pytest.warns(UserWarning, match="layer 1 expert 0 gets 4.0% .* step 20") as caught:
        watch.warn(counts, 20)
        watch.warn(counts, 40)
    assert len(caught) == 1


def test_a_batch_of_nothing_but_padding_has_no_balance_to_speak_of():
    logits = torch.randn(6, 4, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    counts = experts.expert_counts([logits], 2, mask)
    loss = experts.load_balancing_loss([logits], counts, 2, mask)
    loss.backward()
    assert loss.item() == 0.0 and not counts.any() and not logits.grad.any()
