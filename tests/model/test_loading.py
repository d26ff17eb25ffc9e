"""Loading is checked: whatever transformers would draw at random, leave out or cannot build is an
error that names it.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from kl3m_nb.growth import stacking
from kl3m_nb.model import decoder, loading
from kl3m_nb.training import loop
from tests.conftest import small_profile


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small Llama and a small Mixtral, saved by transformers."""
    folder = tmp_path_factory.mktemp("whole")
    for name, experts in (("dense", 0), ("mixture", 4)):
        decoder.build_model(
            small_profile(experts=experts, active_experts=experts // 2)
        ).save_pretrained(folder / name)
    return folder


def changed(folder, target, change):
    """A copy of `folder` whose tensors `change` has gone through."""
    shutil.copytree(folder, target)
    save_file(
        change(load_file(folder / "model.safetensors")),
        target / "model.safetensors",
        {"format": "pt"},
    )
    return target


def renamed(old, new):
    return lambda tensors: {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


FAULTS = {
    "compiled": (renamed("", "_orig_mod."), ["_orig_mod.", "remove"]),
    "compiled blocks": (renamed("layers.1.", "layers.1._orig_mod."), ["_orig_mod.", "remove"]),
    "DDP": (renamed("", "module."), ["'module.'", "remove"]),
    "PEFT": (renamed("", "base_model.model."), ["base_model.model.", "remove"]),
    "another family's names": (
        renamed("model.layers", "transformer.h"),
        ["lacks", "model.layers.0.", "transformer.h.0."],
    ),
    "a lost layer": (without("layers.1."), ["lacks 9 tensors", "model.layers.1."]),
    "no final norm": (without("model.norm"), ["lacks 1 tensor (model.norm.weight)"]),
    "no embedding": (without("embed_tokens"), ["model.embed_tokens.weight"]),
    "one too many": (
        lambda t: t | {"model.layers.2.mlp.up_proj.weight": torch.ones(2)},
        ["model.layers.2.mlp.up_proj.weight"],
    ),
    "another shape": (
        lambda t: t | {"model.norm.weight": torch.ones(3)},
        ["model.norm.weight of shape [3]", "[32]"],
    ),
}


@pytest.mark.parametrize("kind", ["dense", "mixture"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_the_models_is_named_whether_weights_or_only_headers_are_read(
    folders, tmp_path, kind, fault
):
    change, words = FAULTS[fault]
    folder = changed(folders / kind, tmp_path / "other", change)
    for load in (decoder.load_model, loading.check_loads):
        with pytest.raises(ValueError) as caught:
            load(folder)
        assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_lost_expert_is_an_error(folders, tmp_path):
    lost = next(
        name
        for name in load_file(folders / "mixture" / "model.safetensors")
        if "experts.1.w1" in name
    )
    folder = changed(folders / "mixture", tmp_path / "other", without(lost))
    for load in (decoder.load_model, loading.check_loads):
        with pytest.raises(ValueError, match=r"experts of .* cannot be put together"):
            load(folder)


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_what_old_files_and_ties_leave_out_or_add_is_no_fault(folders, tmp_path, kind):
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder = changed(folders / kind, tmp_path / "old", lambda t: without("lm_head")(t) | buffers)
    loaded = decoder.load_model(folder)
    loading.check_loads(folder)
    reference = AutoModelForCausalLM.from_pretrained(folders / kind)
    tokens = torch.arange(8)[None]
    if loaded.config.tie_word_embeddings:
        assert torch.equal(loaded(tokens).logits, reference(tokens).logits)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "32"),
        ("num_hidden_layers", [2]),
        ("num_attention_heads", 0),
        ("rope_parameters", 5),
        ("hidden_act", "no"),
        ("model_type", "no"),
        ("vocab_size", -3),
        ("intermediate_size", None),
        ("tie_word_embeddings", "yes"),
        ("rms_norm_eps", "x"),
    ],
)
def test_a_forged_config_is_one_sentence_for_training_and_for_stacking(
    folders, tmp_path, key, value
):
    folder = shutil.copytree(folders / "dense", tmp_path / "forged")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    for use in (
        decoder.load_model,
        loading.check_loads,
        lambda start: stacking.stack_checkpoint(start, tmp_path / "stack", factor=2),
        lambda start: loop.train(small_profile(), tmp_path / "run", init=start),
    ):
        with pytest.raises(ValueError) as caught:
            use(folder)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "stack").exists() and not (tmp_path / "run").exists()


def test_a_run_does_not_begin_from_tensors_that_are_not_the_models(folders, tmp_path):
    folder = changed(folders / "dense", tmp_path / "start", renamed("", "_orig_mod."))
    with pytest.raises(ValueError, match="_orig_mod"):
        loop.train(small_profile(), tmp_path / "run", init=folder)
    assert not (tmp_path / "run").exists()


SHAPE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
LLAMA4 = dict(
    num_local_experts=4,
    num_experts_per_tok=1,
    intermediate_size_mlp=48,
    interleave_moe_layer_step=1,
)
ERNIE = dict(
    moe_num_experts=4,
    moe_k=2,
    moe_intermediate_size=16,
    moe_layer_start_index=0,
    moe_num_shared_experts=1,
)
QWEN = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0, 1, 2]
)


@pytest.mark.parametrize("order", ["cyclic", "interpolated"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama4_text", LLAMA4),  # moe_layers, no_rope_layers
        ("ernie4_5_moe", ERNIE),  # moe_layer_end_index
        ("qwen3_moe", QWEN),  # mlp_only_layers
        ("smollm3", {"no_rope_layer_interval": 2, "pad_token_id": None}),
        (
            "gemma3_text",
            {
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        ),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
def test_families_that_number_their_layers_compute_in_each_copy_what_its_source_does(
    tmp_path, family, settings, order
):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, num_hidden_layers=3, **{**SHAPE, **settings})
    small = AutoModelForCausalLM.from_config(config).eval()
    small.save_pretrained(tmp_path / "source")
    summary = stacking.stack_checkpoint(
        tmp_path / "source", tmp_path / "stack", factor=2, order=order
    )
    stacking.verify_stack(tmp_path / "source", tmp_path / "stack")
    large, info = AutoModelForCausalLM.from_pretrained(tmp_path / "stack", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # The reference: the source's own blocks one after another, in the source's own model
    blocks = small.model.layers
    tokens = torch.randint(0, 64, (2, 24))
    given = []
    hooks = [
        block.register_forward_hook(
            lambda _, args, kwargs, __: given.append((args[1:], kwargs)), with_kwargs=True
        )
        for block in blocks
    ]
    with torch.no_grad():
        small(tokens, use_cache=False)
        for hook in hooks:
            hook.remove()
        hidden = []
        large.model.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: hidden.append(args[0]), with_kwargs=True
        )
        expected = large(tokens, use_cache=False).logits
        state = hidden[0]
        for source in summary.block_sources:
            arguments, named = given[source]
            output = blocks[source](state, *arguments, **named)
            state = output[0] if isinstance(output, tuple) else output
        logits = small.lm_head(small.model.norm(state))
    torch.testing.assert_close(expected, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        (
            "diffllama",
            {},
            "diffllama.*lambda_init",
        ),  # a constant that follows from the layer's number
        ("ernie4_5_moe", {**ERNIE, "moe_layer_end_index": 1}, "not of one kind"),
        (
            "ernie4_5_moe",
            {
                **ERNIE,
                "moe_layer_interval": 1,
                "moe_layer_start_index": 3,
                "moe_layer_end_index": 4,
            },
            "layer 3",
        ),
    ],
)
def test_families_whose_layers_differ_by_number_are_refused_by_name(
    tmp_path, family, settings, words
):
    config = transformers.AutoConfig.for_model(family, num_hidden_layers=3, **{**SHAPE, **settings})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=words) as caught:
        stacking.stack_checkpoint(tmp_path / "source", tmp_path / "stack", factor=2)
    assert "\n" not in str(caught.value) and not (tmp_path / "stack").exists()


def test_verify_loads_what_it_verifies(folders, tmp_path, monkeypatch):
    """A stack that a version without the check has written: bytes and config are as stacking gives
    them, half is not found.
    """
    config = transformers.AutoConfig.for_model(
        "ernie4_5_moe", num_hidden_layers=3, **{**SHAPE, **ERNIE}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    with monkeypatch.context() as old:
        for check in ("check_loads", "check_blocks"):
            old.setattr(stacking, check, lambda *_: None)
        old.setattr(
            stacking,
            "grown_config",
            lambda config, blocks: dict(config, num_hidden_layers=len(blocks)),
        )
        stacking.stack_checkpoint(tmp_path / "source", tmp_path / "stack", factor=2)
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "stack", output_loading_info=True)
        assert info["missing_keys"]
        old.undo()
        with pytest.raises(ValueError):
            stacking.verify_stack(tmp_path / "source", tmp_path / "stack")


def test_a_check_by_headers_costs_no_memory_of_the_weights(tmp_path):
    """A stack of 2 GB is verified on a laptop: no tensor of its size may come to be."""
    made = []
    model = decoder.build_model(small_profile())
    model.save_pretrained(tmp_path)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.device.type == "cpu":
                made.append(result.untyped_storage().nbytes())
            return result

    with Watch():
        loading.check_loads(tmp_path)
    assert max(made) < model.model.embed_tokens.weight.numel()
