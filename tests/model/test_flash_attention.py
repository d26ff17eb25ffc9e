"""FlashAttention 4's place in a model, its kernels played by the formula in float64;
tests/test_gpu.py runs the true ones.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch

from kl3m_nb.model import decoder, flash_attention
from kl3m_nb.model.fused_projections import fuse_projections
from tests.conftest import small_profile


def probabilities(query, key, value, scale):
    """Softmax of the causal scores, and the three inputs, all float64 [batch, heads, seq_len, ...]
    with keys repeated.
    """
    query, key, value = (states.double().transpose(1, 2) for states in (query, key, value))
    key, value = (
        states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value)
    )
    ahead = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    scores = scale * query @ key.mT
    return scores.masked_fill(ahead, -torch.inf).softmax(-1), query, key, value


class Kernels(types.ModuleType):
    """Stands in for `flash_attn.cute.interface`, and counts its calls."""

    def __init__(self):
        super().__init__("flash_attn.cute.interface")
        self.calls = []

    def _flash_attn_fwd(self, query, key, value, softmax_scale, causal, return_lse):
        assert causal and return_lse and query.dtype == key.dtype == value.dtype == torch.bfloat16
        self.calls.append("forward")
        shares, _, _, values = probabilities(query, key, value, softmax_scale)
        output = (shares @ values).transpose(1, 2).to(query.dtype).contiguous()
        return (
            output,
            query.new_zeros(query.shape[0], query.shape[2], query.shape[1], dtype=torch.float32),
            None,
        )

    def _flash_attn_bwd(
        self, query, key, value, output, output_grad, log_sums, softmax_scale, causal, deterministic
    ):
        self.calls.append("backward")
        shares, queries, keys, values = probabilities(query, key, value, softmax_scale)
        output_grad = output_grad.double().transpose(1, 2)
        of_shares = output_grad @ values.mT
        of_scores = (
            softmax_scale * shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True))
        )
        gradients = of_scores @ keys, of_scores.mT @ queries, shares.mT @ output_grad
        return *map(self._as_given, gradients, (query, key, value)), None

    @staticmethod
    def _as_given(gradient, states):
        """The gradients of repeated heads added up, in the layout and dtype of `states`."""
        grouped = gradient.unflatten(1, (states.shape[2], -1)).sum(2)
        return grouped.transpose(1, 2).to(states.dtype).contiguous()


@pytest.fixture
def kernels(monkeypatch):
    modules = {
        "flash_attn": types.ModuleType("flash_attn"),
        "flash_attn.cute": types.ModuleType("flash_attn.cute"),
    }
    kernels = modules["flash_attn.cute.interface"] = Kernels()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return kernels


def gradients_of(model, inputs, attention, mask=None):
    model.zero_grad()
    model.config._attn_implementation = attention
    direction = torch.randn(*inputs.shape, 32, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = decoder.forward_body(model, inputs, mask).hidden
    (hidden.float() * direction).sum().backward()
    return hidden.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_computes_with_it_what_it_does_with_sdpa(kernels, compiled):
    model = decoder.build_model(small_profile())
    inputs = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    expected = gradients_of(model, inputs, "sdpa")
    assert not kernels.calls
    if compiled:
        torch._dynamo.reset()
        fuse_projections(model)
        for layer in model.model.layers:
            layer.compile(dynamic=False, backend="aot_eager", fullgraph=True)
    hidden, gradients = gradients_of(model, inputs, flash_attention.IMPLEMENTATION)
    assert kernels.calls == ["forward"] * 2 + ["backward"] * 2
    torch.testing.assert_close(hidden, expected[0], rtol=0.03, atol=0.03)
    for name, gradient in gradients.items():
        assert (gradient - expected[1][name]).norm() < 0.03 * expected[1][name].norm(), name


def test_a_mask_float32_and_a_cache_go_to_sdpa(kernels):
    model = decoder.build_model(small_profile())
    inputs, mask = torch.randint(0, 512, (2, 32)), torch.arange(32).expand(2, 32) > 4
    expected = gradients_of(model, inputs, "sdpa", mask)[0]
    assert torch.equal(
        gradients_of(model, inputs, flash_attention.IMPLEMENTATION, mask)[0], expected
    )
    written = model.generate(inputs[:1, :8], max_new_tokens=8, do_sample=False)
    model.config._attn_implementation = "sdpa"
    assert torch.equal(model.generate(inputs[:1, :8], max_new_tokens=8, do_sample=False), written)
    assert not kernels.calls


@pytest.mark.parametrize(
    ("queries", "dropout", "taken"), [(8, 0.0, True), (4, 0.0, False), (8, 0.1, False)]
)
def test_a_cache_or_dropout_alone_sends_it_to_sdpa(kernels, queries, dropout, taken):
    attention = decoder.build_model(small_profile()).model.layers[0].self_attn
    query, key, value = (
        torch.randn(1, heads, length, 8).bfloat16()
        for heads, length in ((4, queries), (2, 8), (2, 8))
    )
    output, _ = flash_attention.attend(
        attention, query, key, value, None, dropout=dropout, scaling=0.3
    )
    assert output.shape == (1, queries, 4, 8)
    assert bool(kernels.calls) is taken


def test_models_are_built_and_loaded_with_it(kernels, tmp_path):
    decoder.build_model(small_profile(), attention=flash_attention.IMPLEMENTATION).save_pretrained(
        tmp_path
    )
    model = decoder.load_model(tmp_path, attention=flash_attention.IMPLEMENTATION)
    with torch.autocast("cpu", torch.bfloat16):
        decoder.forward_body(model, torch.randint(0, 512, (2, 32)))
    assert kernels.calls == ["forward"] * 2


def test_the_operations_are_well_formed(kernels):
    query, key, value = (
        torch.randn(1, 16, heads, 8, dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, 2, 2)
    )
    torch.library.opcheck(flash_attention.causal_attention, (query, key, value, 0.3))


def test_whether_the_package_loads(kernels, monkeypatch):
    assert flash_attention.loads()
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", None)
    assert not flash_attention.loads()
