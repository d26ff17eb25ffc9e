"""Fused projections against the modules of transformers they stand in for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, apply_rotary_pos_emb

from kl3m_nb.model import decoder
from kl3m_nb.model.fused_projections import fuse_projections, join, rotate
from tests.conftest import small_profile

MIXTURE = {"experts": 4, "active_experts": 2, "sliding_window": 16}


def pair(**overrides):
    """A model as transformers computes it and a copy with fused projections, in float64."""
    model = decoder.build_model(small_profile(**overrides)).double()
    model.config._experts_implementation = "eager"  # grouped products know no float64
    fused = copy.deepcopy(model)
    fuse_projections(fused)
    return model, fused


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("overrides", [{}, MIXTURE], ids=["llama", "mixtral"])
def test_outputs_and_gradients_are_those_of_transformers(overrides, padded):
    inputs = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(32).expand(2, 32) > 4 if padded else None
    direction = torch.randn(
        2, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    model, fused = pair(**overrides)
    hidden = [decoder.forward_body(each, inputs, mask).hidden for each in (model, fused)]
    torch.testing.assert_close(*hidden)
    for states in hidden:
        (states * direction).sum().backward()
    assert type(fused.model.layers[0].self_attn) is not type(model.model.layers[0].self_attn)
    for (name, parameter), expected in zip(
        fused.named_parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(
            parameter.grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_rotation_equals_the_one_of_transformers_to_the_bit():
    query, key, angles = (
        torch.randn(2, 9, 16, 64),
        torch.randn(2, 3, 16, 64),
        torch.randn(1, 16, 64),
    )
    expected = apply_rotary_pos_emb(query, key, angles.cos(), angles.sin())
    for states, rotated in zip((query, key), expected, strict=True):
        assert torch.equal(rotate(states, angles.cos(), angles.sin()), rotated)


def test_a_fused_model_writes_with_its_cache_and_saves_as_before(tmp_path):
    model, fused = pair()
    prompt = torch.randint(0, 512, (1, 8))
    written = [each.generate(prompt, max_new_tokens=8, do_sample=False) for each in (model, fused)]
    assert torch.equal(*written)
    assert fused.state_dict().keys() == model.state_dict().keys()
    fused.save_pretrained(tmp_path)
    assert type(decoder.load_model(tmp_path).model.layers[0].self_attn) is LlamaAttention


def test_projections_with_biases_are_left_as_they_are():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config)
    fuse_projections(model)
    assert (
        type(model.model.layers[0].self_attn) is LlamaAttention
        and type(model.model.layers[0].mlp) is LlamaMLP
    )


def test_a_gated_unit_with_another_activation_is_left_as_it_is():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, hidden_act="gelu"
    )
    model = LlamaForCausalLM(config)
    fuse_projections(model)
    assert (
        type(model.model.layers[0].self_attn) is not LlamaAttention
        and type(model.model.layers[0].mlp) is LlamaMLP
    )


@pytest.mark.parametrize("sizes", [(576, 192, 192), (1536, 1536), (48, 16, 16), (5, 3)])
def test_joined_parts_stand_side_by_side(sizes):
    parts = [torch.randn(2, 3, size) for size in sizes]
    assert torch.equal(join(parts), torch.cat(parts, -1))


@pytest.mark.parametrize("sizes", [(576, 192, 192), (1536, 1536)])
def test_parts_are_joined_in_more_aligned_pieces_than_the_compiler_computes_together(sizes):
    graph = make_fx(join)([torch.empty(2, size) for size in sizes]).graph
    (joined,) = graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    widths = [piece.meta["tensor_meta"].shape[-1] for piece in joined.args[0]]
    assert len(widths) > 8 and sum(widths) == sum(sizes) and all(width % 8 == 0 for width in widths)


def kept_bytes(model, inputs) -> int:
    """What the backward pass of all blocks holds besides parameters, compiled as on a GPU and run
    operation by operation.
    """
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(dynamic=False, backend="aot_eager_decomp_partition")
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = decoder.forward_body(model, inputs).hidden
    del hidden
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def test_a_compiled_backward_pass_holds_no_more_than_that_of_transformers():
    inputs = torch.randint(0, 512, (2, 32))
    model, fused = pair()
    of_weights = sum(
        p.nbytes
        for name, p in model.named_parameters()
        if name.split(".")[-2] in "q_proj k_proj v_proj gate_proj up_proj"
    )
    assert kept_bytes(fused, inputs) <= kept_bytes(model, inputs) + of_weights  # joined
