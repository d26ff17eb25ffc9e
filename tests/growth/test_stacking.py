from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from kl3m_nb.growth import stacking
from kl3m_nb.model import decoder
from kl3m_nb.profiles import get_profile
from tests.conftest import small_profile


@pytest.fixture(scope="module")
def source(trained_run):
    return trained_run[1].checkpoint


@pytest.mark.parametrize(
    ("order", "expected"), [("cyclic", [0, 1, 0, 1, 0, 1]), ("interpolated", [0, 0, 0, 1, 1, 1])]
)
def test_each_block_is_its_source_block_and_the_rest_is_copied_once(
    source, tmp_path, order, expected
):
    summary = stacking.stack_checkpoint(source, tmp_path / "stack", factor=3, order=order)
    assert list(summary.block_sources) == expected
    small, large = (
        AutoModelForCausalLM.from_pretrained(source),
        AutoModelForCausalLM.from_pretrained(tmp_path / "stack"),
    )
    assert large.config.num_hidden_layers == 6 == len(large.model.layers)
    for block, origin in zip(large.model.layers, expected, strict=True):
        for copied, original in zip(
            block.parameters(), small.model.layers[origin].parameters(), strict=True
        ):
            assert torch.equal(copied, original)
    assert torch.equal(large.model.embed_tokens.weight, small.model.embed_tokens.weight)
    assert torch.equal(large.model.norm.weight, small.model.norm.weight)
    assert summary.parameters == sum(parameter.numel() for parameter in large.parameters())
    assert stacking.verify_stack(source, tmp_path / "stack") == len(list(large.parameters()))


def test_the_real_stack_on_paper():
    order = stacking.block_order(30, 4)
    assert len(order) == 120 and order[29:31] == (29, 0) and order[119] == 29


def test_a_sharded_source_and_a_mixtral_stack_as_well(tmp_path):
    profile = get_profile(
        "tiny-moe", layers=2, growth_factor=1, hidden=32, mlp=32, head_size=8, vocabulary=512
    )
    model = decoder.build_model(profile)
    model.save_pretrained(tmp_path / "moe", max_shard_size="100KB")
    assert len(list((tmp_path / "moe").glob("*.safetensors"))) > 1
    stacking.stack_checkpoint(tmp_path / "moe", tmp_path / "stack", factor=2)
    grown = MixtralForCausalLM.from_pretrained(tmp_path / "stack")
    for layer in range(4):
        for copied, original in zip(
            grown.model.layers[layer].parameters(),
            model.model.layers[layer % 2].parameters(),
            strict=True,
        ):
            assert torch.equal(copied, original)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_the_stack_of_any_such_decoder_is_what_transformers_loads(tmp_path, family):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    small = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)
    small.save_pretrained(tmp_path / "source")
    stacking.stack_checkpoint(tmp_path / "source", tmp_path / "stack", factor=2)
    stacking.verify_stack(tmp_path / "source", tmp_path / "stack")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "stack", output_loading_info=True
    )
    assert (
        not info["missing_keys"] and not info["unexpected_keys"] and loaded.dtype == torch.bfloat16
    )
    for layer, block in enumerate(loaded.model.layers):
        for copied, original in zip(
            block.parameters(), small.model.layers[layer % 2].parameters(), strict=True
        ):
            assert torch.equal(copied, original)


@pytest.mark.parametrize("head", ["the same", "another"])
def test_parameters_are_those_that_the_loaded_model_has(tmp_path, head):
    profile = small_profile(tied_embeddings=True)
    model = decoder.build_model(profile)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (head == "another")
    buffers = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)
    }
    save_file(
        tensors | buffers,
        _folder_of(model, tmp_path / "source") / "model.safetensors",
        {"format": "pt"},
    )
    summary = stacking.stack_checkpoint(tmp_path / "source", tmp_path / "stack", factor=2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stack")
    assert summary.parameters == sum(parameter.numel() for parameter in loaded.parameters())
    stacking.verify_stack(tmp_path / "source", tmp_path / "stack")


@pytest.mark.parametrize("order", ["cyclic", "interpolated"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("Gemma2", {"sliding_window": 8}),
    ],
)
def test_a_copy_attends_as_its_source_does_also_where_the_config_leaves_that_to_the_family(
    tmp_path, family, settings, order
):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        **settings,
    )
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path / "source")
    written = json.loads((tmp_path / "source" / "config.json").read_text())
    del written["layer_types"]
    (tmp_path / "source" / "config.json").write_text(json.dumps(written))
    summary = stacking.stack_checkpoint(
        tmp_path / "source", tmp_path / "stack", factor=2, order=order
    )
    small, large = (
        transformers.AutoConfig.from_pretrained(tmp_path / name).layer_types
        for name in ("source", "stack")
    )
    assert large == [small[block] for block in summary.block_sources]
    stacking.verify_stack(tmp_path / "source", tmp_path / "stack")


def test_a_config_gains_nothing_that_it_does_not_need(source, stacked):
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (source, stacked)
    )
    assert after == before | {"num_hidden_layers": 4}


def test_zero_initialised_copies_compute_what_the_source_does(source, tmp_path):
    stacking.stack_checkpoint(source, tmp_path / "stack", factor=3, order="zero_initialised")
    stacking.verify_stack(source, tmp_path / "stack")
    tokens = torch.randint(0, 512, (2, 16))
    small, large = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "stack")
    )
    assert torch.equal(large(tokens).logits, small(tokens).logits)
    assert large.model.layers[2].mlp.up_proj.weight.abs().sum() > 0, (
        "only what writes into the residual stream is zero"
    )


def test_zero_initialised_experts_compute_what_the_source_does(tmp_path):
    profile = small_profile(experts=4, active_experts=2, tied_embeddings=False)
    decoder.build_model(profile).save_pretrained(tmp_path / "moe")
    stacking.stack_checkpoint(
        tmp_path / "moe", tmp_path / "stack", factor=2, order="zero_initialised"
    )
    tokens = torch.randint(0, 512, (2, 16))
    small, large = (
        MixtralForCausalLM.from_pretrained(tmp_path / name) for name in ("moe", "stack")
    )
    assert torch.equal(large(tokens).logits, small(tokens).logits)


def test_noise_is_a_share_of_each_matrix_and_the_same_seed_gives_the_same(source, tmp_path):
    summary = stacking.stack_checkpoint(source, tmp_path / "stack", factor=2, noise=0.2, seed=3)
    assert list(summary.block_sources) == [0, 1, 0, 1] and summary.noise == 0.2
    stacking.verify_stack(source, tmp_path / "stack")
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "stack" / "model.safetensors"),
    )
    original = before["model.layers.1.mlp.up_proj.weight"]
    noise = [
        (after[f"model.layers.{layer}.mlp.up_proj.weight"] - 0.8 * original) / 0.2
        for layer in (1, 3)
    ]
    assert noise[0].std() == pytest.approx(original.std().item(), rel=0.1)
    correlation = torch.corrcoef(
        torch.stack([original.flatten(), *(part.flatten() for part in noise)])
    )
    assert (correlation - torch.eye(3)).abs().max() < 0.1, (
        "copies get noise of their own, independent of the weight"
    )
    assert torch.equal(
        after["model.layers.2.input_layernorm.weight"],
        before["model.layers.0.input_layernorm.weight"],
    )
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    stacking.stack_checkpoint(source, tmp_path / "again", factor=2, noise=0.2, seed=3)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in after.items())
    with pytest.raises(ValueError, match="already holds"):
        stacking.stack_checkpoint(source, tmp_path / "stack", factor=2, noise=0.2, seed=4)


def test_random_blocks_are_those_of_a_fresh_model(source, tmp_path):
    summary = stacking.stack_checkpoint(source, tmp_path / "stack", factor=3, order="random")
    assert list(summary.block_sources) == [0, 1, -1, -1, -1, -1]
    stacking.verify_stack(source, tmp_path / "stack")
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "stack" / "model.safetensors"),
    )
    drawn = [after[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (2, 3)]
    fresh = decoder.build_model(small_profile(layers=6)).model.layers[2].mlp.up_proj.weight
    assert drawn[0].std() == pytest.approx(fresh.std().item(), rel=0.1) and not torch.equal(*drawn)
    assert (after["model.layers.4.input_layernorm.weight"] == 1).all()
    assert torch.equal(
        after["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"]
    )


def test_what_is_no_weight_is_copied_and_other_formats_of_the_weights_are_not(source, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "notes.txt"):
        (folder / name).write_bytes(b"x")
    summary = stacking.stack_checkpoint(folder, tmp_path / "stack", factor=2)
    names = {path.name for path in (tmp_path / "stack").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "notes.txt", "stack.json"} <= names
    assert not names & {
        "pytorch_model.bin",
        "consolidated.safetensors",
        "README.md",
        "training_state",
    }
    assert summary.source_sha256.keys() == {"model.safetensors"}


def test_sources_that_cannot_be_stacked_are_refused_with_the_reason(tmp_path):
    gpt2 = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    model = decoder.build_model(small_profile())
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    torch.save(model.state_dict(), _folder_of(model, tmp_path / "bin") / "pytorch_model.bin")
    tensors = dict(model.state_dict())
    tensors.pop("lm_head.weight")
    odd = {**tensors, "model.layers.1.mlp.up_proj.bias": torch.zeros(64)}
    save_file(odd, _folder_of(model, tmp_path / "odd") / "model.safetensors")
    quantised = {
        name: tensor.to(torch.int8) if "mlp" in name else tensor for name, tensor in tensors.items()
    }
    save_file(quantised, _folder_of(model, tmp_path / "int8") / "model.safetensors")
    for name, words in (
        ("gpt2", r"gpt2 with tensors like transformer\.h"),
        ("shards", "lacks the .safetensors shard model-00002"),
        ("bin", "holds pytorch_model.bin"),
        ("odd", "not of one kind"),
        ("int8", "type I8, .* stack the original"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            stacking.stack_checkpoint(tmp_path / name, tmp_path / "target")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "target").exists()


def _folder_of(model, folder):
    model.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "tensor", "words"),
    [
        ({}, "model.norm.weight", r"lacks 1 tensor \(model\.norm\.weight\)"),
        ({}, "model.embed_tokens.weight", r"lacks .*model\.embed_tokens\.weight"),
        ({"num_hidden_layers": "2"}, "", "num_hidden_layers '2'"),
        (
            {"layer_types": ["full_attention"]},
            "",
            "has no list of 2 layer_types, one for each layer, in config.json",
        ),
        ({"num_hidden_layers": None}, "", "num_hidden_layers None"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "",
            "quantization_config in config.json; stack the original",
        ),
    ],
)
def test_a_source_that_could_not_work_is_refused(source, tmp_path, settings, tensor, words):
    shutil.copytree(source, tmp_path / "source")
    _set(tmp_path / "source" / "config.json", **settings)
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors.pop(tensor, None)
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        stacking.stack_checkpoint(tmp_path / "source", tmp_path / "target", factor=2)
    assert not (tmp_path / "target").exists()


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
        (source, 2, "zero_initialised", "for cyclic or interpolated"),
    ):
        with pytest.raises(ValueError, match=words):
            stacking.stack_checkpoint(
                folder,
                tmp_path / "target",
                factor,
                order,
                noise=0.5 * (order == "zero_initialised"),
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_a_stack_that_the_disk_or_the_format_could_not_hold_is_refused_before_it_is_planned(
    source, tmp_path, monkeypatch
):
    monkeypatch.setattr(stacking, "block_order", None)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="already holds something else"):
        stacking.stack_checkpoint(source, tmp_path / "there", factor=10**12)
    size = (source / "model.safetensors").stat().st_size
    for free, factor, words in (
        (
            10**12,
            10**12,
            (
                r"factor 1000000000000 makes a checkpoint of .* GB .* 1,000\.0 GB left; choose a"
                r" smaller factor"
            ),
        ),
        (size, 2, r"factor 2 makes a checkpoint of 0\.\d GB"),
        (
            10**30,
            10**5,
            "factor 100000 makes 1,800,00. tensors, more than a safetensors file can name",
        ),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with pytest.raises(ValueError, match=words):
            stacking.stack_checkpoint(source, tmp_path / "new" / "target", factor=factor)
    assert not (tmp_path / "new").exists()


def test_verify_finds_a_changed_byte(source, tmp_path):
    target = tmp_path / "stack"
    stacking.stack_checkpoint(source, target, factor=2)
    content = bytearray((target / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (target / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"is not what .*; remove .*stack and stack again"):
        stacking.verify_stack(source, target)


@pytest.fixture(scope="module")
def stacked(source, tmp_path_factory):
    """A stack of factor 2, with 4 layers."""
    folder = tmp_path_factory.mktemp("stacked") / "stack"
    stacking.stack_checkpoint(source, folder, factor=2)
    return folder


def _set(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "num_hidden_layers", 3),
        ("config.json", "rope_parameters", {"rope_type": "default", "rope_theta": 7.0}),
        ("config.json", "quantization_config", {"quant_method": "foo"}),
        ("stack.json", "order", "interpolated"),
        ("stack.json", "order", "foo"),
        ("stack.json", "factor", 7),
        ("stack.json", "factor", 10**12),
        ("stack.json", "factor", "two"),
        ("stack.json", "noise", 0.1),
        ("stack.json", "source_sha256", {"model.safetensors": "0" * 64}),
        ("stack.json", "source_layers", 3),
        ("stack.json", "parameters", 1),
        ("stack.json", "block_sources", [0, 1, 0, 9]),
        ("stack.json", "block_sources", [0, 1, 0]),
        ("stack.json", "block_sources", None),
    ],
)
def test_verify_refuses_a_stack_whose_files_say_something_else(
    source, stacked, tmp_path, file, key, value
):
    shutil.copytree(stacked, tmp_path / "stack")
    stacking.verify_stack(source, tmp_path / "stack")
    _set(tmp_path / "stack" / file, **{key: value})
    with pytest.raises(ValueError, match=r"; remove .*stack and stack again\.$") as caught:
        stacking.verify_stack(source, tmp_path / "stack")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["block_sources", "factor", "noise", "source_sha256", "parameters"])
def test_verify_refuses_a_stack_whose_record_lacks_something(source, stacked, tmp_path, key):
    shutil.copytree(stacked, tmp_path / "stack")
    record = json.loads((stacked / "stack.json").read_text())
    del record[key]
    (tmp_path / "stack" / "stack.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"it has no {key}"):
        stacking.verify_stack(source, tmp_path / "stack")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, r"holds no config\.json"),
        ("config.json", b"[]", "no JSON object"),
        ("model.safetensors", b"", "cut off or damaged"),
        ("model.safetensors", b"garbage" * 99, "cut off or damaged"),
        ("model.safetensors", None, "no weights"),
    ],
)
def test_verify_refuses_a_damaged_stack_in_one_sentence(
    source, stacked, tmp_path, file, content, words
):
    shutil.copytree(stacked, tmp_path / "stack")
    (tmp_path / "stack" / file).unlink()
    if content is not None:
        (tmp_path / "stack" / file).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        stacking.verify_stack(source, tmp_path / "stack")


def test_what_is_no_stack_is_not_verified(source):
    with pytest.raises(ValueError, match=r"holds no stack\.json, so it is no stack"):
        stacking.verify_stack(source, source)


def test_a_stacked_model_runs_at_the_profiles_shape(source, tmp_path):
    stacking.stack_checkpoint(source, tmp_path / "stack", factor=2)
    config = json.loads((tmp_path / "stack" / "config.json").read_text())
    decoder.check_fits(config, small_profile(layers=4, growth_factor=2), tmp_path / "stack")
