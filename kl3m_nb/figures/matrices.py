"""Figures of single matrices and of what was done to them: the page of one matrix, clamp events by
layer, copies at work.

Their look is that of `figures`; keys of spectra are those of `spectra.spectrum_key`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kl3m_nb.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    plain_log_axis,
    step_axis,
    styled,
)
from kl3m_nb.model.roles import HEAD_LAYER, ROLES
from kl3m_nb.spectra.findings import headline
from kl3m_nb.spectra.singular_values import spectrum_key

_SHOWN_METRICS = {
    "sigma_max": "σ₁",
    "sigma_min": "smallest σ",
    "condition": "condition",
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
    "participation_ratio": "participation ratio",
    "entropy": "entropy (0-1)",
    "max_over_median": "σ₁ / median σ",
    "alpha": "tail exponent α",
}


@styled
def plot_matrix_page(
    table: pd.DataFrame,
    singular_values: Mapping[tuple[int, str], np.ndarray],
    row: pd.Series,
    ceiling: float,
    source_values: np.ndarray | None = None,
) -> Figure:
    """A page on one matrix: its spectrum with its bounds, the tail of its eigenvalues, its place
    among its role, its numbers.

    `table` and `singular_values` are those of `spectra.analyse_model`, `row` a row of `table` or of
    `findings.ill_matrices` (whose `reason` then stands in the title), `ceiling` its
    max_condition (0: not clamped), `source_values` the spectrum of the source's matrix when there
    is one. A matrix that is zero or not finite has no spectrum to draw, and its page says so.
    """
    figure = plt.figure(figsize=(11, 7.2))
    spectrum, tail, place, numbers = figure.subplots(2, 2, width_ratios=(3, 2)).T.flat[[0, 2, 1, 3]]
    values = singular_values[spectrum_key(row["layer"], row["role"], row["expert"])]
    figure.suptitle(headline(row), x=0.01, ha="left")
    if not values[0] > 0:
        why = "all zero" if values[0] == 0 else "NaN or infinite values"
        for axes, text in ((spectrum, f"{why}: there is no spectrum"), (tail, "")):
            axes.text(
                0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=VERMILLION
            )
            axes.set_xticks([])
            axes.set_yticks([])
    else:
        _draw_spectrum(spectrum, values, row, ceiling, source_values)
        _draw_tail(tail, values, row)
    _draw_place(place, table, row)
    _write_numbers(numbers, table, row)
    return figure


def _draw_spectrum(
    axes: Axes, values: np.ndarray, row: pd.Series, ceiling: float, source_values: np.ndarray | None
) -> None:
    index = np.arange(1, len(values) + 1)
    if source_values is not None and source_values[0] > 0:
        axes.plot(index, source_values, color=GREY, linewidth=3.5, alpha=0.5, label="its source's")
    positive = values > 0
    axes.plot(index[positive], values[positive], color=BLUE, label="singular values")
    axes.axhline(
        row["mp_edge"],
        color=GREEN,
        linestyle="--",
        linewidth=1.2,
        label="largest of pure noise (Marchenko-Pastur)",
    )
    if ceiling:
        axes.axhline(
            values[0] / ceiling,
            color=VERMILLION,
            linestyle=":",
            linewidth=1.6,
            label=f"clamp: σ₁ / {ceiling:,.0f}",
        )
    plain_log_axis(axes.yaxis)
    axes.set_xlabel("index i")
    axes.set_ylabel("σᵢ")
    axes.set_title("Spectrum")
    axes.legend(
        fontsize=9,
        loc="lower left",
        bbox_to_anchor=(0.02, 0.08),
        frameon=True,
        framealpha=1,
        edgecolor="none",
    )


def _draw_tail(axes: Axes, values: np.ndarray, row: pd.Series) -> None:
    eigenvalues = np.sort(values[values > 0] ** 2)
    share = 1 - np.arange(len(eigenvalues)) / len(eigenvalues)
    axes.plot(eigenvalues, share, ".", color=BLUE, markersize=4)
    if np.isfinite(row.get("alpha", np.nan)):
        inside = eigenvalues[eigenvalues >= row["alpha_xmin"]]
        fitted = len(inside) / len(eigenvalues) * (inside / row["alpha_xmin"]) ** (1 - row["alpha"])
        axes.plot(
            inside,
            fitted,
            color=VERMILLION,
            label=f"α = {row['alpha']:.2f}, D = {row['alpha_D']:.3f}",
        )
        axes.legend(fontsize=9)
    axes.set_ylim(0.7 / len(eigenvalues), 1.4)
    plain_log_axis(axes.xaxis)
    plain_log_axis(axes.yaxis)
    axes.set_xlabel("eigenvalue λ = σ²")
    axes.set_ylabel("share of eigenvalues ≥ λ")
    axes.set_title("Tail")


def _draw_place(axes: Axes, table: pd.DataFrame, row: pd.Series) -> None:
    of_role = table[
        (table["role"] == row["role"]) & (table["expert"] == row["expert"])
    ].sort_values("layer")
    metric = row.get("metric", "condition")
    known = of_role[np.isfinite(of_role[metric])]
    axes.plot(known["layer"], known[metric], ".-", color=GREY, linewidth=0.8, markersize=5)
    if np.isfinite(row[metric]):
        axes.plot(
            row["layer"], row[metric], "D", color=VERMILLION, markeredgecolor=BLACK, markersize=8
        )
    else:
        axes.axvline(row["layer"], color=VERMILLION)
    plain_log_axis(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel(_SHOWN_METRICS[metric])
    axes.set_title(f"Among all {row['role']}")


def _write_numbers(axes: Axes, table: pd.DataFrame, row: pd.Series) -> None:
    of_role = table[table["role"] == row["role"]]
    lines: list[tuple[str, ...]] = [("", "this", "role's median")]
    for column, name in _SHOWN_METRICS.items():
        if column in row:
            any_precision = column not in ("condition", "sigma_min")
            this = row[column] if any_precision or row["condition_reliable"] else math.nan
            values = (
                this,
                of_role.loc[of_role["condition_reliable"] | any_precision, column].median(),
            )
            lines.append(
                (name, *("–" if math.isnan(value) else f"{value:,.4g}" for value in values))
            )
    lines.append(("shape", f"{row['rows']} × {row['cols']}", row["dtype"]))
    axes.axis("off")
    for line, cells in enumerate(lines):
        for x, text, side in zip((0.0, 0.62, 1.0), cells, ("left", "right", "right"), strict=True):
            weight = "bold" if line == 0 else "normal"
            axes.text(
                x,
                1 - line / len(lines),
                text,
                ha=side,
                va="top",
                fontsize=10,
                weight=weight,
                transform=axes.transAxes,
            )


@styled
def plot_clamp_map(history: pd.DataFrame) -> Figure:
    """Where and when the clamp raised singular values: a panel a role, layers × clamp events,
    coloured by how many.

    `history` is what `history.clamp_history` returns. Raises ValueError when it is empty.
    """
    if history.empty:
        raise ValueError("The run logged no clamp events; there is nothing to draw.")
    blocks = history[history["layer"] != HEAD_LAYER]
    roles = [role for role in ROLES if role in set(blocks["role"])]
    most = max(float(blocks["raised"].max()), 2.0)
    shades = ListedColormap(
        plt.get_cmap("cividis_r")(np.linspace(0.3, 1.0, 256))
    )  # one that is raised is no shade of white
    figure, axes = plt.subplots(
        1, len(roles), figsize=(1.75 * len(roles) + 1.2, 5.2), sharey=True, squeeze=False
    )
    steps = np.sort(blocks["step"].unique())
    half = 0.5 * np.diff(steps).min(initial=max(1, steps[-1] - steps[0]))
    for panel, role in zip(axes[0], roles, strict=True):
        of_role = blocks[blocks["role"] == role]
        grid = of_role.pivot_table(index="layer", columns="step", values="raised", aggfunc="max")
        edges = (
            grid.columns[0] - half,
            grid.columns[-1] + half,
            grid.index[-1] + 0.5,
            grid.index[0] - 0.5,
        )
        image = panel.imshow(
            grid.where(grid > 0),
            aspect="auto",
            extent=edges,
            norm=LogNorm(1, most),
            interpolation="nearest",
            cmap=shades,
        )
        panel.grid(visible=False)
        panel.set_title(f"{role}\n{int(of_role['raised'].sum()):,} raised", fontsize=10.5)
        step_axis(panel)
        panel.xaxis.set_major_locator(MaxNLocator(2, integer=True))
        panel.set_xlabel("step")
    # every picture sets the shared axis to its own layers
    axes[0, 0].set_ylim(blocks["layer"].max() + 0.5, blocks["layer"].min() - 0.5)
    axes[0, 0].yaxis.set_major_locator(MaxNLocator(13, integer=True))
    axes[0, 0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes, pad=0.01, label="singular values raised (white: none)")
    plain_log_axis(bar.ax.yaxis)
    return figure


@styled
def plot_block_function(similarity: pd.DataFrame, swaps: pd.DataFrame) -> Figure:
    """Do the copies still compute the same: CKA of what pairs of copies add, and the loss when they
    change places.

    `similarity` is what `block_function.block_similarity` returns, `swaps` what
    `block_function.swap_loss` returns. Dots are pairs of copies, the line is their mean over a
    source block; dashes mark what unrelated positions give, bars the 95% interval.
    """
    figure, panels = plt.subplots(1, 3, figsize=(12.5, 4.4))
    for axes, kind, title in (
        (panels[0], "output", "Residual stream behind"),
        (panels[1], "update", "What the block adds"),
    ):
        mean = similarity.groupby("source_layer")[f"{kind}_cka"].mean()
        axes.plot(
            similarity["source_layer"],
            similarity[f"{kind}_cka"],
            "o",
            color=BLUE,
            markersize=4,
            alpha=0.6,
        )
        axes.plot(mean.index, mean, color=BLUE)
        chance = similarity[f"{kind}_chance"].mean()
        axes.axhline(chance, color=BLACK, linestyle=(0, (6, 4)), linewidth=0.9)
        axes.annotate(
            "chance",
            (1, chance),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
        )
        axes.set_ylim(0, 1.03)
        axes.set_ylabel("linear CKA of two copies")
        axes.set_title(title)
    gaps = swaps["copy_b"] - swaps["copy_a"]
    apart = (gaps - (gaps.max() + 1) / 2) * 0.6 / max(gaps.max(), 1)
    for gap, color in zip(
        sorted(gaps.unique()), (BLUE, ORANGE, VERMILLION, GREEN, BLACK, GREY) * 20, strict=False
    ):
        of_gap = swaps[gaps == gap]
        bars = np.abs(of_gap[["low", "high"]].to_numpy().T - of_gap["change"].to_numpy())
        label = f"{gap} {'copy' if gap == 1 else 'copies'} apart"
        panels[2].errorbar(
            of_gap["source_layer"] + apart[gaps == gap],
            of_gap["change"],
            bars,
            fmt="o",
            color=color,
            markersize=4,
            linewidth=1,
            label=label,
        )
    panels[2].axhline(0, color=BLACK, linewidth=0.8)
    panels[2].set_ylabel("change of the loss (nats)")
    panels[2].set_title("Two copies swapped")
    panels[2].legend(fontsize=9)
    for axes in panels:
        axes.set_xlabel("source block")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure


@styled
def plot_choice(
    tables: Mapping[str, pd.DataFrame],
    singular_values: Mapping[str, Mapping[tuple[int, str], np.ndarray]],
    checkpoint: str,
    layer: int,
    role: str,
    metric: str,
) -> Figure:
    """One matrix among its like: its spectrum in every checkpoint that has it, and `metric` of its
    role over depth.

    Of a less deep checkpoint, the source, it is that of layer i mod L.

    `tables` and `singular_values` hold, by checkpoint, what `spectra.analyse_model` returns; `role`
    carries the expert, as in `spectra.spectrum_key`. The chosen checkpoint and layer are drawn in
    colour, the others in grey and told apart by dashes.
    """
    figure, (spectrum, depth) = plt.subplots(1, 2, figsize=(11.5, 4.3))
    dashes = itertools.cycle(("--", ":", "-."))
    for name, values in singular_values.items():
        counterpart = (
            layer if layer == HEAD_LAYER else layer % (1 + max(number for number, _ in values))
        )
        other = values.get((counterpart, role))
        if other is not None and other[0] > 0 and name != checkpoint:
            label = name if counterpart == layer else f"{name}, layer {counterpart}"
            spectrum.plot(
                np.arange(1, len(other) + 1),
                other,
                color=GREY,
                linewidth=1,
                label=label,
                linestyle=next(dashes),
            )
    chosen = singular_values[checkpoint][layer, role]
    if not np.isfinite(chosen[0]):
        spectrum.text(
            0.5,
            0.5,
            "not finite: no spectrum",
            ha="center",
            transform=spectrum.transAxes,
            color=VERMILLION,
        )
    else:
        spectrum.plot(
            np.arange(1, len(chosen) + 1), chosen, color=BLUE, label=checkpoint, linewidth=2.2
        )
        plain_log_axis(spectrum.yaxis)
        spectrum.legend(fontsize=9)
    place = "LM head" if layer == HEAD_LAYER else f"layer {layer}, {role}"
    spectrum.set_title(f"Spectrum: {place}")
    spectrum.set_xlabel("index i")
    spectrum.set_ylabel("σᵢ")
    keys = [
        spectrum_key(*key)
        for key in tables[checkpoint][["layer", "role", "expert"]].itertuples(index=False)
    ]
    of_role = tables[checkpoint][[key[1] == role for key in keys]].sort_values("layer")
    known = of_role[np.isfinite(of_role[metric])]
    depth.plot(known["layer"], known[metric], "-", color=GREY, linewidth=0.8)
    for here, style in (
        (known["layer"] != layer, (".", GREY, 6)),
        (known["layer"] == layer, ("D", VERMILLION, 8)),
    ):
        marker, color, size = style
        depth.plot(known["layer"][here], known[metric][here], marker, color=color, markersize=size)
    if len(known) and known[metric].min() > 0 and known[metric].max() > 20 * known[metric].min():
        plain_log_axis(depth.yaxis)
    depth.set_title(f"{metric} of {role} in {checkpoint}")
    if layer == HEAD_LAYER:  # stands at no depth
        depth.set_xticks([HEAD_LAYER], ["LM head"])
    else:
        depth.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        depth.set_xlabel("layer")
    depth.set_ylabel(metric)
    return figure
