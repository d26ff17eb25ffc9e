"""Finding matrices: the same set from a module, a folder in one or several files, and either layout
of a Mixtral's experts.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from kl3m_nb.growth import stacking
from kl3m_nb.model import roles
from kl3m_nb.model.roles import BLOCK_ROLES, HEAD_LAYER
from kl3m_nb.runs import lineage
from kl3m_nb.spectra.matrices import find_matrices, huggingface_hub, layer_count, local_checkpoint

SHAPE = dict(
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=40,
    max_position_embeddings=32,
)


def llama(layers=4, tied=True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=tied, **SHAPE)
    )


def mixtral(layers=2, experts=3) -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(num_hidden_layers=layers, num_local_experts=experts, **SHAPE)
    )


def contents(model_or_checkpoint) -> dict:
    return {
        (m.layer, m.role, m.expert): m.read().clone() for m in find_matrices(model_or_checkpoint)
    }


def assert_same_contents(first: dict, second: dict):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(path)
    return path


def test_a_llama_has_seven_matrices_a_layer_and_a_head_in_order():
    matrices = find_matrices(llama())
    assert layer_count(matrices) == 4
    assert [m.role for m in matrices] == [*BLOCK_ROLES * 4, "lm_head"]
    assert [m.layer for m in matrices] == [*sorted([0, 1, 2, 3] * 7), HEAD_LAYER]
    assert all(m.shape == tuple(m.read().shape) for m in matrices)


def test_folder_shards_and_single_file_hold_what_the_module_holds(folder, tmp_path):
    model = llama()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = contents(model)
    for place in (folder, folder / "model.safetensors", tmp_path):
        assert_same_contents(contents(place), expected)


def test_beside_a_single_file_shards_are_passed_over_as_transformers_does(tmp_path):
    """Analysis and stacking see the model that transformers loads."""
    new, old = llama(), llama()
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.mul_(2)
    old.save_pretrained(tmp_path / "both", max_shard_size="10KB")
    new.save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single" / "model.safetensors", tmp_path / "both")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "both")
    assert_same_contents(contents(loaded), contents(new))
    assert_same_contents(contents(tmp_path / "both"), contents(loaded))
    assert stacking.stack_checkpoint(
        tmp_path / "both", tmp_path / "stack"
    ).source_sha256.keys() == {"model.safetensors"}


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_the_embedding_only_where_they_are_tied(tied, tmp_path):
    model = llama(tied=tied)
    model.save_pretrained(tmp_path)
    expected = model.model.embed_tokens.weight if tied else model.lm_head.weight
    for place in (model, tmp_path):
        head = find_matrices(place)[-1]
        assert head.role == "lm_head" and torch.equal(head.read(), expected)


def test_experts_are_the_same_fused_and_one_by_one(tmp_path):
    model = mixtral()
    expected = contents(model)
    assert len(expected) == 2 * (4 + 3 * 3) + 1
    model.save_pretrained(tmp_path / "by_name")  # transformers writes w1, w2, w3 of every expert
    assert any(".w1." in name for name in load_file(tmp_path / "by_name" / "model.safetensors"))
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        tmp_path / "fused.safetensors",
    )
    for place in (tmp_path / "by_name", tmp_path / "fused.safetensors"):
        assert_same_contents(contents(place), expected)


def test_an_experts_matrices_compute_what_transformers_computes():
    model = mixtral()
    experts = model.model.layers[1].mlp.experts
    found = contents(model)
    hidden = torch.randn(5, 16)
    gate, up, down = (found[1, role, 2] for role in ("gate_proj", "up_proj", "down_proj"))
    ours = (torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T
    theirs = experts(hidden, torch.full((5, 1), 2), torch.ones(5, 1))
    torch.testing.assert_close(ours, theirs)


def test_the_dtype_is_told_without_reading(tmp_path):
    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert {m.dtype for m in find_matrices(tmp_path)} == {"bfloat16"}
    assert {m.dtype for m in find_matrices(llama().to(torch.float16))} == {"float16"}


def without(folder, tmp_path, part: str):
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "part.safetensors")
    return tmp_path / "part.safetensors"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("layers.2.", "has no layer 2, though it has a layer 3"),
        ("layers.1.self_attn.v_proj", "has no v_proj in layer 1"),
        ("up_proj", "has no up_proj in layer 0"),
        ("embed_tokens", "is not a decoder"),
        ("layers", "is not a decoder"),
    ],
)
def test_what_is_missing_is_named(folder, tmp_path, part, message):
    with pytest.raises(ValueError, match=message):
        find_matrices(without(folder, tmp_path, part))


def test_layers_that_the_config_promises_must_be_there(folder, tmp_path):
    whole = shutil.copytree(folder, tmp_path / "whole")
    path = without(folder, tmp_path, "layers.3.")
    assert layer_count(find_matrices(path)) == 3  # a file alone promises nothing
    shutil.move(path, whole / "model.safetensors")
    with pytest.raises(ValueError, match=r"ends at layer 2, its config.json speaks of 4 layers"):
        find_matrices(whole)


def test_a_quantised_copy_is_refused(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(
        torch.int8
    )
    save_file(tensors, tmp_path / "int8.safetensors")
    with pytest.raises(ValueError, match="up_proj of layer 1 as i8; spectra need"):
        find_matrices(tmp_path / "int8.safetensors")


def test_a_hub_id_is_downloaded_once_it_is_no_folder(folder, tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same_contents(contents("owner/some-model"), contents(folder))
    assert asked == [
        ("owner/some-model", ["*.safetensors", "*.safetensors.index.json", "config.json"])
    ]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "runs" / "mine")
    assert local_checkpoint("runs/mine") == tmp_path / "runs" / "mine" and len(asked) == 1


def test_a_hub_that_does_not_answer_is_told_in_a_sentence(monkeypatch):
    def refuse(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        ValueError, match="There is no folder owner/none, and the hub gave no model of that name"
    ):
        find_matrices("owner/none")


def test_a_step_is_read_from_the_name_or_the_stack_record(tmp_path):
    for name, record, step in (
        ("step-000120", False, 120),
        ("fresh", True, 0),
        ("somewhere", False, -1),
    ):
        (tmp_path / name).mkdir()
        if record:
            (tmp_path / name / "stack.json").write_text("{}")
        assert lineage.model_step(tmp_path / name) == step
    assert lineage.model_step(torch.nn.Linear(2, 2)) == -1
    (tmp_path / "fresh" / "stack.json").write_text(
        '{"trained_steps": 240}'
    )  # as an exported model has it
    assert (
        lineage.model_step(tmp_path / "fresh")
        == lineage.model_step(tmp_path / "fresh" / "stack.json")
        == 240
    )


def test_a_model_of_another_kind_is_refused(tmp_path):
    save_file(
        {"transformer.h.0.attn.c_attn.weight": torch.ones(4, 12)}, tmp_path / "other.safetensors"
    )
    for other in (torch.nn.Linear(3, 4), tmp_path / "other.safetensors"):
        with pytest.raises(ValueError, match="is not a decoder"):
            find_matrices(other)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "[]", "config.json holds no JSON object"),
        ("model.safetensors.index.json", "\udcff", "index.json is not JSON"),
        ("model.safetensors.index.json", '{"metadata": {}}', "index.json has no weight_map"),
    ],
)
def test_a_broken_description_is_named(folder, tmp_path, file, content, message):
    whole = shutil.copytree(folder, tmp_path / "whole")
    if file != "config.json":
        (whole / "model.safetensors").unlink()  # beside it an index is not read
    (whole / file).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        find_matrices(whole)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.layers.0.self_attn.qkv_proj.weight",
            "stores q_proj, k_proj and v_proj as one matrix",
        ),
        ("model.layers.0.mlp.gate_up_proj.weight", "stores gate_proj and up_proj as one matrix"),
        (
            "vision_model.encoder.layers.0.self_attn.q_proj.weight",
            "has more than one stack of layers",
        ),
    ],
)
def test_what_is_stored_in_another_way_is_named(folder, tmp_path, name, message):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.ones(4, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=message):
        find_matrices(tmp_path / "other.safetensors")


def test_what_is_not_there_or_cut_off_is_told(folder, tmp_path):
    with pytest.raises(ValueError, match=r"There is no .*nowhere"):
        find_matrices(tmp_path / "nowhere")
    (tmp_path / "cut.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        find_matrices(tmp_path / "cut.safetensors")
    llama().save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    lost = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    shutil.move(lost, tmp_path)
    with pytest.raises(ValueError, match=rf"lacks the .safetensors shard {lost.name}"):
        find_matrices(tmp_path / "shards")


def of_family(tmp_path, name: str, **settings):
    """A folder of a small model of another family, and the model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name, num_hidden_layers=2, head_dim=4, pad_token_id=0, **{**SHAPE, **settings}
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / name)
    return tmp_path / name, model


@pytest.mark.parametrize("family", ["llama4_text", "gpt_oss"])
def test_experts_stored_the_other_way_round_are_refused_and_not_cut_across(tmp_path, family):
    folder, model = of_family(
        tmp_path, family, num_local_experts=3, num_experts_per_tok=1, interleave_moe_layer_step=1
    )
    for place in (folder, model):
        with pytest.raises(
            ValueError,
            match=r"experts the other way round \(.*gate_up_proj of shape \[3, 16, 48\]\)",
        ):
            find_matrices(place)


def test_a_whole_model_without_a_gate_gives_what_it_has_and_says_so(tmp_path):
    folder, model = of_family(tmp_path, "nemotron")
    for place in (folder, model):
        with pytest.warns(
            UserWarning,
            match="is whole, but has no gate_proj; spectra are those of its .*up_proj, down_proj",
        ):
            found = contents(place)
        assert {role for _, role, _ in found} == {*roles.ROLES} - {"gate_proj"}
        assert torch.equal(found[1, "up_proj", -1], model.model.layers[1].mlp.up_proj.weight)
    lost = load_file(folder / "model.safetensors")
    del lost["model.layers.0.mlp.up_proj.weight"], lost["model.layers.1.mlp.up_proj.weight"]
    save_file(lost, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 2 tensors \(model\.layers\.0\.mlp\.up_proj\.weight"
    ):
        find_matrices(folder)


def test_matrices_of_no_known_role_are_named_and_taken_for_no_other(tmp_path):
    experts = dict(
        num_experts=3,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )
    with pytest.warns(UserWarning, match="leave out: .*shared_expert.up_proj"):
        find_matrices(of_family(tmp_path, "qwen2_moe", **experts)[0])
    folder, model = of_family(
        tmp_path, "afmoe", num_dense_layers=2
    )  # its attention has a gate_proj too
    with pytest.warns(UserWarning, match="leave out: self_attn.gate_proj"):
        assert torch.equal(
            contents(folder)[0, "gate_proj", -1], model.model.layers[0].mlp.gate_proj.weight
        )


def test_a_whole_model_whose_layers_differ_is_not_called_half(tmp_path):
    folder, _ = of_family(
        tmp_path, "afmoe", num_dense_layers=1, num_experts=3, moe_intermediate_size=8
    )
    with pytest.raises(
        ValueError, match=r"is whole, but has no .* spectra need a model whose layers are alike"
    ):
        find_matrices(folder)


def test_an_untied_head_that_is_lost_is_not_replaced_by_the_embedding(tmp_path):
    llama(tied=False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensor \(lm_head\.weight\)"):
        find_matrices(tmp_path)
