"""What the figures of single matrices show, read back from their artists."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from kl3m_nb.figures import matrices
from kl3m_nb.model.roles import BLOCK_ROLES, HEAD_LAYER
from kl3m_nb.spectra import findings, singular_values


@pytest.fixture(scope="module")
def analysed():
    """A table and its spectra for 120 layers of one role, layer 7 above its ceiling and layer 9 not
    finite.
    """
    values = {
        (layer, "q_proj"): np.geomspace(2.0, 2.0 / (9000 if layer == 7 else 800 + layer), 24)
        for layer in range(120)
    }
    rows = [
        {
            "layer": layer,
            "role": role,
            "expert": -1,
            "rows": 24,
            "cols": 48,
            "dtype": "float32",
            "finite": True,
            "condition_reliable": True,
            "source_layer": layer % 30,
            "copy": layer // 30,
            **singular_values.spectrum_metrics(sigma, (24, 48)),
        }
        for (layer, role), sigma in values.items()
    ]
    table = pd.DataFrame(rows)
    table.loc[9, ["finite", "condition_reliable", "condition", "sigma_max", "sigma_min"]] = [
        False,
        False,
        np.nan,
        np.nan,
        np.nan,
    ]
    values[9, "q_proj"] = np.full(24, np.nan)
    return table, values


def texts(figure) -> str:
    figure.canvas.draw()
    return " | ".join(
        text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))
    )


class TestMatrixPage:
    def test_shows_spectrum_bounds_tail_and_place(self, analysed):
        table, values = analysed
        [_, row] = [row for _, row in findings.ill_matrices(table, {"q_proj": 3000.0}).iterrows()]
        figure = matrices.plot_matrix_page(
            table, values, row, 3000.0, source_values=values[1, "q_proj"]
        )
        spectrum, tail, place = figure.axes[0], figure.axes[2], figure.axes[1]
        drawn = {line.get_label(): line for line in spectrum.lines}
        np.testing.assert_array_equal(drawn["singular values"].get_ydata(), values[7, "q_proj"])
        np.testing.assert_array_equal(drawn["its source's"].get_ydata(), values[1, "q_proj"])
        assert drawn["clamp: σ₁ / 3,000"].get_ydata()[0] == pytest.approx(2.0 / 3000)
        shown = texts(figure)
        assert (
            "Layer 7, q_proj is above its ceiling: condition 9,000, allowed 3,000" in shown
            and "α = " in shown
        )
        panels = {
            axes.get_title(loc="left"): axes for axes in (spectrum, tail, place, figure.axes[3])
        }
        marked = [line for line in panels["Among all q_proj"].lines if line.get_marker() == "D"]
        assert [tuple(line.get_data()[0]) + tuple(line.get_data()[1]) for line in marked] == [
            (7, pytest.approx(9000))
        ]

    def test_of_a_matrix_without_a_spectrum_says_so(self, analysed):
        table, values = analysed
        figure = matrices.plot_matrix_page(table, values, table.loc[9], 3000.0)
        assert "NaN or infinite values: there is no spectrum" in texts(figure)

    @pytest.mark.parametrize("metric", ["condition", "sigma_max"])
    def test_of_a_matrix_none_of_whose_like_has_a_number_is_still_drawn(self, analysed, metric):
        table, values = analysed
        unknown = table.assign(
            finite=False,
            condition=np.nan,
            sigma_max=0.0 if metric == "sigma_max" else np.nan,
            metric=metric,
        )
        figure = matrices.plot_matrix_page(unknown, values, unknown.loc[9], 3000.0)
        assert "there is no spectrum" in texts(figure)

    def test_of_16_bit_weights_has_a_dash_for_what_is_not_known(self, analysed):
        table, values = analysed
        rows = table.assign(condition_reliable=False)
        figure = matrices.plot_matrix_page(rows, values, rows.loc[7], 0.0)
        shown = [text.get_text() for axes in figure.axes for text in axes.texts]
        cells = {
            name: shown[shown.index(name) + 1 : shown.index(name) + 3]
            for name in ("condition", "smallest σ", "stable rank")
        }
        assert (
            cells["condition"] == cells["smallest σ"] == ["–", "–"]
            and "–" not in cells["stable rank"]
        )


def clamp_history(layers=120) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "layer": layer,
            "role": role,
            "step": step,
            "raised": layer if role == "q_proj" and step == 40 else 0,
        }
        for layer in (*range(layers), HEAD_LAYER)
        for role in BLOCK_ROLES
        for step in (20, 40, 60)
    )


def test_the_clamp_map_has_a_cell_a_layer_and_event():
    figure = matrices.plot_clamp_map(clamp_history())
    panels = {
        axes.get_title(loc="left").split("\n")[0]: axes for axes in figure.axes if axes.images
    }
    assert list(panels) == list(BLOCK_ROLES)
    cells = panels["q_proj"].images[0].get_array()
    assert cells.shape == (120, 3) and list(cells[:, 1].compressed()) == list(range(1, 120))
    assert panels["o_proj"].images[0].get_array().mask.all() and "7,140 raised" in panels[
        "q_proj"
    ].get_title(loc="left")
    # the last role drawn does not cut the layers that it lacks from the axis all share
    history = clamp_history()
    shorter = history[(history.role != "down_proj") | (history.layer < 9)]
    assert matrices.plot_clamp_map(shorter).axes[0].get_ylim() == (119.5, -0.5)
    with pytest.raises(ValueError, match="no clamp events"):
        matrices.plot_clamp_map(pd.DataFrame())


def test_swapped_copies_are_drawn_with_their_intervals():
    pairs = [(0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 1), (1, 0, 2), (1, 1, 2)]
    frame = pd.DataFrame(pairs, columns=["source_layer", "copy_a", "copy_b"])
    alike = frame.assign(
        output_cka=0.9, output_chance=0.1, update_cka=np.linspace(0.2, 0.7, 6), update_chance=0.05
    )
    swaps = frame.assign(loss=4.0, change=np.arange(6) / 10, low=-0.05, high=1.0)
    figure = matrices.plot_block_function(alike, swaps)
    update, change = figure.axes[1], figure.axes[2]
    np.testing.assert_allclose(update.lines[0].get_ydata(), alike.update_cka)
    np.testing.assert_allclose(update.lines[1].get_ydata(), [0.3, 0.6])
    heights = sorted(
        float(y) for container in change.containers for y in container.lines[0].get_ydata()
    )
    np.testing.assert_allclose(heights, swaps.change)
    assert "1 copy apart" in texts(figure) and "2 copies apart" in texts(figure)


def test_a_choice_is_drawn_among_its_like(analysed):
    table, values = analysed
    tables, spectra_of = {"stack": table, "trained": table}, {"stack": values, "trained": values}
    figure = matrices.plot_choice(tables, spectra_of, "trained", 3, "q_proj", "condition")
    spectrum, depth = figure.axes
    assert {line.get_label() for line in spectrum.lines} == {"stack", "trained"}
    assert all(list(line.get_xdata()) == list(range(1, 25)) for line in spectrum.lines)
    [chosen] = [line for line in depth.lines if line.get_marker() == "D"]
    assert list(chosen.get_xdata()) == [3] and chosen.get_ydata()[0] == pytest.approx(803)
    assert "not finite" in texts(
        matrices.plot_choice(tables, spectra_of, "trained", 9, "q_proj", "condition")
    )


def test_a_choice_is_drawn_beside_the_layer_of_the_source_it_is_a_copy_of(analysed):
    table, values = analysed
    source = {key: sigma for key, sigma in values.items() if key[0] < 30}
    figure = matrices.plot_choice(
        {"source": table[table.layer < 30], "trained": table},
        {"source": source, "trained": values},
        "trained",
        65,
        "q_proj",
        "condition",
    )
    [line] = [line for line in figure.axes[0].lines if line.get_label() == "source, layer 5"]
    np.testing.assert_array_equal(line.get_ydata(), values[5, "q_proj"])


def test_the_other_checkpoints_of_a_choice_are_told_apart(analysed):
    table, values = analysed
    names = ("source", "stack", "trained")
    figure = matrices.plot_choice(
        dict.fromkeys(names, table),
        dict.fromkeys(names, values),
        "trained",
        3,
        "q_proj",
        "condition",
    )
    assert len({line.get_linestyle() for line in figure.axes[0].lines}) == 3
