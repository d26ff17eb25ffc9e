"""Sentences and findings against tables whose content is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from kl3m_nb import spectral_summary
from kl3m_nb.matrices import BLOCK_ROLES, HEAD_LAYER
from kl3m_nb.profiles import ATTENTION_ROLES

CEILINGS = {role: 3000.0 if role in ATTENTION_ROLES else 2000.0 for role in (*BLOCK_ROLES, "lm_head")}


def model_table(layers=120, source_layers=30) -> pd.DataFrame:
    """Attention at condition 1000 to 1500, MLP at 4 to 5, a healthy head."""
    rng = np.random.default_rng(0)
    keys = [(layer, role) for layer in range(layers) for role in BLOCK_ROLES] + [(HEAD_LAYER, "lm_head")]
    table = pd.DataFrame(keys, columns=["layer", "role"])
    head = table.layer == HEAD_LAYER
    table["copy"] = (table.layer // source_layers).where(~head, HEAD_LAYER)
    low = np.where(table.role.isin(ATTENTION_ROLES), 1000.0, 4.0)
    table["condition"] = low * rng.uniform(1.0, 1.5, len(table))
    return table.assign(expert=-1, rows=576, cols=576, dtype="float32", finite=True, condition_reliable=True, sigma_max=2.0,
                        matrix_rank=576, effective_rank=400.0)  # fmt: skip


def at(table, layer, role):
    return (table.layer == layer) & (table.role == role)


def test_layers_at_the_ceiling_are_counted_not_matrices():
    table = model_table()
    table.loc[(table.layer < 96) & table.role.isin(["q_proj", "k_proj"]), "condition"] = 2990.0
    text = " ".join(spectral_summary.describe_model(table, CEILINGS))
    assert "120 layers, 4 copies of 30 source blocks: 841 matrices in float32." in text
    assert "Attention sits at the ceiling in 96 of 120 layers (q_proj 96, k_proj 96)." in text
    assert "MLP sits at the ceiling in no layer." in text and "above the ceiling" not in text and "No matrix is ill." in text


def test_without_ceilings_none_is_spoken_of():
    assert "ceiling" not in " ".join(spectral_summary.describe_model(model_table(), dict.fromkeys(CEILINGS, 0.0)))


def test_16_bit_weights_are_told():
    table = model_table(4, 4).assign(dtype="bfloat16", condition_reliable=False)
    assert "The weights of 29 matrices are 16-bit" in " ".join(spectral_summary.describe_model(table, CEILINGS))


def test_the_ill_are_found_and_ordered_by_how_bad_they_are():
    table = model_table(12, 3)
    table.loc[at(table, 1, "up_proj"), ["finite", "condition", "sigma_max"]] = [False, np.nan, np.nan]
    table.loc[at(table, 2, "q_proj"), ["condition", "matrix_rank"]] = [np.inf, 500]
    table.loc[at(table, 3, "o_proj"), "condition"] = 4500.0
    table.loc[at(table, 4, "o_proj"), "condition"] = 3010.0  # at the ceiling, which is no illness
    table.loc[at(table, 5, "down_proj"), "sigma_max"] = 20.0
    table.loc[at(table, 6, "down_proj"), "sigma_max"] = 6.0  # far out, and yet by less than a factor of four
    ill = spectral_summary.ill_matrices(table, CEILINGS)
    assert list(zip(ill.layer, ill.role, strict=True)) == [(1, "up_proj"), (2, "q_proj"), (3, "o_proj"), (5, "down_proj")]
    for reason, words in zip(
        ill.reason,
        ("NaN or infinite", "singular: rank 500 of 576", "condition 4,500, allowed 3,000", "σ₁ 20, usual is 2"),
        strict=True,
    ):
        assert words in reason
    assert list(ill.metric) == ["condition", "condition", "condition", "sigma_max"]
    assert "Layer 3, o_proj is above its ceiling" in " ".join(spectral_summary.describe_model(table, CEILINGS))


def divergence(distance, cosine) -> pd.DataFrame:
    return pd.DataFrame(
        {"role": ["q_proj", "up_proj"] * 3, "distance": distance, "movement_cosine": cosine, "top_overlap": 0.75,
         "bottom_overlap": 0.25, "chance_overlap": 0.03}
    )  # fmt: skip


def test_divergence_is_told_in_percent_of_the_norm():
    text = " ".join(spectral_summary.describe_divergence(divergence([0.2, 0.1] * 3, 0.05)))
    assert "15.0% of their norm apart" in text and "q_proj has moved most (20.0%)" in text and "up_proj least (10.0%)" in text
    assert "independent ways" in text and "leading directions overlap by 0.75, the trailing ones by 0.25" in text


@pytest.mark.parametrize(("cosine", "words"), [(0.9, "much the same way"), (0.3, "partly"), (-0.5, "opposite ways")])
def test_the_direction_of_movement_in_words(cosine, words):
    assert words in " ".join(spectral_summary.describe_divergence(divergence([0.2] * 6, cosine)))


def test_equal_copies_are_called_equal():
    assert spectral_summary.describe_divergence(divergence([0.0] * 6, np.nan)) == [
        "All copies of every source block are still equal."
    ]


def test_inheritance_and_function_name_the_extremes():
    inherited = pd.DataFrame({"layer": [0, 7, 8], "role": "k_proj", "rmse": [0.0, np.log(1.5), np.log(1.1)]})
    [sentence] = spectral_summary.describe_inheritance(inherited)
    assert "10.0%" in sentence and "layer 7, k_proj (50.0%)" in sentence
    assert "exactly its source's" in spectral_summary.describe_inheritance(inherited.assign(rmse=0.0))[0]
    swaps = pd.DataFrame({"source_layer": [0, 1], "copy_a": 0, "copy_b": [1, 3], "loss": 4.0, "change": [0.1, 0.5]})
    alike = pd.DataFrame({"update_cka": [0.5, 0.7], "update_chance": 0.04})
    text = " ".join(spectral_summary.describe_function(alike, swaps))
    assert "CKA of 0.60" in text and "+0.500 at most (source block 1, copies 0 and 3)" in text


def test_clamps_are_counted():
    history = pd.DataFrame(
        {"step": [20, 20, 40, 40], "name": ["a", "b"] * 2, "role": ["q_proj", "o_proj"] * 2, "raised": [3, 0, 2, 1],
         "route": ["repaired", "certified", "repaired", "repaired"]}
    )  # fmt: skip
    [sentence] = spectral_summary.describe_clamp(history)
    assert "In 2 clamps up to step 40 it raised 6 singular values in 2 of 2 matrices, most in q_proj (5)" in sentence
    assert "raised nothing" in spectral_summary.describe_clamp(history.assign(raised=0))[0]
    assert spectral_summary.describe_clamp(pd.DataFrame()) == []
