from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import small_profile
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from kl3m_nb import models, stacking
from kl3m_nb.profiles import get_profile


@pytest.fixture(scope="module")
def source(trained_run):
    return trained_run[1].checkpoint


@pytest.mark.parametrize(
    ("order", "expected"), [("cyclic", [0, 1, 0, 1, 0, 1]), ("interpolated", [0, 0, 0, 1, 1, 1])]
)  # fmt: skip
def test_each_block_is_its_source_block_and_the_rest_is_copied_once(source, tmp_path, order, expected):
    summary = stacking.stack_checkpoint(source, tmp_path / "stack", factor=3, order=order)
    assert list(summary.block_sources) == expected
    small, large = AutoModelForCausalLM.from_pretrained(source), AutoModelForCausalLM.from_pretrained(tmp_path / "stack")
    assert large.config.num_hidden_layers == 6 == len(large.model.layers)
    for block, origin in zip(large.model.layers, expected, strict=True):
        for copied, original in zip(block.parameters(), small.model.layers[origin].parameters(), strict=True):
            assert torch.equal(copied, original)
    assert torch.equal(large.model.embed_tokens.weight, small.model.embed_tokens.weight)
    assert torch.equal(large.model.norm.weight, small.model.norm.weight)
    assert summary.parameters == sum(parameter.numel() for parameter in large.parameters())
    assert stacking.verify_stack(source, tmp_path / "stack") == len(list(large.parameters()))


def test_the_real_stack_on_paper():
    order = stacking.block_order(30, 4)
    assert len(order) == 120 and order[29:31] == (29, 0) and order[119] == 29


def test_a_sharded_source_and_a_mixtral_stack_as_well(tmp_path):
    profile = get_profile("tiny-moe", layers=2, growth_factor=1, hidden=32, mlp=32, head_size=8, vocabulary=512)
    model = models.build_model(profile)
    model.save_pretrained(tmp_path / "moe", max_shard_size="100KB")
    assert len(list((tmp_path / "moe").glob("*.safetensors"))) > 1
    stacking.stack_checkpoint(tmp_path / "moe", tmp_path / "stack", factor=2)
    grown = MixtralForCausalLM.from_pretrained(tmp_path / "stack")
    for layer in range(4):
        for copied, original in zip(
            grown.model.layers[layer].parameters(), model.model.layers[layer % 2].parameters(), strict=True
        ):
            assert torch.equal(copied, original)


def test_the_same_stack_again_is_left_alone_and_another_is_refused(source, tmp_path):
    target = tmp_path / "stack"
    stacking.stack_checkpoint(source, target, factor=2)
    written = (target / "model.safetensors").stat().st_mtime_ns
    stacking.stack_checkpoint(source, target, factor=2)
    assert (target / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="already holds"):
        stacking.stack_checkpoint(source, target, factor=3)


def test_a_source_that_does_not_fit_leaves_nothing_behind(source, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    for folder, factor, order, words in (
        (broken, 2, "cyclic", "names 3 layers"),
        (tmp_path / "nowhere", 2, "cyclic", "no checkpoint folder"),
        (source, 0, "cyclic", "at least 1"),
        (source, 2, "spiral", "interpolated"),
    ):
        with pytest.raises(ValueError, match=words):
            stacking.stack_checkpoint(folder, tmp_path / "target", factor=factor, order=order)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_verify_finds_a_changed_byte(source, tmp_path):
    target = tmp_path / "stack"
    stacking.stack_checkpoint(source, target, factor=2)
    content = bytearray((target / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (target / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="no copy"):
        stacking.verify_stack(source, target)


def test_a_stacked_model_runs_at_the_profiles_shape(source, tmp_path):
    stacking.stack_checkpoint(source, tmp_path / "stack", factor=2)
    config = json.loads((tmp_path / "stack" / "config.json").read_text())
    models.check_fits(config, small_profile(layers=4, growth_factor=2), tmp_path / "stack")
