"""The look and the saving of figures: what is written, what can be read back, and what is left
behind.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from kl3m_nb.figures import style


@style.styled
def a_figure():
    figure, axes = plt.subplots(figsize=(2, 1.5))
    axes.plot([1, 2, 3])
    return figure


def test_a_figure_is_saved_as_picture_page_and_numbers(tmp_path):
    data = pd.DataFrame(
        {"step": [1, 2, 3], "loss": [1 / 3, 1e-17, np.nan], "role": ["q_proj", "a, b", ""]}
    )
    path = style.save_figure(a_figure(), tmp_path / "new" / "figures", "loss", data).path
    assert path == tmp_path / "new" / "figures" / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG") and path.with_suffix(
        ".pdf"
    ).read_bytes().startswith(b"%PDF")
    back = pd.read_csv(path.with_suffix(".csv"), keep_default_na=False, na_values={"loss": [""]})
    pd.testing.assert_frame_equal(back, data, check_exact=True, check_dtype=False)


def test_the_same_figure_gives_the_same_files(tmp_path):
    data = pd.DataFrame({"x": [1]})
    first, second = (
        style.save_figure(a_figure(), tmp_path / name, "figure", data).path for name in "ab"
    )
    for suffix in (".png", ".pdf", ".csv"):
        assert first.with_suffix(suffix).read_bytes() == second.with_suffix(suffix).read_bytes()


def test_drawing_leaves_no_open_figure_and_no_changed_setting():
    before = dict(plt.rcParams)
    figure = a_figure()
    assert plt.get_fignums() == [] and dict(plt.rcParams) == before
    assert not figure.axes[0].spines["top"].get_visible()  # drawn in the style all the same


def test_an_error_while_drawing_leaves_no_changed_setting():
    @style.styled
    def broken():
        raise ValueError("no data")

    before = dict(plt.rcParams)
    with pytest.raises(ValueError, match="no data"):
        broken()
    assert dict(plt.rcParams) == before


def test_use_style_sets_the_style_for_good():
    with plt.rc_context():
        style.use_style()
        assert plt.rcParams["image.cmap"] == "cividis" and plt.rcParams["pdf.fonttype"] == 42


def luminance_gaps(colors) -> float:
    """Smallest CIE L* a* b* distance between two colours, as a person without red cones sees them
    (Viénot et al. 1999).
    """
    rgb = np.array([plt.matplotlib.colors.to_rgb(color) for color in colors])
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    seen = (
        linear @ np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]).T
    )
    xyz = (
        seen
        @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
        / [0.9505, 1, 1.089]
    )
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lab = np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1
    )
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    return distances[~np.eye(len(colors), dtype=bool)].min()


def test_the_palette_survives_red_blindness():
    assert luminance_gaps(style.SEQUENCE) > 10
    assert (
        luminance_gaps(["#D62728", "#2CA02C", "#8C564B"]) < 25
    )  # the measure can tell: red, green and brown come close


def test_roles_of_one_group_differ_in_colour_and_in_dash():
    for roles in (("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")):
        lines = [style.ROLE_LINES[role] for role in roles]
        assert (
            len({line["color"] for line in lines})
            == len({line["linestyle"] for line in lines})
            == len(roles)
        )


@pytest.mark.parametrize("highest", [0.004, 0.02, 0.11, 0.175, 0.9, 1.0])
def test_ticks_of_shares_say_exactly_where_they_stand(highest):
    figure, axes = plt.subplots()
    plt.close(figure)
    axes.plot([0, highest])
    style.percent_axis(axes.yaxis)
    figure.canvas.draw()
    shown = [(label.get_text(), label.get_position()[1]) for label in axes.get_yticklabels()]
    assert len(shown) > 3 and all(
        text.endswith("%") and abs(float(text[:-1]) / 100 - at) < 1e-9 for text, at in shown
    )


@pytest.mark.parametrize("values", [[], [np.nan], [0.0, -1.0]])
def test_an_axis_without_a_positive_value_stays_linear(values):
    figure, axes = plt.subplots()
    plt.close(figure)
    axes.plot(range(len(values)), values)
    style.plain_log_axis(axes.yaxis)
    figure.canvas.draw()
    assert axes.get_yscale() == "linear"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.3, 4.0), ["0.5", "1", "2"]),
        ((1e-3, 5.0), ["0.001", "0.01", "0.1", "1"]),
        ((5, 20_000), ["1,000"]),
    ],
)
def test_a_log_axis_has_plain_numbers(values, expected):
    figure, axes = plt.subplots()
    plt.close(figure)
    axes.plot(values, values)
    style.plain_log_axis(axes.yaxis)
    figure.canvas.draw()
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert (
        axes.get_yscale() == "log"
        and set(expected) <= set(shown)
        and not any("\\" in text for text in shown)
    )
