"""Figures of spectra, with 12 layers and with 120: every matrix has its cell or line, and what is
marked is what should be.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from kl3m_nb.figures import spectra
from kl3m_nb.model.roles import BLOCK_ROLES, HEAD_LAYER, ROLES
from kl3m_nb.spectra import copies
from kl3m_nb.spectra.singular_values import spectrum_metrics

CEILINGS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 3000.0) | dict.fromkeys(
    ROLES[4:], 2000.0
)


def singular_values(layers: int, source_layers: int, seed=0) -> dict:
    rng = np.random.default_rng(seed)
    values = {
        (layer, role): np.sort(
            np.geomspace(2 + layer % source_layers, 0.01, 40) * np.exp(rng.normal(0, 0.02, 40))
        )[::-1]
        for layer in range(layers)
        for role in BLOCK_ROLES
    }
    return values | {(HEAD_LAYER, "lm_head"): np.linspace(30, 1, 40)}


def spectra_frame(layers: int, source_layers: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "layer": layer,
            "source_layer": layer % source_layers if layer >= 0 else -1,
            "copy": layer // source_layers if layer >= 0 else -1,
            "role": role,
            "expert": -1,
            "finite": True,
            "condition_reliable": True,
            **spectrum_metrics(values, (40, 60), fit_alpha=False),
        }
        for (layer, role), values in singular_values(layers, source_layers).items()
    )


def texts(figure) -> str:
    figure.canvas.draw()
    return " | ".join(
        text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))
    )


def shown_cells(figure) -> np.ndarray:
    """The cells of all panels of a heat map below each other."""
    return np.ma.concatenate([axes.images[0].get_array() for axes in figure.axes if axes.images])


def marked(figure, marker: str) -> set[tuple[int, str]]:
    """(layer, role) of the cells of a heat map marked with `marker`."""
    figure.canvas.draw()
    found = set()
    for axes in figure.axes[:2]:
        roles = [label.get_text() for label in axes.get_yticklabels()]
        for line in axes.lines:
            if line.get_marker() == marker:
                found |= {(int(x), roles[int(y)]) for x, y in zip(*line.get_data(), strict=True)}
    return found


class TestConditionHeatmap:
    @pytest.mark.parametrize(("layers", "source_layers"), [(12, 3), (120, 30)])
    def test_a_cell_for_every_matrix_of_the_blocks(self, layers, source_layers):
        frame = spectra_frame(layers, source_layers)
        figure = spectra.plot_condition_heatmap(frame, CEILINGS)
        figure.canvas.draw()
        cells = shown_cells(figure)
        assert cells.shape == (7, layers) and not np.ma.is_masked(cells)
        for role in ("q_proj", "down_proj"):
            expected = frame[frame.role == role].sort_values("layer").condition
            np.testing.assert_array_equal(cells[BLOCK_ROLES.index(role)], expected)
        attention, mlp, *bars = figure.axes
        names = [label.get_text() for axes in (attention, mlp) for label in axes.get_yticklabels()]
        assert names == list(BLOCK_ROLES) and mlp.get_xlabel() == "layer"
        assert len(bars) == 2 and all("condition" in bar.get_ylabel() for bar in bars)
        for axes in (attention, mlp):
            places = [list(line.get_xdata()) for line in axes.lines]
            borders = {place[0] for place in places if len(place) == 2 and place[0] == place[1]}
            assert borders == {source_layers * copy - 0.5 for copy in (1, 2, 3)}

    def test_labels_do_not_overlap_at_120_layers(self):
        figure = spectra.plot_condition_heatmap(spectra_frame(120, 30), CEILINGS)
        figure.canvas.draw()
        boxes = [
            label.get_window_extent()
            for label in figure.axes[1].get_xticklabels()
            if label.get_text()
        ]
        assert len(boxes) >= 6 and not any(left.overlaps(right) for left, right in pairwise(boxes))

    def test_cells_at_and_above_their_own_ceiling_are_marked(self):
        frame = spectra_frame(12, 3)
        conditions = {
            (4, "q_proj"): 2995.0,
            (5, "q_proj"): 2500.0,
            (6, "up_proj"): 2500.0,
            (7, "o_proj"): np.inf,
            (8, "k_proj"): 3300.0,  # what steps since the last clamp can do
        }
        for (layer, role), condition in conditions.items():
            frame.loc[(frame.layer == layer) & (frame.role == role), "condition"] = condition
        figure = spectra.plot_condition_heatmap(frame, CEILINGS)
        assert marked(figure, "o") == {(4, "q_proj"), (8, "k_proj")}
        assert marked(figure, "X") == {(6, "up_proj"), (7, "o_proj")}
        shown = texts(figure)
        assert (
            "at the ceiling: 2 of 84" in shown
            and "more than 15% above the ceiling: 2 of 84" in shown
        )
        assert "ceiling 3,000: q, k, v, o" in shown and "ceiling 2,000: gate, up, down" in shown

    def test_a_ceiling_at_the_end_of_a_scale_lies_across_the_frame_of_its_bar(self):
        frame = spectra_frame(12, 3)
        frame.loc[frame.role == "q_proj", "condition"] = 3000.0
        figure = spectra.plot_condition_heatmap(frame, CEILINGS)
        figure.draw_without_rendering()
        attention, mlp = figure.axes[2:]
        [ceiling] = [line for line in attention.lines if not line.get_clip_on()]
        drawn, bar = ceiling.get_window_extent(), attention.get_window_extent()
        assert drawn.x0 < bar.x0 and drawn.x1 > bar.x1 and abs(drawn.y0 - bar.y1) < 1
        assert (
            ceiling.zorder > attention.spines["outline"].zorder and not mlp.lines
        )  # 2,000 is beyond the scale of the MLP

    def test_without_a_clamp_nothing_is_marked(self):
        figure = spectra.plot_condition_heatmap(spectra_frame(3, 3), {})
        assert marked(figure, "o") == marked(figure, "X") == set() and "ceiling" not in texts(
            figure
        )
        high = spectra_frame(3, 3).assign(condition=9000.0)
        figure = spectra.plot_condition_heatmap(high, CEILINGS, enforced=False)
        assert marked(figure, "o") == marked(figure, "X") == set()
        shown = texts(figure)
        assert (
            "ceiling 3,000 (for reference): q, k, v, o" in shown
            and "LM head: condition 9,000" in shown
        )

    def test_conditions_of_16_bit_weights_are_not_marked(self):
        frame = spectra_frame(3, 3).assign(condition=9000.0)
        assert len(marked(spectra.plot_condition_heatmap(frame, CEILINGS), "X")) == 21
        figure = spectra.plot_condition_heatmap(frame.assign(condition_reliable=False), CEILINGS)
        assert marked(figure, "o") == marked(
            figure, "X"
        ) == set() and "LM head: condition –" in texts(figure)

    def test_attention_and_mlp_have_scales_of_their_own_that_one_singular_matrix_does_not_stretch(
        self,
    ):
        frame = spectra_frame(120, 30)
        attention = frame.role.isin(BLOCK_ROLES[:4])
        frame["condition"] = (
            np.where(attention, 2200.0, 4.0) * np.tile([1.0, 1.3], len(frame))[: len(frame)]
        )
        frame.loc[(frame.layer == 7) & (frame.role == "q_proj"), "condition"] = np.inf
        figure = spectra.plot_condition_heatmap(frame, CEILINGS)
        ranges = [(axes.images[0].norm.vmin, axes.images[0].norm.vmax) for axes in figure.axes[:2]]
        assert ranges == [(2200, 3000), (4, 5.2)]
        assert [axes.images[0].colorbar.extend for axes in figure.axes[:2]] == ["max", "neither"]
        assert shown_cells(figure)[0, 7] > 3000 and not np.ma.is_masked(
            shown_cells(figure)
        )  # red, not grey

    def test_what_cannot_be_trusted_is_said(self):
        frame = spectra_frame(3, 3)
        assert "not reliable" not in texts(spectra.plot_condition_heatmap(frame, CEILINGS))
        frame["condition_reliable"] = False
        frame.loc[0, ["finite", "condition"]] = [False, np.nan]
        shown = texts(spectra.plot_condition_heatmap(frame, CEILINGS))
        assert (
            "16-bit weights: conditions are not reliable" in shown
            and "NaN or infinite values (grey): 1 matrix" in shown
        )

    def test_of_a_mixture_the_worst_expert_is_shown(self):
        frame = spectra_frame(2, 2)
        worse = frame[frame.role == "up_proj"].assign(expert=1, condition=777.0)
        cells = shown_cells(spectra.plot_condition_heatmap(pd.concat([frame, worse]), CEILINGS))
        assert set(cells[BLOCK_ROLES.index("up_proj")]) == {777.0}


class TestRidgeline:
    @pytest.mark.parametrize("layers", [1, 12, 120])
    def test_a_ridge_for_every_layer_with_dots_at_its_ends(self, layers):
        values = singular_values(layers, source_layers=layers)
        figure = spectra.plot_ridgeline(values, "q_proj")
        assert len(figure.axes) == (4 if layers == 120 else 1)  # 30 in a panel can be told apart
        assert sum(len(axes.collections) for axes in figure.axes) == layers
        dots = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "."]
        for layer, line in enumerate(dots):
            assert list(line.get_xdata()) == [
                values[layer, "q_proj"][0],
                values[layer, "q_proj"][-1],
            ]
            assert set(line.get_ydata()) == {layer}
        for first, axes in zip(range(0, layers, 30), figure.axes, strict=True):
            bottom, top = axes.get_ylim()
            ticks = axes.get_yticks()
            assert top < first and bottom > min(layers, first + 30) - 1
            assert (
                axes.get_xscale() == "log"
                and first in ticks
                and len(ticks) <= 15
                and max(ticks) < first + 30
            )

    def test_a_ridge_is_highest_where_the_values_are(self):
        values = {
            (0, "q_proj"): np.sort(np.append(np.full(99, 0.5) * np.linspace(0.98, 1.02, 99), 8.0))[
                ::-1
            ]
        }
        [axes] = spectra.plot_ridgeline(values, "q_proj").axes
        [ridge] = [line for line in axes.lines if len(line.get_xdata()) > 10]
        peak = ridge.get_xdata()[np.nanargmin(ridge.get_ydata())]  # layers count downwards
        assert peak == pytest.approx(0.5, rel=0.05)

    def test_zeros_are_left_out_and_a_zero_matrix_too(self):
        values = {(0, "q_proj"): np.array([2.0, 1.0, 0.0]), (1, "q_proj"): np.zeros(3)}
        [axes] = spectra.plot_ridgeline(values, "q_proj").axes
        assert [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "."] == [
            [2.0, 1.0]
        ]
        with pytest.raises(ValueError, match="Every q_proj is zero"):
            spectra.plot_ridgeline(
                {(0, "q_proj"): np.zeros(3), (1, "q_proj"): np.full(3, np.nan)}, "q_proj"
            )

    def test_an_unknown_role_is_refused(self):
        with pytest.raises(ValueError, match=r"no role 'query'; these spectra have .*q_proj"):
            spectra.plot_ridgeline(singular_values(2, 2), "query")


class TestCopies:
    def test_each_copy_with_its_deviation_from_the_mean(self):
        values = singular_values(12, 3)
        figure = spectra.plot_copies(values, "o_proj", source_layer=1, source_layers=3)
        spectra_row, deviations = figure.axes[:4], figure.axes[4:]
        assert [axes.get_title(loc="left") for axes in spectra_row] == [
            f"copy {i}: layer {1 + 3 * i}" for i in range(4)
        ]
        mean = np.mean([values[layer, "o_proj"] for layer in (1, 4, 7, 10)], axis=0)
        for axes, deviation, layer in zip(spectra_row, deviations, (1, 4, 7, 10), strict=True):
            [own] = [line for line in axes.lines if line.get_label() == f"layer {layer}"]
            np.testing.assert_array_equal(own.get_ydata(), values[layer, "o_proj"])
            np.testing.assert_allclose(
                deviation.lines[0].get_ydata(), 100 * (values[layer, "o_proj"] / mean - 1)
            )
        assert (
            deviations[0].get_xlabel()
            and "(%)" in deviations[0].get_ylabel()
            and "o_proj" in spectra_row[0].get_ylabel()
        )

    def test_a_singular_copy_is_called_that(self):
        values = {(0, "q_proj"): np.array([2.0, 0.0]), (1, "q_proj"): np.array([2.0, 0.5])}
        shown = texts(spectra.plot_copies(values, "q_proj", 0, 1))
        assert "condition infinite" in shown and "condition 4" in shown

    def test_a_copy_that_is_not_finite_leaves_the_mean_of_the_others(self):
        values = singular_values(12, 3)
        values[4, "o_proj"] = np.full(40, np.nan)
        figure = spectra.plot_copies(values, "o_proj", source_layer=1, source_layers=3)
        assert "not finite" in texts(figure)
        mean = np.mean([values[layer, "o_proj"] for layer in (1, 7, 10)], axis=0)
        np.testing.assert_allclose(
            figure.axes[7].lines[0].get_ydata(), 100 * (values[10, "o_proj"] / mean - 1)
        )

    def test_many_copies_stand_in_rows_and_too_many_are_refused(self):
        values = singular_values(16, 2)
        figure = spectra.plot_copies(values, "o_proj", 0, 2)
        titles = [
            axes.get_title(loc="left")
            for axes in figure.axes
            if axes.axison and axes.get_title(loc="left")
        ]
        assert titles == [f"copy {i}: layer {2 * i}" for i in range(8)]
        drawn = [axes for axes in figure.axes if axes.axison]
        assert figure.get_size_inches()[0] < 21 and len(drawn) == 16
        assert (
            len({axes.get_ylim() for axes in drawn}) == 2
        )  # spectra and deviations, each on one scale
        with pytest.raises(ValueError, match="has 120 copies; side by side can stand 24 at most"):
            spectra.plot_copies(singular_values(120, 1), "o_proj", 0, 1)

    def test_a_block_that_is_not_there_is_refused(self):
        with pytest.raises(ValueError, match="blocks go from 0 to 2"):
            spectra.plot_copies(singular_values(12, 3), "q_proj", source_layer=3, source_layers=3)


def divergence_frame(steps, with_movement=True) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "step": step,
            "role": role,
            "expert": -1,
            "source_layer": block,
            "copy_a": a,
            "copy_b": b,
            "distance": step * (block + 1) / 100,
            **({"movement_cosine": -0.4 if step else np.nan} if with_movement else {}),
            "top_overlap": 0.9,
            "bottom_overlap": 0.5,
            "chance_overlap": 0.08 if role in ("k_proj", "v_proj") else 0.03,
        }
        for step in steps
        for role in BLOCK_ROLES
        for block in range(3)
        for a, b in ((0, 1), (0, 2), (1, 2))
    )


class TestDivergence:
    def test_over_steps_a_line_a_role_and_the_chance_level(self):
        figure = spectra.plot_divergence(divergence_frame([0, 10, 20]))
        panels = figure.axes
        assert [axes.get_title(loc="left") for axes in panels] == [
            "Distance",
            "Direction of movement",
            "Top subspace",
            "Bottom subspace",
        ]
        assert all(axes.get_ylabel() and axes.get_xlabel() == "optimizer step" for axes in panels)
        assert len({axes.get_xlim() for axes in panels}) == 1
        assert {line.get_label() for line in panels[0].lines} == set(BLOCK_ROLES)
        np.testing.assert_allclose(panels[0].lines[0].get_data(), [[0, 10, 20], [0, 0.2, 0.4]])
        levels = {
            line.get_ydata()[0] for line in panels[2].lines if line.get_label() not in BLOCK_ROLES
        }
        assert levels == {0.08, 0.03} and "0.08 (k, v)" in texts(figure)
        low, high = panels[1].get_ylim()
        assert low < -0.4 and high > 1

    def test_at_one_checkpoint_over_the_source_blocks(self):
        figure = spectra.plot_divergence(
            divergence_frame([10], with_movement=False).drop(columns="step")
        )
        assert len(figure.axes) == 3 and figure.axes[0].get_xlabel() == "source block"
        np.testing.assert_allclose(figure.axes[0].lines[0].get_data(), [[0, 1, 2], [0.1, 0.2, 0.3]])

    def test_an_empty_table_is_refused(self):
        with pytest.raises(ValueError, match="nothing to draw"):
            spectra.plot_divergence(divergence_frame([10]).head(0))


class TestInheritance:
    def frame(self, layers=120) -> pd.DataFrame:
        values = singular_values(layers, layers // 4)
        source = {
            key: array for key, array in singular_values(layers // 4, layers // 4, seed=1).items()
        }
        return copies.inheritance(values, source)

    def test_at_one_checkpoint_a_cell_for_every_matrix(self):
        frame = self.frame()
        figure = spectra.plot_inheritance(frame)
        cells = figure.axes[0].images[0].get_array()
        assert cells.shape == (7, 120) and "RMSE" in figure.axes[1].get_ylabel()
        np.testing.assert_array_equal(
            cells[2], frame[frame.role == "v_proj"].sort_values("layer").rmse
        )

    def test_over_steps_a_line_a_role(self):
        frame = self.frame(layers=12)
        steps = pd.concat([frame.assign(step=step, rmse=frame.rmse * step) for step in (0, 1, 2)])
        [axes] = spectra.plot_inheritance(steps).axes
        assert [line.get_label() for line in axes.lines] == list(
            ROLES
        ) and axes.get_xlabel() == "optimizer step"
        expected = frame[frame.role == "q_proj"].rmse.mean()
        np.testing.assert_allclose(
            axes.lines[0].get_data(), [[0, 1, 2], [0, expected, 2 * expected]]
        )

    def test_right_after_stacking_all_is_zero_and_still_drawn(self):
        frame = self.frame(layers=12).assign(rmse=0.0)
        assert spectra.plot_inheritance(frame).axes[0].images[0].get_array().max() == 0


def test_the_scale_of_conditions_reaches_to_the_ceiling_where_a_matrix_does():
    few_at_the_ceiling = np.array([5.0, 7.0, 9.0, 400.0, 3000.0])
    assert spectra._condition_limits(few_at_the_ceiling, 3000.0) == (5.0, 3000.0, "neither")
    assert spectra._condition_limits(few_at_the_ceiling, 0.0) == (5.0, 9.0, "max")
    assert spectra._condition_limits(np.array([5.0, 7.0, 9.0, 3000.0, 1e16]), 3000.0) == (
        5.0,
        3000.0,
        "max",
    )
