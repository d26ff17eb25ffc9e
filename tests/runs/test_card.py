from __future__ import annotations

import ast
import dataclasses
import re

import pytest
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError

from kl3m_nb.optim.model_clamp import ClampConditions, GroupConditions
from kl3m_nb.profiles import PROFILES, get_profile, source_profile
from kl3m_nb.runs import card, lineage
from tests.conftest import model_card

SECTIONS = [
    "Model Details",
    "Training Progress",
    "Model Architecture",
    "G_stack",
    "Training Configuration",
    "Training Details",
    "Spectra",
    "Usage",
    "Generation",
    "Limitations",
    "Citation",
    "License",
]
FACTS = card.CardFacts(
    counts=lineage.Counts(37_000, 3_917_824_000, 3_914_825_728),
    init="runs/kl3m-007-500m-stack/checkpoint",
    runtime="NVIDIA H200",
    held_out_loss=2.6123,
    cross_entropy=2.5,
    conditions=ClampConditions(
        37_000,
        {
            "attention": GroupConditions(480, 200, 90, 280, 2168.0, 2501.0),
            "MLP": GroupConditions(360, 0, 0, 360),
        },
    ),
    stack={
        "source": "/home/somebody/kl3m-006-170m",
        "factor": 4,
        "order": "cyclic",
        "noise": 0.0,
        "source_layers": 30,
        "source_sha256": {"model.safetensors": "abc"},
    },
)

SCRATCH = card.CardFacts(lineage.Counts(200, 409_600, 409_600), "random weights", "CPU")


def test_the_card_of_the_500m_has_the_familys_sections_and_figures():
    text = model_card(get_profile("kl3m-007-500m"), FACTS)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    for figure in (
        "# kl3m-007-500m-step37000",
        "500,309,568; 424,812,096 without embedding",
        "37,000 / 100,000 planned",
        "3,917,824,000",
        "3,914,825,728",
        "9 (3 KV heads, 64 each)",
        "RoPE theta**: 100,000",
        "0.0036515 = 0.01 × √(16/120)",
        "3000 (attention)",
        "2000 (MLP)",
        "655,360 tokens a step",
        "| attention | 200 of 480 | 2,168.0 | 2,501.0 | 280 |",
        "2.6123 nats per token",
        "temperature 0.8",
        "4 times the 30 blocks",
        "copied once, nothing was rescaled",
        "grown from 30 layers by stacking",
        "SHA-256 of model.safetensors**: abc",
        "arXiv:2405.15319",
        "cosine to 0.1",
    ):
        assert figure in text, figure
    assert "- **Source**: kl3m-006-170m\n" in text and "somebody" not in text


def test_the_mixtures_card_speaks_of_experts_and_not_of_stacking():
    text = model_card(get_profile("kl3m-002-520m"), SCRATCH)
    assert (
        "4 per layer, 2 active" in text
        and "318,866,432 active per token" in text
        and "temperature 0.5" in text
    )
    assert "sliding window 256" in text and "G_stack" not in text and "gstack2024" not in text
    assert (
        "padded segments, `<|start|>` and `<|end|>` at a document's own borders" in text
        and "after each document" not in text
    )


@pytest.mark.parametrize(
    ("name", "advised", "prose"),
    [
        (
            "kl3m-007-500m",
            {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 100},
            "temperature 0.8, top-p 0.95, repetition penalty 1.0.",
        ),
        (
            "kl3m-002-520m",
            {"do_sample": True, "temperature": 0.5, "max_new_tokens": 32},
            "temperature 0.5 alone.",
        ),
    ],
)
def test_it_advises_what_the_familys_card_does_and_shows_the_same_in_code(name, advised, prose):
    text = model_card(get_profile(name), SCRATCH)
    assert f"Recommended sampling: {prose}\n" in text
    of_pipeline, of_model = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    for code, function in ((of_pipeline, "generator"), (of_model, "model.generate")):
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        [call] = [node for node in calls if ast.unparse(node.func) == function]
        assert {
            word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg
        } == advised


def test_the_share_of_instruction_pairs_is_named_where_there_are_any():
    assert get_profile("kl3m-002-520m").data.p_sft == 0.1
    for changes, said in (
        (
            {},
            "own borders; 10% of the segments are instruction pairs, trained on their responses\n",
        ),
        (
            {"p_sft": 0.005, "sft_loss": "all"},
            "; 0.5% of the segments are instruction pairs, trained on all their tokens\n",
        ),
        ({"p_sft": 0.0}, "own borders\n"),
    ):
        text = model_card(get_profile("kl3m-002-520m", **changes), SCRATCH)
        assert said in text and ("instruction pairs" in text) == ("instruction pairs" in said)


def test_a_model_from_scratch_is_not_called_grown():
    """The comparison of notebook 05 trains a profile that says how it is grown from
    random weights.
    """
    text = model_card(get_profile("tiny"), SCRATCH)
    assert get_profile("tiny").growth_factor == 4 and "random weights" in text
    for word in ("grown", "stack", "copied", "rescaled", "2405.15319"):
        assert word not in text.lower()


@pytest.mark.parametrize(
    ("stack", "said", "not_said"),
    [
        (
            {"noise": 0.2},
            "every matrix of the copied blocks was mixed with 20% of noise",
            "nothing was rescaled",
        ),
        (
            {"order": "zero_initialised"},
            "o_proj and down_proj of all blocks after the first 30 were set to zero",
            "rescaled",
        ),
        (
            {"order": "random"},
            "The first 30 of its 120 blocks are its source's, the others were drawn at random",
            "4 times",
        ),
        ({"order": "random"}, "grown from 30 layers by random blocks", "by stacking"),
        ({"factor": 1}, "120 layers, after", "grown"),
    ],
)
def test_the_card_tells_how_the_stack_was_made(stack, said, not_said):
    text = model_card(
        get_profile("kl3m-007-500m"), dataclasses.replace(FACTS, stack={**FACTS.stack, **stack})
    )
    assert said in text and not_said not in text


def test_a_continued_model_of_the_family_is_a_grown_one_of_which_no_more_is_known():
    start = "alea-institute/kl3m-007-500m-step37000"
    continued = dataclasses.replace(FACTS, init=start, stack={"source_layers": 30, "factor": 4})
    text = model_card(get_profile("kl3m-007-500m"), continued)
    assert (
        "grown from 30 layers by stacking" in text
        and "4 times the 30 blocks" in text
        and "g_stack" in text
    )
    assert "rescaled" not in text and "copied once" not in text
    random = dataclasses.replace(continued, stack={**continued.stack, "order": "random"})
    text = model_card(get_profile("kl3m-007-500m"), random)
    assert (
        "grown from 30 layers by random blocks" in text
        and "The first 30 of its 120 blocks are its source's" in text
    )


def test_a_start_is_not_called_grown_for_its_name():
    """Every model that the project exports is named like the family's, those from random weights
    too.
    """
    continued = dataclasses.replace(SCRATCH, init="models/tiny-step4")
    text = model_card(get_profile("tiny"), continued)
    assert "models/tiny-step4" in text
    for word in ("grown", "stack", "2405.15319"):
        assert word not in text.lower()


@pytest.mark.parametrize(
    ("profile", "name"),
    [
        (get_profile("kl3m-007-500m"), "kl3m-007-500m-step5"),
        (
            source_profile(get_profile("kl3m-007-500m")),
            "kl3m-006-170m-step5",
        ),  # as the family calls it
        (
            source_profile(get_profile("kl3m-007-500m", growth_factor=2)),
            "kl3m-007-500m-60-layers-step5",
        ),
        (get_profile("tiny", max_steps=9, seed=3), "tiny-step5"),
        (source_profile(get_profile("tiny")), "tiny-3-layers-step5"),
        (source_profile(get_profile("tiny-moe")), "tiny-moe-2-layers-step5"),
    ],
)
def test_a_model_and_the_source_it_is_grown_from_have_names_of_their_own(profile, name):
    assert card.published_name(profile, 5) == name
    facts = dataclasses.replace(SCRATCH, counts=lineage.Counts(5, 10, 10))
    assert f"\n# {name}\n" in model_card(profile, facts)


@pytest.mark.parametrize("name", PROFILES)
def test_its_metadata_is_yaml_and_its_code_is_python(name):
    text = model_card(get_profile(name), card.CardFacts(lineage.Counts(), "random weights", "CPU"))
    metadata = yaml.safe_load(text.split("---")[1])
    assert (
        metadata["model_name"] == f"{name}-step0" and metadata["pipeline_tag"] == "text-generation"
    )
    for code in re.findall(r"```python\n(.+?)```", text, re.DOTALL):
        compile(code, "card", "exec")
    assert (
        "not measured yet" in text
        and "nan" not in text
        and "condition of the weight matrices is not known" in text
    )


def test_the_card_says_of_conditions_what_the_clamp_knew_and_when():
    text = model_card(get_profile("kl3m-007-500m"), FACTS)
    assert (
        "as the clamp of step 37,000 left them:" in text
        and "| MLP | 0 of 360 | – | – | all |" in text
    )
    assert (
        "Of the measured conditions 90 are estimates from below" in text and "all zero" not in text
    )
    groups = {"MLP": GroupConditions(360, 357, 0, 0, 4.0, 5.0)}
    later = dataclasses.replace(FACTS, conditions=ClampConditions(36_900, groups))
    text = model_card(get_profile("kl3m-007-500m"), later)
    assert (
        "as the clamp of step 36,900 left them, 100 training steps before this checkpoint:" in text
    )
    assert "| MLP | 357 of 360 | 4.0 | 5.0 | 0 |" in text and "estimates" not in text
    assert "Matrices that are all zero and have no condition: 3." in text


def test_what_a_card_says_is_what_continuing_from_it_counts_on(tmp_path):
    folder = tmp_path / card.published_name(get_profile("kl3m-007-500m"), 37_000)
    folder.mkdir()
    (folder / "README.md").write_text(model_card(get_profile("kl3m-007-500m"), FACTS))
    assert lineage.carried_counts(folder) == FACTS.counts


@pytest.mark.parametrize(
    "text",
    [
        "  • Tokens Processed: 3,917,824,000 (~3.92B)\n  • Valid Tokens: 3,914,825,728",
        "- **Tokens processed:** 3917824000\nvalid tokens: 3914825728",
    ],
)
def test_counts_are_read_from_the_familys_cards(tmp_path, text):
    folder = tmp_path / "kl3m-007-500m-checkpoint-37000"
    folder.mkdir()
    (folder / "README.md").write_text(text)
    assert lineage.carried_counts(folder) == FACTS.counts


def test_any_other_start_is_a_beginning(tmp_path):
    for init in (
        None,
        tmp_path / "stack" / "checkpoint",
        "alea-institute/kl3m-007-500m-step0",
        tmp_path / "step-000100",
    ):
        assert lineage.carried_counts(init) == lineage.Counts()


def test_a_card_that_does_not_name_its_tokens_is_refused(tmp_path):
    folder = tmp_path / "model-step5"
    folder.mkdir()
    for text in (None, "# A card\n"):
        if text:
            (folder / "README.md").write_text(text)
        with pytest.raises(ValueError, match="no line 'Tokens Processed"):
            lineage.carried_counts(folder)


def test_the_hub_is_asked_for_the_card_of_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("Tokens Processed: 7")
    asked = []
    monkeypatch.setattr(
        lineage,
        "hf_hub_download",
        lambda *arguments: asked.append(arguments) or str(tmp_path / "README.md"),
    )
    assert lineage.carried_counts("alea-institute/kl3m-007-500m-step37000") == lineage.Counts(
        37_000, 7, 7
    )
    assert asked == [("alea-institute/kl3m-007-500m-step37000", "README.md")]


def test_a_card_that_cannot_be_reached_is_not_taken_for_one_without_tokens(monkeypatch):
    def offline(*_):
        raise LocalEntryNotFoundError("offline, and nothing is kept")

    monkeypatch.setattr(lineage, "hf_hub_download", offline)
    with pytest.raises(
        ValueError, match="The card of alea-institute/kl3m-007-500m-step37000 cannot be reached"
    ):
        lineage.carried_counts("alea-institute/kl3m-007-500m-step37000")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("alea-institute/kl3m-006-170m", "alea-institute/kl3m-006-170m"),
        ("runs/demo-stack/checkpoint", "runs/demo-stack/checkpoint"),
        ("/home/me/runs/demo-stack/checkpoint", "demo-stack/checkpoint"),
        (
            "/home/me/runs/demo-source/checkpoints/step-000030",
            "demo-source/checkpoints/step-000030",
        ),
        ("/home/me/models/kl3m-006-170m", "kl3m-006-170m"),
    ],
)
def test_a_path_is_shown_without_its_place_and_with_its_run(name, shown):
    assert card.public_name(name) == shown
