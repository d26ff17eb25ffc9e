"""What only a GPU runs, each against float64 on the CPU: the objective, Muon, a compiled block,
FlashAttention 4.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kl3m_nb.model import decoder, flash_attention
from kl3m_nb.model.runtime import Runtime, prepare_model
from kl3m_nb.optim.muon import Muon
from kl3m_nb.optim.objective import chunked_objective
from tests.conftest import small_profile
from tests.model.test_flash_attention import probabilities
from tests.optim.test_muon import ReferenceMuon, conditioned
from tests.optim.test_muon import relative_error as update_error
from tests.optim.test_objective import CARD, STRONG, problem, reference_gradients, relative_error

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("spec", "compiled"), [(STRONG, False), (CARD, True)], ids=["strong", "card, compiled"]
)
def test_the_objective_under_bfloat16_autocast_with_masked_labels(spec, compiled):
    hidden, weight, labels = problem(
        tokens=1500, hidden=64, vocabulary=1000, dtype=torch.float32, spread=0.1
    )
    hidden, weight = (
        tensor.detach().bfloat16().float() for tensor in (hidden, weight)
    )  # what the products will see
    expected, hidden_grad, weight_grad = reference_gradients(
        hidden, weight, labels, spec, num_valid=1200
    )
    hidden, weight = (tensor.to(DEVICE).requires_grad_() for tensor in (hidden, weight))
    with torch.autocast(DEVICE, torch.bfloat16):
        terms = chunked_objective(
            hidden, weight, labels.to(DEVICE), spec, num_valid=1200, compiled=compiled
        )
    (3 * terms.total).backward()
    for name, value in expected.items():
        assert getattr(terms, name).item() == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name
    assert relative_error(hidden.grad.cpu() / 3, hidden_grad) < 5e-3
    assert relative_error(weight.grad.cpu() / 3, weight_grad) < 5e-3
    assert not hidden.grad.cpu()[labels == -100].any()


def test_muon_steps():
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 64), (64, 64), (48, 160), (160, 48), (3, 64, 48)]
    parameters = [
        nn.Parameter(conditioned(*shape, generator=generator).float().to(DEVICE))
        for shape in shapes
    ]
    rates = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    references = [
        ReferenceMuon(p.cpu(), **rates, factor=max(1.0, p.size(-2) / p.size(-1)) ** 0.5)
        for p in parameters
    ]
    before = [parameter.detach().cpu().clone() for parameter in parameters]
    optimizer = Muon(parameters, **rates)
    for _ in range(3):
        for parameter, reference in zip(parameters, references, strict=True):
            gradient = conditioned(*parameter.shape, generator=generator)
            parameter.grad = gradient.float().to(DEVICE)
            reference.step(gradient)
        optimizer.step()
    for parameter, reference, start in zip(parameters, references, before, strict=True):
        moved = parameter.detach().cpu() - start
        assert (
            update_error(moved, reference.weight - start.double().numpy()) < 3e-2
        )  # the iteration runs in bfloat16


@pytest.mark.parametrize("experts", [0, 4])
def test_a_compiled_block_with_gradient_checkpointing(experts):
    profile = small_profile(
        layers=1,
        hidden=128,
        mlp=256,
        heads=2,
        kv_heads=1,
        head_size=64,
        context=128,
        seq_len=128,
        experts=experts,
        active_experts=min(2, experts),
        sliding_window=32 if experts else 0,
    )
    model = decoder.build_model(profile)
    reference = copy.deepcopy(model).double()
    reference.config._experts_implementation = "eager"  # grouped products know no float64
    chosen = Runtime(
        torch.device(DEVICE), "bfloat16", "sdpa", compile_blocks=True, recompute=True, tf32=True
    )
    prepare_model(model, chosen)
    tokens = torch.randint(512, (2, 128), generator=torch.Generator().manual_seed(0))
    direction = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(1))
    with chosen.autocast():
        hidden = decoder.forward_body(model, tokens.to(DEVICE), recompute=True).hidden
    (hidden.float() * direction.to(DEVICE)).sum().backward()
    expected = decoder.forward_body(reference, tokens).hidden
    (expected * direction).sum().backward()
    assert relative_error(hidden.cpu(), expected) < 2e-2
    for (name, parameter), exact in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        if exact.grad is not None:  # the head takes no part
            assert relative_error(parameter.grad.cpu(), exact.grad) < 5e-2, name


def test_flash_attention_4_with_grouped_heads_and_values_that_are_a_slice():
    if torch.cuda.get_device_capability()[0] != 9 or not flash_attention.loads():
        pytest.skip("needs a Hopper GPU and flash-attn-4")
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn(2, 384, 15, 64, generator=generator).bfloat16()
    expected_inputs = [states.double().requires_grad_() for states in joint.split([9, 3, 3], dim=2)]
    inputs = [
        states.detach().requires_grad_() for states in joint.to(DEVICE).split([9, 3, 3], dim=2)
    ]
    direction = torch.randn(2, 384, 9, 64, generator=generator)
    output, _ = flash_attention.causal_attention(*inputs, 0.125)
    (output.float() * direction.to(DEVICE)).sum().backward()
    shares, _, _, values = probabilities(*expected_inputs, 0.125)
    expected = (shares @ values).transpose(1, 2)
    (expected * direction).sum().backward()
    assert relative_error(output.cpu(), expected) < 1e-2
    for states, exact in zip(inputs, expected_inputs, strict=True):
        assert relative_error(states.grad.cpu(), exact.grad) < 1e-2
