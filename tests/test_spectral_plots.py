"""Figures of spectra, with 12 layers and with 120: every matrix has its cell or line, and what is marked is what should be."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from kl3m_nb import copies, spectral_plots
from kl3m_nb.matrices import BLOCK_ROLES, HEAD_LAYER, ROLES
from kl3m_nb.spectra import spectrum_metrics

CEILINGS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 3000.0) | dict.fromkeys(ROLES[4:], 2000.0)


def singular_values(layers: int, source_layers: int, seed=0) -> dict:
    rng = np.random.default_rng(seed)
    values = {
        (layer, role): np.sort(np.geomspace(2 + layer % source_layers, 0.01, 40) * np.exp(rng.normal(0, 0.02, 40)))[::-1]
        for layer in range(layers)
        for role in BLOCK_ROLES
    }
    return values | {(HEAD_LAYER, "lm_head"): np.linspace(30, 1, 40)}


def spectra_frame(layers: int, source_layers: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "layer": layer, "source_layer": layer % source_layers if layer >= 0 else -1,
            "copy": layer // source_layers if layer >= 0 else -1, "role": role, "expert": -1, "finite": True,
            "condition_reliable": True, **spectrum_metrics(values, (40, 60), fit_alpha=False),
        }
        for (layer, role), values in singular_values(layers, source_layers).items()
    )  # fmt: skip


def texts(figure) -> str:
    figure.canvas.draw()
    return " | ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def marked(axes, label: str) -> set[tuple[int, int]]:
    """(layer, row) of the cells marked with `label`."""
    [line] = [line for line in axes.lines if str(line.get_label()).startswith(label)]
    return {(int(x), int(y)) for x, y in zip(*line.get_data(), strict=True)}


class TestConditionHeatmap:
    @pytest.mark.parametrize(("layers", "source_layers"), [(12, 3), (120, 30)])
    def test_a_cell_for_every_matrix_of_the_blocks(self, layers, source_layers):
        frame = spectra_frame(layers, source_layers)
        figure = spectral_plots.plot_condition_heatmap(frame, CEILINGS)
        axes = figure.axes[0]
        cells = axes.images[0].get_array()
        assert cells.shape == (7, layers) and not np.ma.is_masked(cells)
        for role in ("q_proj", "down_proj"):
            expected = frame[frame.role == role].sort_values("layer").condition
            np.testing.assert_array_equal(cells[BLOCK_ROLES.index(role)], expected)
        assert [label.get_text() for label in axes.get_yticklabels()] == list(BLOCK_ROLES) and axes.get_xlabel() == "layer"
        assert "condition" in figure.axes[1].get_ylabel()
        borders = {line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2}
        assert borders == {source_layers * copy - 0.5 for copy in (1, 2, 3)}

    def test_labels_do_not_overlap_at_120_layers(self):
        figure = spectral_plots.plot_condition_heatmap(spectra_frame(120, 30), CEILINGS)
        figure.canvas.draw()
        boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels() if label.get_text()]
        assert len(boxes) >= 6 and not any(left.overlaps(right) for left, right in pairwise(boxes))

    def test_cells_at_and_above_their_own_ceiling_are_marked(self):
        frame = spectra_frame(12, 3)
        conditions = {
            (4, "q_proj"): 2995.0,
            (5, "q_proj"): 2500.0,
            (6, "up_proj"): 2500.0,
            (7, "o_proj"): np.inf,
            (8, "k_proj"): 3000.0,
        }
        for (layer, role), condition in conditions.items():
            frame.loc[(frame.layer == layer) & (frame.role == role), "condition"] = condition
        figure = spectral_plots.plot_condition_heatmap(frame, CEILINGS)
        rows = {role: BLOCK_ROLES.index(role) for role in BLOCK_ROLES}
        assert marked(figure.axes[0], "at the ceiling: 2 of 84") == {(4, rows["q_proj"]), (8, rows["k_proj"])}
        assert marked(figure.axes[0], "above the ceiling: 2 of 84") == {(6, rows["up_proj"]), (7, rows["o_proj"])}
        assert "ceiling 3,000: q, k, v, o" in texts(figure) and "ceiling 2,000: gate, up, down" in texts(figure)

    def test_without_a_clamp_nothing_is_marked(self):
        figure = spectral_plots.plot_condition_heatmap(spectra_frame(3, 3), {})
        assert marked(figure.axes[0], "above the ceiling: 0 of 21") == set()
        assert "(ceiling" not in texts(figure)

    def test_what_cannot_be_trusted_is_said(self):
        frame = spectra_frame(3, 3)
        assert "not reliable" not in texts(spectral_plots.plot_condition_heatmap(frame, CEILINGS))
        frame["condition_reliable"] = False
        frame.loc[0, ["finite", "condition"]] = [False, np.nan]
        shown = texts(spectral_plots.plot_condition_heatmap(frame, CEILINGS))
        assert "16-bit weights: conditions are not reliable" in shown and "NaN or infinite values (grey): 1 matrix" in shown

    def test_of_a_mixture_the_worst_expert_is_shown(self):
        frame = spectra_frame(2, 2)
        worse = frame[frame.role == "up_proj"].assign(expert=1, condition=777.0)
        cells = spectral_plots.plot_condition_heatmap(pd.concat([frame, worse]), CEILINGS).axes[0].images[0].get_array()
        assert set(cells[BLOCK_ROLES.index("up_proj")]) == {777.0}


class TestRidgeline:
    @pytest.mark.parametrize("layers", [1, 12, 120])
    def test_a_ridge_for_every_layer_with_dots_at_its_ends(self, layers):
        values = singular_values(layers, source_layers=layers)
        figure = spectral_plots.plot_ridgeline(values, "q_proj")
        [axes] = figure.axes
        assert len(axes.collections) == layers
        dots = [line for line in axes.lines if line.get_marker() == "."]
        for layer, line in enumerate(dots):
            assert list(line.get_xdata()) == [values[layer, "q_proj"][0], values[layer, "q_proj"][-1]]
            assert set(line.get_ydata()) == {layer}
        figure.canvas.draw()
        ticks = axes.get_yticks()
        assert axes.get_xscale() == "log" and 0 in ticks and len(ticks) <= 13 and (ticks < layers).all()

    def test_a_ridge_is_highest_where_the_values_are(self):
        values = {(0, "q_proj"): np.sort(np.append(np.full(99, 0.5) * np.linspace(0.98, 1.02, 99), 8.0))[::-1]}
        [axes] = spectral_plots.plot_ridgeline(values, "q_proj").axes
        [ridge] = [line for line in axes.lines if len(line.get_xdata()) > 10]
        peak = ridge.get_xdata()[np.nanargmin(ridge.get_ydata())]  # layers count downwards
        assert peak == pytest.approx(0.5, rel=0.05)

    def test_zeros_are_left_out_and_a_zero_matrix_too(self):
        values = {(0, "q_proj"): np.array([2.0, 1.0, 0.0]), (1, "q_proj"): np.zeros(3)}
        [axes] = spectral_plots.plot_ridgeline(values, "q_proj").axes
        assert [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "."] == [[2.0, 1.0]]
        with pytest.raises(ValueError, match="Every q_proj is zero"):
            spectral_plots.plot_ridgeline({(0, "q_proj"): np.zeros(3)}, "q_proj")

    def test_an_unknown_role_is_refused(self):
        with pytest.raises(ValueError, match=r"no role 'query'; these spectra have .*q_proj"):
            spectral_plots.plot_ridgeline(singular_values(2, 2), "query")


class TestCopies:
    def test_each_copy_with_its_deviation_from_the_mean(self):
        values = singular_values(12, 3)
        figure = spectral_plots.plot_copies(values, "o_proj", source_layer=1, source_layers=3)
        spectra_row, deviations = figure.axes[:4], figure.axes[4:]
        assert [axes.get_title(loc="left") for axes in spectra_row] == [f"copy {i}: layer {1 + 3 * i}" for i in range(4)]
        mean = np.mean([values[layer, "o_proj"] for layer in (1, 4, 7, 10)], axis=0)
        for axes, deviation, layer in zip(spectra_row, deviations, (1, 4, 7, 10), strict=True):
            [own] = [line for line in axes.lines if line.get_label() == f"layer {layer}"]
            np.testing.assert_array_equal(own.get_ydata(), values[layer, "o_proj"])
            np.testing.assert_allclose(deviation.lines[0].get_ydata(), 100 * (values[layer, "o_proj"] / mean - 1))
        assert deviations[0].get_xlabel() and "(%)" in deviations[0].get_ylabel() and "o_proj" in spectra_row[0].get_ylabel()

    def test_a_singular_copy_is_called_that(self):
        values = {(0, "q_proj"): np.array([2.0, 0.0]), (1, "q_proj"): np.array([2.0, 0.5])}
        shown = texts(spectral_plots.plot_copies(values, "q_proj", 0, 1))
        assert "condition infinite" in shown and "condition 4" in shown

    def test_a_block_that_is_not_there_is_refused(self):
        with pytest.raises(ValueError, match="blocks go from 0 to 2"):
            spectral_plots.plot_copies(singular_values(12, 3), "q_proj", source_layer=3, source_layers=3)


def divergence_frame(steps, with_movement=True) -> pd.DataFrame:
    return pd.DataFrame(
        {"step": step, "role": role, "expert": -1, "source_layer": block, "copy_a": a, "copy_b": b,
         "distance": step * (block + 1) / 100, **({"movement_cosine": -0.4} if with_movement else {}),
         "top_overlap": 0.9, "bottom_overlap": 0.5,
         "chance_overlap": 0.08 if role in ("k_proj", "v_proj") else 0.03}
        for step in steps for role in BLOCK_ROLES for block in range(3) for a, b in ((0, 1), (0, 2), (1, 2))
    )  # fmt: skip


class TestDivergence:
    def test_over_steps_a_line_a_role_and_the_chance_level(self):
        figure = spectral_plots.plot_divergence(divergence_frame([0, 10, 20]))
        panels = figure.axes
        assert [axes.get_title(loc="left") for axes in panels] == [
            "Distance",
            "Direction of movement",
            "Top subspace",
            "Bottom subspace",
        ]
        assert all(axes.get_ylabel() and axes.get_xlabel() == "optimizer step" for axes in panels)
        assert {line.get_label() for line in panels[0].lines} == set(BLOCK_ROLES)
        np.testing.assert_allclose(panels[0].lines[0].get_data(), [[0, 10, 20], [0, 0.2, 0.4]])
        levels = {line.get_ydata()[0] for line in panels[2].lines if line.get_label().startswith("_")}
        assert levels == {0.08, 0.03} and "chance (k, v)" in texts(figure)
        low, high = panels[1].get_ylim()
        assert low < -0.4 and high > 1

    def test_at_one_checkpoint_over_the_source_blocks(self):
        figure = spectral_plots.plot_divergence(divergence_frame([10], with_movement=False).drop(columns="step"))
        assert len(figure.axes) == 3 and figure.axes[0].get_xlabel() == "source block"
        np.testing.assert_allclose(figure.axes[0].lines[0].get_data(), [[0, 1, 2], [0.1, 0.2, 0.3]])

    def test_an_empty_table_is_refused(self):
        with pytest.raises(ValueError, match="nothing to draw"):
            spectral_plots.plot_divergence(divergence_frame([10]).head(0))


class TestInheritance:
    def frame(self, layers=120) -> pd.DataFrame:
        values = singular_values(layers, layers // 4)
        source = {key: array for key, array in singular_values(layers // 4, layers // 4, seed=1).items()}
        return copies.inheritance(values, source)

    def test_at_one_checkpoint_a_cell_for_every_matrix(self):
        frame = self.frame()
        figure = spectral_plots.plot_inheritance(frame)
        cells = figure.axes[0].images[0].get_array()
        assert cells.shape == (7, 120) and "RMSE" in figure.axes[1].get_ylabel()
        np.testing.assert_array_equal(cells[2], frame[frame.role == "v_proj"].sort_values("layer").rmse)

    def test_over_steps_a_line_a_role(self):
        frame = self.frame(layers=12)
        steps = pd.concat([frame.assign(step=step, rmse=frame.rmse * step) for step in (0, 1, 2)])
        [axes] = spectral_plots.plot_inheritance(steps).axes
        assert [line.get_label() for line in axes.lines] == list(ROLES) and axes.get_xlabel() == "optimizer step"
        expected = frame[frame.role == "q_proj"].rmse.mean()
        np.testing.assert_allclose(axes.lines[0].get_data(), [[0, 1, 2], [0, expected, 2 * expected]])

    def test_right_after_stacking_all_is_zero_and_still_drawn(self):
        frame = self.frame(layers=12).assign(rmse=0.0)
        assert spectral_plots.plot_inheritance(frame).axes[0].images[0].get_array().max() == 0
