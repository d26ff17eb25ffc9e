"""Figures of spectra: condition by layer and role, spectra over depth, the copies of a block,
divergence, inheritance.

Drawn for 120 layers as for 12: layers run along an axis, are numbered sparsely, and the borders
between copies are marked. Their look is that of `figures`. Spectra are keyed as
`spectra.spectrum_key` says: (layer, role).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from kl3m_nb.figures.style import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    ROLE_LINES,
    SEQUENCE,
    VERMILLION,
    plain_log_axis,
    step_axis,
    styled,
)
from kl3m_nb.model.roles import HEAD_LAYER, ROLES
from kl3m_nb.profiles import ATTENTION_ROLES, MLP_ROLES
from kl3m_nb.spectra.findings import size_text
from kl3m_nb.spectra.history import AT_CEILING, FAR_ABOVE_CEILING

MOST_COPIES = 24  # that `plot_copies` draws


_RIDGES = 30  # in one panel


_ACROSS = 6  # copies beside each other


@styled
def plot_condition_heatmap(
    spectra: pd.DataFrame, ceilings: Mapping[str, float], enforced: bool = True
) -> Figure:
    """Condition number σ₁/σ_min by layer and role, attention and MLP on a scale each.

    Cells at their clamp ceiling, or more than 15% above it, are marked. `spectra` is what
    `spectra.model_spectra` returns, `ceilings` maps roles to their max_condition (0 for a role that
    is not clamped). With `enforced` False they are shown for reference, and nothing is marked. Of a
    mixture the worst expert is shown. A scale ends at ten times its median, or a little above the
    ceiling; what lies beyond is red. Conditions of 16-bit weights are drawn and never marked, with
    a warning in the title.
    """
    grid = _role_grid(spectra, "condition")
    judged = _role_grid(
        spectra.assign(judged=spectra["condition"].where(spectra["condition_reliable"])), "judged"
    )
    limits = pd.Series({role: ceilings.get(role, 0.0) for role in grid.index})
    share = judged.div(limits.where((limits > 0) & enforced), axis="index")
    groups = [
        [role for role in roles if role in grid.index] for roles in (ATTENTION_ROLES, MLP_ROLES)
    ]
    groups = [roles for roles in groups if roles]
    figure, panels = plt.subplots(
        len(groups),
        1,
        figsize=(13, 5),
        sharex=True,
        squeeze=False,
        height_ratios=[len(roles) for roles in groups],
    )
    size = min(8.0, 600 / grid.shape[1])
    marks = (
        ((share >= AT_CEILING) & (share <= FAR_ABOVE_CEILING), "o", ORANGE, "at the ceiling"),
        (
            share > FAR_ABOVE_CEILING,
            "X",
            VERMILLION,
            f"more than {FAR_ABOVE_CEILING - 1:.0%} above the ceiling",
        ),
    )
    for axes, roles in zip(panels[:, 0], groups, strict=True):
        low, high, extend = _condition_limits(grid.loc[roles].to_numpy(), limits[roles].max())
        shown = grid.loc[roles].clip(low, 1.01 * high)
        image = _heatmap(
            axes,
            shown,
            spectra,
            LogNorm(low, high),
            plt.get_cmap("cividis").with_extremes(over=VERMILLION),
        )
        bar = figure.colorbar(image, ax=axes, pad=0.01, extend=extend, label="condition number")
        plain_log_axis(bar.ax.yaxis)
        for mask, marker, color, text in marks:
            rows, layers = np.nonzero(mask.loc[roles].to_numpy())
            style = {
                "color": color,
                "markeredgecolor": BLACK,
                "markeredgewidth": 0.5,
                "markersize": size,
            }
            label = f"{text}: {int(mask.to_numpy().sum())} of {grid.size} matrices"
            axes.plot(
                layers,
                rows,
                marker,
                label=label if share.notna().any(axis=None) and roles is groups[0] else "",
                **style,
            )
        for ceiling in sorted(set(limits[roles]) - {0.0}):
            named = ", ".join(_short(role) for role in roles if limits[role] == ceiling)
            on_scale = low <= ceiling <= high
            if on_scale:  # across the bar and its frame, which at the scale's end would hide it
                bar.ax.axhline(
                    ceiling,
                    -0.7,
                    1.4,
                    color=VERMILLION,
                    linewidth=2,
                    clip_on=False,
                    in_layout=False,
                    zorder=5,
                )
            text = f"ceiling {ceiling:,.0f}{'' if enforced else ' (for reference)'}: {named}"
            axes.plot(
                [],
                [],
                color=VERMILLION,
                linewidth=2,
                label=text if on_scale else f"{text} (beyond the scale)",
            )
        if roles is not groups[-1]:
            axes.set_xlabel("")
    panels[0, 0].set_title(
        _remarks(spectra, ceilings if enforced else {}), fontsize=10.5, fontweight="normal"
    )
    handles = [
        handle
        for axes in panels[:, 0]
        for handle in axes.get_legend_handles_labels()[0]
        if handle.get_label()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _condition_limits(conditions: np.ndarray, ceiling: float) -> tuple[float, float, str]:
    """Ends of a logarithmic scale and the side a colour bar extends: up to ten times their median,
    or a bit above `ceiling`.

    A ceiling close above them is on the scale, and it spans a fifth at least, so that rounding is
    not made a pattern.
    """
    known = conditions[~np.isnan(conditions)]
    if not np.isfinite(known).any():
        return 1.0, 10.0, "max" if known.size else "neither"
    low, middle = known.min(), np.median(known[np.isfinite(known)])
    high = max(known[known <= max(10 * middle, FAR_ABOVE_CEILING * ceiling)].max(), 1.2 * low)
    return (
        low,
        ceiling if high < ceiling < 1.5 * high else high,
        "max" if known.max() > high else "neither",
    )


def _remarks(spectra: pd.DataFrame, ceilings: Mapping[str, float]) -> str:
    remarks = []
    for head in spectra[spectra["role"] == "lm_head"].itertuples():
        ceiling, condition = (
            ceilings.get("lm_head", 0.0),
            size_text(head.condition) if head.condition_reliable else "–",
        )
        remarks.append(
            f"LM head: condition {condition}" + (f" (ceiling {ceiling:,.0f})" if ceiling else "")
        )
    if not_finite := int((~spectra["finite"]).sum()):
        remarks.append(
            f"NaN or infinite values (grey): {not_finite} matri{'x' if not_finite == 1 else 'ces'}"
        )
    if (spectra["finite"] & ~spectra["condition_reliable"]).any():
        remarks.append("16-bit weights: conditions are not reliable")
    return ";   ".join(remarks)


@styled
def plot_ridgeline(singular_values: Mapping[tuple[int, str], np.ndarray], role: str) -> Figure:
    """The spectrum of `role` in every layer, one above the other: density of log σ, with dots at
    the largest and the smallest σ.

    More than 30 layers stand in several panels. Of a singular matrix the dot stands at the smallest
    σ above zero. Raises ValueError for a role that is not there, or whose matrices are all zero or
    not finite.
    """
    layers = _layers_with(singular_values, role)
    spectra = {
        layer: values[values > 0]
        for layer in layers
        if (values := singular_values[layer, role])[0] > 0
    }
    if not spectra:
        raise ValueError(f"Every {role} is zero or not finite; there is no spectrum to draw.")
    low = np.log10(min(values[-1] for values in spectra.values()))
    high = np.log10(max(values[0] for values in spectra.values()))
    margin = 0.04 * (high - low) + 0.05
    grid = np.linspace(low - margin, high + margin, 400)
    densities = {layer: _density(np.log10(values), grid) for layer, values in spectra.items()}
    tallest = max(density.max() for density in densities.values())
    columns = np.array_split(
        np.arange(min(layers), max(layers) + 1),
        math.ceil((max(layers) - min(layers) + 1) / _RIDGES),
    )
    rows = len(columns[0])
    overlap = 1.6 + 0.025 * rows  # height of the tallest ridge, in layers
    size = (9 if len(columns) == 1 else 13, 3.2 + min(6.0, 0.35 * rows))
    figure, panels = plt.subplots(1, len(columns), figsize=size, sharex=True, squeeze=False)
    shades = plt.get_cmap("cividis")(np.linspace(0.0, 0.95, rows))
    for axes, column in zip(panels[0], columns, strict=True):
        for order, (shade, layer) in enumerate(zip(shades, column, strict=False), start=1):
            if layer not in spectra:
                continue
            ridge = layer - overlap * densities[layer] / tallest
            ridge[(10**grid > spectra[layer][0]) | (10**grid < spectra[layer][-1])] = (
                np.nan
            )  # not beyond the spectrum
            axes.fill_between(
                10**grid, layer, ridge, color=shade, alpha=0.9, linewidth=0, zorder=order
            )
            axes.plot(10**grid, ridge, color="white", linewidth=0.9, zorder=order)
            ends = spectra[layer][[0, -1]]
            axes.plot(ends, [layer, layer], color=shade, linewidth=0.8, zorder=order)
            axes.plot(
                ends,
                [layer, layer],
                ".",
                color=VERMILLION,
                markersize=7 if rows <= 15 else 5,
                zorder=rows + 1,
            )
        axes.set_xlim(10 ** grid[0], 10 ** grid[-1])
        plain_log_axis(axes.xaxis)
        axes.set_ylim(column[0] + rows - 1 + 0.04 * rows, column[0] - overlap - 0.3)
        axes.set_yticks([layer for layer in column if layer % _tick_step(rows) == 0])
        axes.grid(axis="y", visible=False)
    figure.supxlabel("singular value σ (dots: largest and smallest)", fontsize=11)
    panels[0, 0].set_ylabel("layer")
    panels[0, 0].set_title(f"Spectra of {role} over depth")
    return figure


@styled
def plot_copies(
    singular_values: Mapping[tuple[int, str], np.ndarray],
    role: str,
    source_layer: int,
    source_layers: int,
) -> Figure:
    """The copies of one source block side by side: above each spectrum on the mean of the copies,
    below its deviation from it.

    More than six copies stand in several rows. A copy that is not finite is left out of the mean.
    Raises ValueError if there is no such block, or if it has more than `MOST_COPIES` copies.
    """
    layers = [
        layer
        for layer in _layers_with(singular_values, role)
        if layer % source_layers == source_layer
    ]
    if not layers:
        raise ValueError(
            f"There is no {role} of source block {source_layer}; blocks go from 0 to"
            f" {source_layers - 1}."
        )
    if len(layers) > MOST_COPIES:
        raise ValueError(
            f"Source block {source_layer} has {len(layers)} copies; side by side can stand"
            f" {MOST_COPIES} at most."
        )
    spectra = np.stack([singular_values[layer, role] for layer in layers])
    finite = np.isfinite(spectra[:, 0])
    mean = spectra[finite].mean(axis=0) if finite.any() else spectra[0]
    index = np.arange(1, len(mean) + 1)
    across, down = min(len(layers), _ACROSS), math.ceil(len(layers) / _ACROSS)
    figure, panels = plt.subplots(
        2 * down,
        across,
        figsize=(3.1 * across + 0.8, 6 * down),
        sharex=True,
        sharey="row",
        squeeze=False,
        height_ratios=(3, 2) * down,
    )
    uppers, lowers = panels[::2], panels[1::2]
    for order, (layer, values) in enumerate(zip(layers, spectra, strict=True)):
        above, below = uppers.flat[order], lowers.flat[order]
        color = SEQUENCE[order % len(SEQUENCE)]
        above.plot(index, mean, color=GREY, linewidth=3.5, alpha=0.5, label="mean of the copies")
        above.plot(index, values, color=color, label=f"layer {layer}")
        number = values[0] / values[-1] if values[-1] > 0 else math.inf
        above.set_title(f"copy {layer // source_layers}: layer {layer}", fontsize=11)
        text = f"condition {size_text(number)}" if finite[order] else "not finite"
        above.text(0.05, 0.06, text, transform=above.transAxes, fontsize=10)
        with np.errstate(divide="ignore", invalid="ignore"):
            below.plot(index, 100 * (values / mean - 1), color=color)
        below.axhline(0, color=GREY, linewidth=1)
        below.set_xlabel("index i")
        below.tick_params(labelbottom=True)
    for unused in (*uppers.flat[len(layers) :], *lowers.flat[len(layers) :]):
        unused.set_axis_off()
    for above in uppers.flat:
        plain_log_axis(above.yaxis)
    for axes, name in (
        (uppers[:, 0], f"σᵢ of {role}\n(grey: mean of the copies)"),
        (lowers[:, 0], "deviation from\nthe mean (%)"),
    ):
        ends = [first.get_ylim() for first in axes]
        for first in axes:
            first.set_ylim(np.min(ends), np.max(ends))
            first.set_ylabel(name)
    return figure


_DIVERGENCE_PANELS = {
    "distance": ("Distance", r"$\|W_a - W_b\|_F$ / mean norm"),
    "movement_cosine": ("Direction of movement", "cosine of the movements"),
    "top_overlap": ("Top subspace", "overlap of the top-k directions"),
    "bottom_overlap": ("Bottom subspace", "overlap of the bottom-k directions"),
}


@styled
def plot_divergence(divergence: pd.DataFrame) -> Figure:
    """Distance, movement and subspace overlap of the copies by role; dashes mark the overlap that
    chance gives.

    `divergence` is what `copies.copy_divergence` returns, or several of them with a column `step`:
    then the steps run along the axis, else the source blocks. Lines are means over pairs of copies
    (and over blocks, where the steps run).
    """
    along, chance = _along(divergence, "source_layer"), []
    panels = [column for column in _DIVERGENCE_PANELS if column in divergence]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.7 * len(panels) + 0.4, 4.6), squeeze=False, sharex=True
    )
    for panel, column in zip(axes[0], panels, strict=True):
        title, unit = _DIVERGENCE_PANELS[column]
        _lines_by_role(panel, divergence, along, column)
        if column.endswith("_overlap"):
            chance = [_mark_chance(panel, divergence)]
            panel.set_ylim(0, 1.03)
        if column == "movement_cosine":
            panel.axhline(0, color=BLACK, linewidth=0.8)
            panel.set_ylim(min(-0.15, 1.1 * panel.get_ylim()[0]), 1.05)
        if column == "distance":
            panel.set_ylim(0, 1.08 * panel.get_ylim()[1])
        panel.set_title(title)
        panel.set_ylabel(unit)
        step_axis(panel)
        if along != "step":
            panel.set_xlabel("source block")
    figure.legend(
        handles=axes[0, 0].get_legend_handles_labels()[0] + chance,
        loc="outside lower center",
        ncols=8,
    )
    return figure


def _mark_chance(axes: Axes, divergence: pd.DataFrame) -> Line2D:
    """Dashes where chance lies, which depends on a role's shape; returns a line whose label tells
    all of it.
    """
    roles_at = divergence.groupby("chance_overlap")["role"].unique()
    told = [
        f"{level:.2f} ({', '.join(_short(role) for role in ROLES if role in roles)})"
        for level, roles in roles_at.items()
    ]
    lines = [
        axes.axhline(level, color=BLACK, linestyle=(0, (6, 4)), linewidth=0.9)
        for level in roles_at.index
    ]
    lines[0].set_label(f"chance {', '.join(told)}" if len(told) > 1 else "chance")
    return lines[0]


@styled
def plot_inheritance(inheritance: pd.DataFrame) -> Figure:
    """How far each spectrum's shape has moved from its source's: over the training steps by role,
    or by layer and role.

    `inheritance` is what `copies.inheritance` returns, or several of them with a column `step`.
    Lines are means over layers.
    """
    unit = "RMSE of ln(σᵢ/σ₁) against the source"
    if _along(inheritance, "layer") == "step":
        figure, axes = plt.subplots(figsize=(9, 4.8))
        _lines_by_role(axes, inheritance, "step", "rmse")
        axes.set_ylim(bottom=0)
        axes.set_ylabel(unit)
        step_axis(axes)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
        return figure
    grid = _role_grid(inheritance, "rmse")
    figure, axes = plt.subplots(figsize=(13, 4.2))
    image = _heatmap(
        axes,
        grid,
        inheritance,
        Normalize(0, max(float(grid.fillna(0.0).to_numpy().max()), 1e-6)),
        "cividis",
    )
    figure.colorbar(image, ax=axes, pad=0.01, label=unit.replace(" against", "\nagainst"))
    heads = inheritance[inheritance["role"] == "lm_head"]
    axes.set_title(
        "" if heads.empty else f"LM head: RMSE {heads['rmse'].max():.3f}",
        fontsize=10.5,
        fontweight="normal",
    )
    return figure


def _along(frame: pd.DataFrame, otherwise: str) -> str:
    if frame.empty:
        raise ValueError("There is nothing to draw; the table is empty.")
    return "step" if "step" in frame and frame["step"].nunique() > 1 else otherwise


def _lines_by_role(axes: Axes, frame: pd.DataFrame, along: str, column: str) -> None:
    base_roles = frame["role"].str.partition("[")[0]  # experts of one role count together
    for role in [role for role in ROLES if role in set(base_roles)]:
        line = frame[base_roles == role].groupby(along)[column].mean()
        marker = "o" if len(line) <= 30 else None
        axes.plot(
            line.index,
            line,
            marker=marker,
            markersize=3.5,
            linewidth=1.5,
            label=role,
            **ROLE_LINES[role],
        )


def _layers_with(singular_values: Mapping[tuple[int, str], np.ndarray], role: str) -> list[int]:
    layers = sorted(layer for layer, name in singular_values if name == role)
    if not layers:
        raise ValueError(
            f"There is no role {role!r}; these spectra have"
            f" {', '.join(sorted({name for _, name in singular_values}))}."
        )
    return layers


def _density(samples: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel density with half of Silverman's bandwidth: spectra have edges that the full
    one would blur.
    """
    spread = (
        min(samples.std(), (np.quantile(samples, 0.75) - np.quantile(samples, 0.25)) / 1.34)
        or samples.std()
    )
    bandwidth = max(0.45 * spread * len(samples) ** -0.2, 1.5 * (grid[1] - grid[0]))
    return np.exp(-0.5 * ((grid[:, None] - samples) / bandwidth) ** 2).sum(axis=1) / (
        len(samples) * bandwidth
    )


def _role_grid(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Roles × layers of the blocks, with the worst expert of a mixture."""
    blocks = frame[frame["layer"] != HEAD_LAYER]
    grid = (
        blocks.groupby([blocks["role"].str.partition("[")[0], "layer"])[column]
        .max()
        .unstack("layer")
    )
    return grid.reindex(index=[role for role in ROLES if role in grid.index])


def _short(role: str) -> str:
    return role.removesuffix("_proj")


def _tick_step(count: int) -> int:
    return next(step for step in (1, 2, 5, 10) if count / step <= 15)


def _heatmap(
    axes: Axes, grid: pd.DataFrame, frame: pd.DataFrame, norm: Normalize, colors: str | Colormap
) -> AxesImage:
    image = axes.imshow(grid, aspect="auto", norm=norm, interpolation="nearest", cmap=colors)
    axes.set_facecolor("#BBBBBB")  # cells without a finite value
    axes.grid(visible=False)
    axes.set_yticks(range(len(grid)), grid.index)
    axes.xaxis.set_major_locator(MaxNLocator(13, integer=True))
    axes.set_xlabel("layer")
    for border in np.arange(len(grid) - 1) + 0.5:
        axes.axhline(border, color="white", linewidth=1.5)
    blocks = frame[frame["layer"] != HEAD_LAYER].drop_duplicates("layer").sort_values("layer")
    for layer in blocks["layer"][blocks["copy"].diff() > 0]:
        axes.axvline(layer - 0.5, color="white", linewidth=2.5)
        axes.axvline(layer - 0.5, color=BLUE, linewidth=1.0)
    return image
