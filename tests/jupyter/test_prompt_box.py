"""The prompt box without a browser: what a click writes, streams, stops and refuses, and what is
shown where nobody can click.
"""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from kl3m_nb.evaluation.generation import Sampling, generate, generate_streaming
from kl3m_nb.jupyter.progress import PROGRESS_VARIABLE
from kl3m_nb.jupyter.prompt_box import SERVER_VARIABLE, PromptBox

SAMPLING = Sampling(0.8, 0.95, 1.0, 6)


@pytest.fixture(scope="module")
def loaded(trained_run):
    checkpoint = trained_run[1].checkpoint
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(
        checkpoint
    )


@pytest.fixture
def box(loaded):
    model, tokenizer = loaded
    names = ("stack", "source", "trained")
    return PromptBox(
        dict.fromkeys(names, model),
        dict.fromkeys(names, tokenizer),
        ["Under this", "A <b>"],
        SAMPLING,
        seed=5,
    )


def test_streaming_tells_the_text_as_it_grows_and_ends_with_the_sample_of_generate(loaded):
    told = []
    sample = generate_streaming(*loaded, "Under this", SAMPLING, 5, told.append, lambda: False)
    (same,) = generate(*loaded, ["Under this"], SAMPLING, 5)
    assert (sample.text, sample.tokens, sample.ended) == (same.text, same.tokens, same.ended)
    assert (
        told[0] == ""
        and told[-1] == sample.text
        and len(told) == 1 + len(sample.tokens) + sample.ended
    )


def test_streaming_stops_when_told(loaded):
    told = []
    sample = generate_streaming(
        *loaded, "Under this", Sampling(max_new_tokens=30), 5, told.append, lambda: len(told) > 3
    )
    assert (
        len(sample.tokens) in (3, 4) and not sample.ended
    )  # asked before or after the token is told, by version
    with pytest.raises(ValueError, match="has no tokens"):
        generate_streaming(*loaded, "", SAMPLING, 5, told.append, lambda: False)


def test_a_click_writes_with_both_models_and_the_settings_as_they_stand(box, loaded):
    assert [chooser.value for chooser in box.choosers] == ["source", "trained"]
    box.prompt.value, box.temperature.value, box.seed_field.value, box.length.value = (
        "The parties",
        0.0,
        3,
        4,
    )
    box.write_button.click()
    box.thread.join(60)
    (expected,) = generate(*loaded, ["The parties"], Sampling(0.0, 0.95, 1.0, 4), 3)
    for text, state in zip(box.texts, box.states, strict=True):
        assert text.value.count("<span") == len(expected.tokens) + expected.ended
        assert "The parties" in text.value and "rank 1" in text.value
        assert f"{len(expected.tokens)} tokens" in state.value and "tokens/s" in state.value
    assert not box.write_button.disabled and box.stop_button.disabled


def test_the_stop_button_cuts_both(box):
    seen = []
    box.length.value = 40

    def stop_at_once(change):
        seen.append(change["new"])
        box.stop_button.click()

    box.texts[0].observe(stop_at_once, "value")
    box.write().join(60)
    assert seen and box.texts[1].value == ""
    assert box.texts[0].value.count("<span") < 40


def test_what_is_refused_is_said_in_the_box(box):
    box.write().join(60)
    box.prompt.value = ""
    box.write().join(60)
    assert "has no tokens" in box.states[0].value
    assert [shown.value for shown in (*box.texts, box.states[1])] == [
        "",
        "",
        "",
    ]  # nothing of the prompt before
    assert not box.write_button.disabled
    box.prompt.value = "<i>" * 100
    box.write().join(60)
    assert "&lt;i&gt;" in box.states[0].value and "shorten the prompt" in box.states[0].value


def test_only_a_notebook_on_a_server_gets_the_widget(box, monkeypatch):
    widget = "application/vnd.jupyter.widget-view+json"
    monkeypatch.delenv(PROGRESS_VARIABLE, raising=False)
    monkeypatch.delenv(SERVER_VARIABLE, raising=False)
    assert box._repr_mimebundle_().keys() == {"text/plain", "text/html"}  # plain papermill
    monkeypatch.setenv(SERVER_VARIABLE, "notebooks/04.ipynb")
    live = box._repr_mimebundle_()
    assert widget in live and live["text/html"] == box.gallery
    monkeypatch.setenv(
        PROGRESS_VARIABLE, "/tmp/progress"
    )  # a batch job that was started in such a notebook
    assert widget not in box._repr_mimebundle_()


def test_the_gallery_is_fixed_escaped_and_side_by_side(box):
    gallery = box.gallery
    assert gallery.index(">source <") < gallery.index(">trained <")
    assert gallery.count("<tr>") == 3 and gallery.count("<td") == 4
    assert "A &lt;b&gt;" in gallery and gallery.count("tokens/s") == 2


def test_one_model_is_enough_and_none_is_not(loaded):
    model, tokenizer = loaded
    assert len(PromptBox({"a": model}, {"a": tokenizer}, ["A"], SAMPLING, 1).choosers) == 1
    with pytest.raises(ValueError, match="one tokenizer for each"):
        PromptBox({"a": model}, {"b": tokenizer}, ["A"], SAMPLING, 1)
    with pytest.raises(ValueError, match="no prompts"):
        PromptBox({"a": model}, {"a": tokenizer}, [], SAMPLING, 1)
