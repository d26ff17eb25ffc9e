"""Sentences and findings against tables whose content is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from kl3m_nb.figures import spectra
from kl3m_nb.model.roles import BLOCK_ROLES, HEAD_LAYER
from kl3m_nb.profiles import ATTENTION_ROLES
from kl3m_nb.spectra import findings

CEILINGS = {
    role: 3000.0 if role in ATTENTION_ROLES else 2000.0 for role in (*BLOCK_ROLES, "lm_head")
}


def model_table(layers=120, source_layers=30) -> pd.DataFrame:
    """Attention at condition 1000 to 1500, MLP at 4 to 5, a healthy head."""
    rng = np.random.default_rng(0)
    keys = [(layer, role) for layer in range(layers) for role in BLOCK_ROLES] + [
        (HEAD_LAYER, "lm_head")
    ]
    table = pd.DataFrame(keys, columns=["layer", "role"])
    head = table.layer == HEAD_LAYER
    table["copy"] = (table.layer // source_layers).where(~head, HEAD_LAYER)
    low = np.where(table.role.isin(ATTENTION_ROLES), 1000.0, 4.0)
    table["condition"] = low * rng.uniform(1.0, 1.5, len(table))
    rows = table.role.map(
        {"k_proj": 192, "v_proj": 192, "gate_proj": 1536, "up_proj": 1536, "lm_head": 131_072}
    ).fillna(576)
    cols = table.role.map({"down_proj": 1536}).fillna(576)
    side = np.minimum(rows, cols)
    return table.assign(
        expert=-1,
        rows=rows.astype(int),
        cols=cols.astype(int),
        dtype="float32",
        finite=True,
        condition_reliable=True,
        sigma_max=2.0,
        matrix_rank=side,
        effective_rank=0.75 * side,
    )


def at(table, layer, role):
    return (table.layer == layer) & (table.role == role)


def test_layers_at_the_ceiling_are_counted_not_matrices():
    table = model_table()
    table.loc[(table.layer < 96) & table.role.isin(["q_proj", "k_proj"]), "condition"] = 2990.0
    text = " ".join(findings.describe_model(table, CEILINGS))
    assert "120 layers, 4 copies of 30 source blocks: 841 matrices in float32." in text
    assert (
        "Attention sits at or above the ceiling in 96 of 120 layers (96 q_proj matrices, 96 k_proj"
        " matrices)." in text
    )
    assert "MLP sits at or above the ceiling in no layer." in text and "No matrix is ill." in text
    assert (
        text.count("is 75% of a matrix's shorter side in the median") == 2
        and "an effective rank of 75% of its" in text
    )


def test_a_little_above_the_ceiling_is_at_it_and_no_illness():
    table = model_table()
    table.loc[(table.layer < 8) & (table.role == "q_proj"), "condition"] = (
        1.104 * 3000
    )  # as the family reports 2208 at 2000
    table.loc[at(table, 9, "o_proj"), "condition"] = 1.2 * 3000
    text = " ".join(findings.describe_model(table, CEILINGS))
    counted = (
        "in 9 of 120 layers (8 q_proj matrices, 1 o_proj matrix), more than 15% above it in 1 of"
        " these layers."
    )
    assert f"Attention sits at or above the ceiling {counted}" in text
    assert list(findings.ill_matrices(table, CEILINGS).layer) == [9]
    assert findings.ill_matrices(table, {}).empty


def test_a_singular_matrix_is_called_infinitely_conditioned():
    table = model_table(12, 3)
    table.loc[at(table, 2, "q_proj"), ["condition", "matrix_rank"]] = [np.inf, 500]
    assert "the largest infinite (layer 2, q_proj)" in " ".join(findings.describe_model(table, {}))


def test_without_ceilings_none_is_spoken_of():
    assert "ceiling" not in " ".join(
        findings.describe_model(model_table(), dict.fromkeys(CEILINGS, 0.0))
    )


def test_16_bit_weights_are_told():
    table = model_table(4, 4).assign(dtype="bfloat16", condition_reliable=False)
    table.loc[at(table, 1, "q_proj"), "condition"] = 9000.0
    table.loc[at(table, 2, "q_proj"), "condition"] = 3000.0
    table.loc[at(table, 3, "up_proj"), "sigma_max"] = 200.0
    text = " ".join(findings.describe_model(table, CEILINGS))
    assert (
        "The values of 29 matrices are 16-bit" in text
        and "is 75% of a matrix's shorter side" in text
    )
    assert (
        "ceiling" not in text
        and "median condition" not in text
        and "LM head has condition" not in text
    )
    assert list(findings.ill_matrices(table, CEILINGS).reason) == [
        "stands out in its role: σ₁ 200, usual is 2"
    ]


def test_a_model_that_is_not_finite_is_told_in_one_piece():
    table = model_table(4, 4).assign(finite=False, condition_reliable=False)
    table[["condition", "sigma_max", "effective_rank", "matrix_rank"]] = np.nan
    sentences = findings.describe_model(table, CEILINGS)
    assert sum("holds NaN or infinite values" in sentence for sentence in sentences) == 5
    assert (
        sentences[-1] == "24 more matrices stand out; the table names them." and len(sentences) == 7
    )


def test_zero_initialised_matrices_leave_the_others_described():
    table = model_table(4, 4)
    table.loc[table.role.isin(ATTENTION_ROLES), ["condition", "sigma_max", "effective_rank"]] = [
        np.nan,
        0.0,
        np.nan,
    ]
    text = " ".join(findings.describe_model(table, CEILINGS))
    assert (
        "is all zero" in text
        and "median condition of the attention" not in text
        and "median condition of the MLP" in text
    )


def test_the_ill_are_found_and_ordered_by_how_bad_they_are():
    table = model_table(12, 3)
    table.loc[at(table, 1, "up_proj"), ["finite", "condition", "sigma_max"]] = [
        False,
        np.nan,
        np.nan,
    ]
    table.loc[at(table, 2, "q_proj"), ["condition", "matrix_rank"]] = [np.inf, 500]
    table.loc[at(table, 3, "o_proj"), "condition"] = 4500.0
    table.loc[at(table, 4, "o_proj"), "condition"] = 3010.0  # at the ceiling, which is no illness
    table.loc[at(table, 5, "down_proj"), "sigma_max"] = 20.0
    table.loc[at(table, 6, "down_proj"), "sigma_max"] = (
        6.0  # far out, and yet by less than a factor of four
    )
    ill = findings.ill_matrices(table, CEILINGS)
    assert list(zip(ill.layer, ill.role, strict=True)) == [
        (1, "up_proj"),
        (2, "q_proj"),
        (3, "o_proj"),
        (5, "down_proj"),
    ]
    for reason, words in zip(
        ill.reason,
        (
            "NaN or infinite",
            "singular: rank 500 of 576",
            "condition 4,500, allowed 3,000",
            "σ₁ 20, usual is 2",
        ),
        strict=True,
    ):
        assert words in reason
    assert list(ill.metric) == ["condition", "condition", "condition", "sigma_max"]
    assert "Layer 3, o_proj is above its ceiling" in " ".join(
        findings.describe_model(table, CEILINGS)
    )


def test_between_two_clamps_a_matrix_above_its_ceiling_is_not_ill():
    table = model_table(12, 3)
    table.loc[at(table, 3, "o_proj"), "condition"] = 4500.0
    assert len(findings.ill_matrices(table, CEILINGS)) == 1
    assert findings.ill_matrices(table, CEILINGS, since_clamp=1).empty
    text = " ".join(findings.describe_model(table, CEILINGS, since_clamp=39))
    assert (
        "39 steps without a clamp lie behind it; what has drifted above its ceiling" in text
        and "No matrix is ill" in text
    )
    assert "without a clamp" not in " ".join(
        findings.describe_model(model_table(12, 3), CEILINGS, since_clamp=39)
    )


def test_what_has_no_ceiling_or_no_reliable_condition_has_not_drifted_above_one():
    free = {**CEILINGS, "o_proj": 0.0}
    table = model_table(12, 3)
    table.loc[at(table, 3, "q_proj"), ["condition", "condition_reliable"]] = [4500.0, False]
    assert "drifted above" not in " ".join(findings.describe_model(table, free, since_clamp=39))


def divergence(distance, cosine, overlap=(0.75, 0.25)) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "role": ["q_proj", "up_proj"] * 3,
            "distance": distance,
            "movement_cosine": cosine,
            "chance_cosine": 0.002,
            "top_overlap": overlap[0],
            "bottom_overlap": overlap[1],
            "chance_overlap": [0.03, 0.08] * 3,
        }
    )


def test_divergence_is_told_in_percent_of_the_norm():
    text = " ".join(findings.describe_divergence(divergence([0.2, 0.1] * 3, 0.005)))
    assert "15.0% of their norm apart" in text
    assert "those of q_proj lie furthest apart (20.0%), those of up_proj least (10.0%)" in text
    assert (
        "independent ways" in text
        and "is 0.005, from 0.005 to 0.005" in text
        and "0% of the pairs" in text
        and "±0.006" in text
    )
    assert (
        "Their leading directions overlap by 0.75 and their trailing directions overlap by 0.25"
        in text
    )
    assert "chance is 0.03 to 0.08" in text
    alike = " ".join(findings.describe_divergence(divergence([0.2, 0.20004] * 3, 0.005)))
    assert "20.0% of their norm apart" in alike and "furthest" not in alike
    near = " ".join(findings.describe_divergence(divergence([3e-5, 4e-5] * 3, 0.005)))
    assert (
        "lie 0.0035% of their norm apart" in near and "up_proj lie furthest apart (0.004%)" in near
    )


@pytest.mark.parametrize(
    ("cosine", "words"),
    [
        (0.9, "much the same way"),
        (0.3, "partly the same"),
        (0.05, "partly the same"),
        (-0.05, "partly opposite"),
        (-0.6, "moved opposite ways"),
    ],
)
def test_the_direction_of_movement_in_words(cosine, words):
    assert words in " ".join(findings.describe_divergence(divergence([0.2] * 6, cosine)))


def test_pairs_that_cancel_in_the_mean_are_not_called_independent():
    cancelling = " ".join(findings.describe_divergence(divergence([0.2] * 6, [0.9, -0.9] * 3)))
    assert "independent ways" not in cancelling and "100% of the pairs" in cancelling
    assert "-0.9 to 0.9" in cancelling
    independent = " ".join(findings.describe_divergence(divergence([0.2] * 6, [1e-3, -1e-3] * 3)))
    assert "independent ways" in independent and "0% of the pairs" in independent


@pytest.mark.parametrize("along", ["source_layer", "step"])
def test_the_furthest_and_the_nearest_copies_are_those_of_the_figure(along):
    distances = {
        "q_proj": (0.1, 0.1, 0.9),
        "k_proj": (0.3, 0.3, 0.3),
        "o_proj": (0.2, 0.2, 0.5),
    }  # medians would say k and q
    frame = pd.DataFrame(
        {
            "step": step,
            "role": role,
            "source_layer": block,
            "distance": distance * step,
            "top_overlap": 0.5,
            "bottom_overlap": 0.5,
            "chance_overlap": 0.1,
        }
        for step in (1, 2)
        for role, by_block in distances.items()
        for block, distance in enumerate(by_block)
    )
    last = frame[frame.step == 2]
    panel = spectra.plot_divergence(frame if along == "step" else last).axes[0]
    ends = {
        line.get_label(): line.get_ydata()[-1] if along == "step" else line.get_ydata().mean()
        for line in panel.lines
    }
    nearest, *_, furthest = sorted(ends, key=ends.get)
    extremes = (
        f"those of {furthest} lie furthest apart ({ends[furthest]:.1%}), those of {nearest} least"
        f" ({ends[nearest]:.1%})"
    )
    assert extremes in " ".join(findings.describe_divergence(last)) and furthest == "q_proj"


def test_roles_that_are_equally_far_apart_are_not_ranked():
    assert "furthest" not in " ".join(findings.describe_divergence(divergence([0.2] * 6, 0.1)))


def test_what_is_not_known_of_the_copies_is_counted():
    frame = divergence(
        [0.2, np.nan, 0.1, 0.1, 0.2, np.nan],
        0.1,
        (0.75, [0.2, np.nan, np.nan, 0.4, np.nan, np.nan]),
    )
    text = " ".join(findings.describe_divergence(frame))
    assert (
        "2 of 6 pairs of copies hold NaN" in text
        and "In 2 of 4 pairs the trailing directions are not distinct" in text
    )
    assert (
        "q_proj lie furthest apart (16.7%)" in text
        and "trailing directions overlap by 0.30" in text
    )
    [sentence] = findings.describe_divergence(divergence([np.nan] * 6, np.nan))
    assert sentence.startswith("6 of 6 pairs")


def test_equal_copies_are_called_equal():
    assert findings.describe_divergence(divergence([0.0] * 6, np.nan)) == [
        "All copies of every source block are still equal."
    ]


def test_inheritance_and_function_name_the_extremes():
    inherited = pd.DataFrame(
        {"layer": [0, 7, 8], "role": "k_proj", "rmse": [0.0, np.log(1.5), np.log(1.1)]}
    )
    [sentence] = findings.describe_inheritance(inherited)
    assert (
        "by a factor of 1.100 (root mean" in sentence
        and "most in layer 7, k_proj (a factor of 1.50)" in sentence
    )
    near = findings.describe_inheritance(inherited.assign(rmse=3e-4))[0]
    assert near.count("a factor of 1.00030 (root mean") == 1
    lost, rest = findings.describe_inheritance(inherited.assign(rmse=[np.nan, 0.1, 0.2]))
    assert (
        lost.startswith("1 of 3 matrices, or their source's, are zero or not finite")
        and "layer 8" in rest
    )
    [unknown] = findings.describe_inheritance(inherited.assign(rmse=np.nan))
    assert unknown.startswith("3 of 3 matrices")
    assert (
        "its source's within 1e-9" in findings.describe_inheritance(inherited.assign(rmse=0.0))[0]
    )
    swaps = pd.DataFrame(
        {
            "source_layer": [0, 1],
            "copy_a": 0,
            "copy_b": [1, 3],
            "loss": 4.0,
            "change": [0.1, 0.5],
            "low": [-0.1, 0.3],
            "high": [0.3, 0.7],
            "effective": 3.0,
        }
    )
    alike = pd.DataFrame({"update_cka": [0.5, 0.7], "update_chance": 0.04})
    text = " ".join(findings.describe_function(alike, swaps))
    assert (
        "CKA of 0.60" in text
        and "the largest change is +0.500 (source block 1, copies 0 and 3)" in text
        and "excludes 0 in 1 of 2 pairs" in text
    )
    unresolved = " ".join(findings.describe_function(alike, swaps.assign(low=-1.0)))
    assert "excludes 0 in 0 of 2 pairs" in unresolved
    text = " ".join(findings.describe_function(alike, swaps.assign(change=[-0.3, -0.1])))
    assert (
        "by -0.200 nats in the median; the largest change is -0.300 (source block 0, copies 0"
        " and 1)" in text
    )
    [unknown] = findings.describe_function(
        alike.assign(update_cka=np.nan), swaps.assign(change=np.nan)
    )
    assert unknown == "The held-out loss is not finite, so swapping copies tells nothing."


def test_clamps_are_counted():
    history = pd.DataFrame(
        {
            "step": [20, 20, 40, 40],
            "name": ["a", "b"] * 2,
            "role": ["q_proj", "o_proj"] * 2,
            "raised": [3, 0, 2, 1],
            "route": ["repaired", "certified", "repaired", "repaired"],
        }
    )
    [sentence] = findings.describe_clamp(history)
    assert (
        "In 2 clamps up to step 40 it raised 6 singular values in 2 of 2 matrices, most in q_proj"
        " (5 of them)" in sentence
    )
    assert "raised nothing" in findings.describe_clamp(history.assign(raised=0))[0]
    assert findings.describe_clamp(pd.DataFrame()) == []
