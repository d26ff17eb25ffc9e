"""What is done with the families of transformers: our losses are their own, a stack is whole, and
the table says so.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from kl3m_nb.evaluation import generation
from kl3m_nb.jupyter import prompt_box
from kl3m_nb.model import decoder, logits, scoring
from kl3m_nb.profiles import get_profile
from tests.model.families import BEST_KNOWN, TABLE, all_verdicts, judge, small_config, table


def written() -> dict[str, list[str]]:
    """The rows of docs/families.md by family."""
    rows = [
        line.strip("| ").split(" | ")
        for line in TABLE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    return {family: columns for family, *columns in rows}


@pytest.mark.parametrize("family", BEST_KNOWN)
def test_the_best_known_families_do_what_the_table_says_and_lose_what_their_own_logits_do(family):
    verdict = judge(family)
    assert verdict.difference <= 1e-5
    assert [verdict.evaluate, verdict.stack, verdict.train, verdict.spectra] == written()[family]


@pytest.mark.slow
def test_every_family_of_transformers_does_what_the_table_says():
    verdicts = all_verdicts()
    assert {
        family: verdict.difference
        for family, verdict in verdicts.items()
        if not verdict.difference <= 1e-5
    } == {}
    assert "WRONG" not in table(verdicts)
    assert table(verdicts) == TABLE.read_text(encoding="utf-8"), (
        "python tests/model/families.py writes it anew"
    )


def test_the_table_names_every_way():
    rows = written()
    assert (
        {family for family, columns in rows.items() if columns[2] == "yes"}
        == {"llama", "mixtral"}
        == {*decoder.TRAINED_FAMILIES}
    )
    own_pass = {
        family for family, columns in rows.items() if columns[0] == "yes, by its own forward pass"
    }
    assert own_pass >= {"gemma2", "cohere", "granite", "bert"} and len(rows) > 120


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_what_is_shown_of_a_sample_is_the_models_too(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(family)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    prompt, drawn = (5, 6, 7), (8, 9, 10, 11)
    choices = prompt_box.token_choices(
        model, _Letters(), generation.Sample("", "", prompt, drawn, (), 0.0)
    )
    with torch.no_grad():
        expected = model(torch.tensor([prompt + drawn])).logits[0].double().softmax(-1)
    for place, (token, choice) in enumerate(
        zip(drawn, choices, strict=True), start=len(prompt) - 1
    ):
        assert choice.probability == pytest.approx(expected[place, token].item(), rel=1e-5)


class _Letters:
    def decode(self, tokens):
        return str(tokens)


def test_a_model_that_sees_what_it_is_to_predict_is_refused():
    config = small_config("bert")
    config.is_decoder = False
    with pytest.raises(ValueError, match="sees the tokens"):
        scoring.held_out_loss(
            AutoModelForCausalLM.from_config(config), torch.randint(4, 90, (2, 9))
        )


def test_no_more_logits_than_a_rows_exist_where_a_family_makes_its_own():
    model = AutoModelForCausalLM.from_config(small_config("cohere"))
    rows = []
    model.lm_head.register_forward_hook(lambda _, __, output: rows.append(output.shape[0]))
    scoring.held_out_loss(model, torch.randint(4, 90, (6, 9)))
    assert max(rows) == 1 and not logits.head_is_all(model)


def test_training_refuses_another_family_by_its_name(tmp_path):
    model = AutoModelForCausalLM.from_config(small_config("gemma2"))
    with pytest.raises(
        ValueError, match="is a gemma2; only llama and mixtral models can be trained"
    ):
        decoder.check_fits(model.config.to_dict(), get_profile("tiny"), tmp_path)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM cannot be trained"):
        decoder.forward_body(model, torch.zeros(1, 4, dtype=torch.int64))
