from __future__ import annotations

import dataclasses
import json
import math

import pytest

from kl3m_nb import profiles
from kl3m_nb.profiles import (
    PROFILES,
    get_profile,
    override_profile,
    profile_from_dict,
    profile_with,
    source_profile,
)


def test_the_cards_numbers():
    grown = get_profile("kl3m-007-500m")
    assert grown.muon_lr == pytest.approx(0.00365, abs=5e-6)
    assert grown.tokens_per_step == 655_360
    assert (grown.clamp.max_condition("q_proj"), grown.clamp.max_condition("up_proj")) == (
        3000,
        2000,
    )
    assert source_profile(grown).model == get_profile("kl3m-006-170m").model
    assert grown.data.seq_len + 1 == 4097
    window = get_profile("kl3m-002-520m").model
    assert (window.experts, window.active_experts, window.sliding_window) == (4, 2, 256)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_survives_json(name):
    profile = get_profile(name)
    assert profile_from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


def test_one_keyword_changes_one_field_wherever_it_stands():
    base = get_profile("tiny-moe")
    for key, section in profiles.FIELD_SECTIONS.items():
        owner = base if section == "profile" else getattr(base, section)
        value = getattr(owner, key)
        bound = (
            "heads",
            "kv_heads",
            "layers",
            "growth_factor",
            "seq_len",
            "context",
            "p_sft",
            "ns_steps",
            "head_size",
            "hidden",
            "mlp",
        )
        if key in bound or isinstance(value, (str, bool)):
            continue
        changed = override_profile(
            base, **{key: value / 2 if isinstance(value, float) else value + 1}
        )
        differing = [
            field.name
            for field in dataclasses.fields(profiles.Profile)
            if getattr(changed, field.name) != getattr(base, field.name)
        ]
        assert differing == [key if section == "profile" else section]


def test_zero_and_empty_leave_a_notebooks_parameter_at_the_profiles_value():
    assert profile_with("tiny", max_steps=0, source="", base_lr=0.0) == get_profile("tiny")
    assert profile_with("tiny", max_steps=5).schedule.max_steps == 5
    assert profile_with("kl3m-002-520m", packing="", p_sft=-1.0) == get_profile("kl3m-002-520m")
    dense = profile_with("kl3m-002-520m", packing="dense", p_sft=0.0).data
    assert (dense.packing, dense.p_sft) == (
        "dense",
        0.0,
    ), "no instruction pairs can be asked for, which dense windows need"


def test_the_source_of_a_profile_is_shallower_and_nothing_else():
    target = get_profile("tiny")
    source = source_profile(target)
    assert source.model.layers * target.growth_factor == target.model.layers
    assert dataclasses.replace(source.model, layers=target.model.layers) == target.model
    assert source.muon_lr == pytest.approx(target.muon_lr * math.sqrt(target.growth_factor))
    assert source_profile(source) == source


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("kl3m-500", {}, "kl3m-007-500m"),
        ("tiny", {"max_step": 5}, r"no field 'max_step' \(did you mean max_steps"),
        ("tiny", {"foo": 1}, "no field 'foo'; it has activation_norm, "),
        ("tiny", {"name": "x"}, "no field 'name'"),
        ("tiny", {"profile": "x"}, "no field 'profile'"),
        ("tiny", {"seed": 10**23}, r"'seed' is 1\d+; a whole number must be below"),
        ("tiny", {"base_lr": 10**400}, "of type float"),
        ("tiny", {"hidden": 129}, "hidden 129 is not a multiple of 4 heads"),
        ("tiny", {"head_size": 31}, "choose an even one"),
        ("tiny-moe", {"head_size": 31}, "choose an even one"),
        ("tiny-moe", {"hidden": 129}, "hidden is 129; .* multiples of 4"),
        ("tiny-moe", {"mlp": 178}, "mlp is 178; .* multiples of 4"),
        ("tiny", {"max_steps": 1.5}, "int"),
        ("tiny", {"max_steps": True}, "int"),
        ("tiny", {"base_lr": "1e-4"}, "float"),
        ("tiny", {"seq_len": 512}, "256"),
        ("tiny", {"layers": 10}, "growth_factor"),
        ("tiny", {"clip_mode": "soft"}, "adaptive"),
        ("tiny", {"micro_batch": 0}, "at least 1"),
        ("tiny", {"kv_heads": 3}, "kv_heads"),
        ("tiny", {"p_sft": 0.1}, "segments"),
        ("tiny", {"p_sft": 1.5, "packing": "segments"}, "between 0 and 1"),
        ("tiny", {"sft_loss": "all", "packing": "segments"}, "raise p_sft"),
        ("tiny", {"document_borders": "mask", "packing": "segments"}, "never hold two documents"),
        ("tiny", {"document_borders": "positions"}, "'positions' .* is gone; take 'mask'"),
        ("tiny", {"entropy_target_over": "step"}, "token, batch"),
        ("tiny", {"prefetch_batches": -1}, "at least 0"),
        ("tiny", {"sliding_window": 64}, "sliding_window is 64 without experts"),
        ("tiny", {"router_aux_loss": 0.05}, "router_aux_loss is 0.05 without experts"),
        ("tiny", {"active_experts": 2}, "active_experts is 2 without experts"),
        ("tiny-moe", {"active_experts": 5}, "active_experts is 5 of 4 experts; choose from 1 to 4"),
        ("tiny-moe", {"active_experts": 0}, "from 1 to 4"),
        ("tiny", {"momentum": 1.0}, "below 1"),
        ("tiny", {"base_lr": math.inf}, "finite"),
        ("tiny", {"aux_lr": math.nan}, "finite"),
        ("tiny", {"mlp_max_condition": math.inf}, "finite"),
        ("tiny", {"clip_coefficient": 0.0}, "above 0"),
        ("tiny", {"ns_steps": 2}, "from 3 to 5"),
    ],
)
def test_bad_values_get_one_sentence_that_names_what_is_accepted(name, overrides, words):
    with pytest.raises(ValueError, match=words) as caught:
        get_profile(name, **overrides)
    assert "\n" not in str(caught.value)


def _numeric_fields() -> list[str]:
    return [key for key, kind in profiles.FIELD_TYPES.items() if kind in (int, float)]


@pytest.mark.parametrize("key", _numeric_fields())
def test_no_number_may_be_negative_or_absurdly_small(key):
    with pytest.raises(ValueError, match=rf"The profile field '{key}' is -1(\.0)?; it must be "):
        get_profile("tiny", **{key: -1})
