"""What the names of tensors say, compared with what the modules of transformers do with them."""

from __future__ import annotations

import ast
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from kl3m_nb.model import roles
from kl3m_nb.spectra.matrices import find_matrices
from tests.notebooks.test_static import MODULES

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
# A name or pattern of a tensor; sentences, which may speak of one, hold blanks.
TENSOR_NAME = re.compile(
    r"layers\\?\.|embed_tokens|lm_head\\?\.|\.weight$|self_attn|rotary_emb|_proj[|)\\.]|experts\\?\."
)


@pytest.fixture(params=["llama", "mixtral"])
def model(request):
    torch.manual_seed(0)
    if request.param == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    return MixtralForCausalLM(
        MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    ).eval()


def test_no_other_module_holds_the_name_of_a_tensor():
    found = [
        (path.name, node.lineno, node.value)
        for path in MODULES
        if path.name != "roles.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if " " not in node.value and TENSOR_NAME.search(node.value)
    ]
    assert not found


def test_a_tensor_belongs_to_the_block_whose_module_holds_it(model):
    blocks = {
        parameter: number
        for number, block in enumerate(model.model.layers)
        for parameter in block.parameters()
    }
    for name, parameter in model.named_parameters():
        block = blocks.get(parameter, roles.HEAD_LAYER)
        assert roles.block_number(name) == block
        if block != roles.HEAD_LAYER:
            assert model.get_parameter(roles.block_name(block, name.split(".", 3)[3])) is parameter


def test_a_block_adds_nothing_once_what_writes_into_the_residual_stream_is_zero(model):
    names = [name for name, _ in model.named_parameters() if roles.block_number(name) == 1]
    writers = {name for name in names if roles.residual_writer(name)}
    assert {roles.residual_writer(name) for name in writers} == {"o_proj", "down_proj"}
    hidden = []
    for part in (model.model.layers[0], model.model.norm):
        part.register_forward_hook(
            lambda module, inputs, output: hidden.append(
                inputs[0] if module is model.model.norm else output
            )
        )
    ids = torch.arange(12)[None]
    with torch.no_grad():
        for zero, same in ((sorted(writers)[:1], False), (writers, True)):
            for name in zero:
                model.get_parameter(name).zero_()
            hidden.clear()
            model(ids)
            before, after = hidden
            assert torch.equal(before, after) == same


@pytest.mark.parametrize("model", ["mixtral"], indirect=True)
def test_a_fused_tensor_holds_its_matrices_in_the_order_that_is_said(model):
    experts = model.model.layers[0].mlp.experts
    halves = dict(
        zip(roles.fused_matrices("gate_up_proj"), experts.gate_up_proj[2].chunk(2), strict=True)
    )
    x = torch.randn(1, SIZES["hidden_size"])
    ours = torch.nn.functional.silu(x @ halves["gate_proj"].T) * (x @ halves["up_proj"].T)
    theirs = experts(x, torch.tensor([[2]]), torch.ones(1, 1))
    torch.testing.assert_close(ours @ experts.down_proj[2].T, theirs)
    for matrix in find_matrices(model):
        if matrix.layer == 0 and matrix.expert == 2 and matrix.role in halves:
            assert torch.equal(matrix.read(), halves[matrix.role])


def test_the_head_is_told_from_the_embedding(model):
    named = {roles.head_role(name): parameter for name, parameter in model.named_parameters()}
    assert named.keys() == {"", "lm_head", "embedding"}
    assert named["lm_head"] is model.get_output_embeddings().weight
    assert named["embedding"] is model.get_input_embeddings().weight
    assert roles.head_role("my_lm_head.weight") == ""
