"""The controls change the picture, follow each other, and leave a picture where no widget lives."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kl3m_nb.jupyter.explorer import SpectrumExplorer
from kl3m_nb.spectra import singular_values

SHAPE = dict(
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=40,
)


def analysed(layers, source_layers):
    torch.manual_seed(layers)
    return singular_values.analyse_model(
        LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SHAPE)), source_layers
    )


@pytest.fixture
def explorer():
    models = {"source": analysed(2, 2), "trained": analysed(6, 2)}
    tables, values = ({name: model[part] for name, model in models.items()} for part in (0, 1))
    return SpectrumExplorer(tables, values, "trained", "q_proj", layer=3)


def test_every_control_draws_what_was_chosen(explorer):
    for control, value in (
        (explorer.role, "up_proj"),
        (explorer.layer, 1),
        (explorer.metric, "stable_rank"),
        (explorer.checkpoint, "source"),
    ):
        before = bytes(explorer.image.value)
        control.value = value
        assert before != bytes(explorer.image.value) and bytes(explorer.image.value).startswith(
            b"\x89PNG"
        )
        checkpoint, layer, role = (
            explorer.checkpoint.value,
            explorer.layer.value,
            explorer.role.value,
        )
        spectrum, depth = explorer.figure().axes
        [chosen] = [line for line in spectrum.lines if line.get_label() == checkpoint]
        np.testing.assert_array_equal(chosen.get_ydata(), explorer._values[checkpoint][layer, role])
        [here] = [line for line in depth.lines if line.get_marker() == "D"]
        table = explorer._tables[checkpoint]
        row = table[(table.layer == layer) & (table.role == role)].iloc[0]
        assert (here.get_xdata()[0], here.get_ydata()[0]) == (layer, row[explorer.metric.value])


def test_layer_and_copy_follow_each_other(explorer):
    assert explorer.copy.value == 1 and list(explorer.copy.options) == [0, 1, 2]
    explorer.copy.value = 2
    assert explorer.layer.value == 5
    explorer.layer.value = 0
    assert explorer.copy.value == 0


def test_a_choice_that_is_not_there_moves_to_one_that_is(explorer):
    explorer.checkpoint.value = "source"
    assert (
        explorer.layer.value == 0
        and list(explorer.layer.options) == [0, 1]
        and explorer.role.value == "q_proj"
    )
    explorer.role.value = "lm_head"
    assert (
        explorer.layer.value == -1
        and explorer.layer.label == "LM head"
        and explorer.copy.value is None
    )
    depth = explorer.figure().axes[1]
    assert [tick.get_text() for tick in depth.get_xticklabels()] == [
        "LM head"
    ] and not depth.get_xlabel()
    explorer.checkpoint.value = "trained"
    assert explorer.role.value == "lm_head"
    explorer.role.value = "k_proj"
    assert explorer.layer.value == 0


def test_the_output_holds_a_widget_and_a_picture(explorer):
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]) == bytes(explorer.image.value)


def test_a_first_choice_that_is_not_there_is_refused(explorer):
    with pytest.raises(
        ValueError, match=r"no q_proj of layer 9 in 'trained'; the checkpoints are source, trained"
    ):
        SpectrumExplorer(explorer._tables, explorer._values, "trained", "q_proj", layer=9)
    with pytest.raises(
        ValueError, match="no metric 'size' in every table; choose one of condition"
    ):
        SpectrumExplorer(explorer._tables, explorer._values, "trained", "q_proj", metric="size")
