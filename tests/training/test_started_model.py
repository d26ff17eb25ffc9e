"""Card, estimate and windows are those of the model that is trained, where it differs from the
profile in what may differ.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from kl3m_nb import cli
from kl3m_nb.model import costs, decoder, estimate, scoring
from kl3m_nb.model.costs import run_flops
from kl3m_nb.profiles import PROFILES, get_profile
from kl3m_nb.runs.metrics import read_metrics
from kl3m_nb.training import loop
from tests.conftest import small_profile

CHANGES = {
    "context": {"max_position_embeddings": 40},
    "attention biases": {"attention_bias": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "scaled": {"rope_parameters": {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 4.0}},
}


def start(folder, **changes):
    """A random model that `small_profile` fits in all that is compared."""
    config = decoder.model_config(small_profile().model)
    for key, value in changes.items():
        setattr(config, key, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", PROFILES)
def test_the_numbers_of_a_configuration_are_those_it_was_made_from(name):
    spec = PROFILES[name].model
    assert decoder.spec_of(decoder.model_config(spec)) == spec
    other = dataclasses.replace(
        spec, tied_embeddings=not spec.tied_embeddings, context=77, initializer_range=0.5
    )
    if not spec.experts:
        other = dataclasses.replace(other, attention_bias=True, mlp_bias=True)
    assert decoder.spec_of(decoder.model_config(other)) == other


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": False},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"experts": 4, "active_experts": 2},
    ],
)
def test_parameters_by_arithmetic_are_those_of_the_model(changes):
    profile = small_profile(**changes)
    model = decoder.build_model(profile, device="meta")
    assert costs.count_parameters(profile.model).total == sum(
        parameter.numel() for parameter in model.parameters()
    )


@pytest.mark.parametrize("changed", CHANGES)
def test_the_card_states_what_the_config_does(tmp_path, changed):
    folder = start(tmp_path / "start", **CHANGES[changed])
    checkpoint = loop.train(small_profile(max_steps=1), tmp_path / "run", init=folder).checkpoint
    card, config = (
        (checkpoint / "README.md").read_text(),
        json.loads((checkpoint / "config.json").read_text()),
    )
    parameters = sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(checkpoint).parameters()
    )
    assert f"- **Parameters**: {parameters:,};" in card
    assert f"- **Context**: {config['max_position_embeddings']} tokens\n" in card
    assert ("scaled (linear, factor 4.0)" in card) == (
        config["rope_parameters"]["rope_type"] == "linear"
    )
    biased = [
        name for name, key in (("attention", "attention_bias"), ("MLP", "mlp_bias")) if config[key]
    ]
    assert (f"- **Biases**: {', '.join(biased)}\n" in card) == bool(biased) == ("Biases" in card)


def test_the_logged_operations_are_the_models(tmp_path):
    loop.train(
        small_profile(max_steps=1),
        tmp_path / "run",
        init=start(tmp_path / "start", max_position_embeddings=40),
    )
    row = read_metrics(tmp_path / "run", "held_out").iloc[-1]
    assert row.flops == run_flops(small_profile(), row.step, row.tokens)


@pytest.mark.parametrize("changed", CHANGES)
def test_an_estimate_is_of_the_model_that_is_started_from(tmp_path, changed, capsys):
    folder = start(tmp_path / "start", **CHANGES[changed])
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    profile = decoder.profile_of_start(small_profile(), folder)
    assert estimate.estimate(profile).parameters == parameters
    assert decoder.profile_of_start(small_profile(), None) == decoder.profile_of_start(
        small_profile(), tmp_path / "gone"
    )
    changes = (
        "layers 2,hidden 32,mlp 64,heads 4,kv_heads 2,head_size 8,growth_factor 1,vocabulary"
        " 512,seq_len 32"
    ).split(",")
    sets = [part for change in changes for part in ("--set", *change.split())]
    assert cli.main(["estimate", "tiny", "--init", str(folder), *sets]) == 0
    assert f"{parameters:,}" in capsys.readouterr().out
    assert cli.main(["estimate", "tiny", "--init", str(tmp_path / "gone")]) == 2


def test_a_window_longer_than_the_models_context_is_refused_before_anything_is_written(tmp_path):
    folder, profile = start(tmp_path / "start", max_position_embeddings=24), small_profile()
    said = r"seq_len 32 .* context of 24 tokens .* at most 24"
    with pytest.raises(ValueError, match=said):
        loop.train(profile, tmp_path / "run", init=folder)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=said):
        decoder.profile_of_start(profile, folder)
    with pytest.raises(ValueError, match="32 tokens to read; this model takes at most 24"):
        scoring.held_out_loss(decoder.load_model(folder), torch.zeros(1, 33, dtype=torch.int64))


def test_a_mixtures_config_has_the_weight_of_the_router_it_was_trained_with(tmp_path):
    changes = {"experts": 4, "active_experts": 2, "max_steps": 1}
    decoder.build_model(small_profile(**changes, router_aux_loss=0.001)).save_pretrained(
        tmp_path / "start"
    )
    trained = loop.train(
        small_profile(**changes, router_aux_loss=0.02), tmp_path / "run", init=tmp_path / "start"
    )
    assert (
        json.loads((trained.checkpoint / "config.json").read_text())["router_aux_loss_coef"] == 0.02
    )
    assert "router loss weight 0.02" in (trained.checkpoint / "README.md").read_text()


def test_a_mixture_has_no_biases():
    for key in ("attention_bias", "mlp_bias"):
        with pytest.raises(ValueError, match=f"{key} is true with 4 experts"):
            get_profile("tiny-moe", **{key: True})
