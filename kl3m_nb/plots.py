"""Figures of a run: training, objective, clamp, growth, generation. Each function takes a table and returns a matplotlib Figure.

One style for all (`STYLE`, `ROLE_COLORS`): Okabe and Ito's palette and cividis, which the colour-blind can tell apart, told apart
again by dash or marker so that a grey print can be read. A figure belongs to no window: it is closed for pyplot when it is
returned, is shown as the value of a notebook cell, and does not pile up. Figures of spectra are in `spectral_plots`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kl3m_nb import growth
from kl3m_nb.profiles import ATTENTION_ROLES, MLP_ROLES

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#767676"
SEQUENCE = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK)
ROLE_COLORS = {
    "q_proj": BLUE, "k_proj": SKY, "v_proj": GREEN, "o_proj": BLACK,
    "gate_proj": VERMILLION, "gate_up_proj": VERMILLION, "up_proj": ORANGE, "down_proj": PURPLE, "lm_head": GREY,
}  # fmt: skip
ROLE_DASHES = {
    "q_proj": "-", "k_proj": "--", "v_proj": "-.", "o_proj": ":",
    "gate_proj": "-", "gate_up_proj": "-", "up_proj": "--", "down_proj": "-.", "lm_head": "-",
}  # fmt: skip
STYLE = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": plt.cycler(color=SEQUENCE),
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "image.cmap": "cividis",
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # text stays text: it can be searched and edited
}


def use_style() -> None:
    """Makes the style the default of this process, for figures a notebook draws by itself."""
    plt.rcParams.update(STYLE)


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws in the project's style and hands the figure over without leaving it open in pyplot."""

    @functools.wraps(draw)
    def draw_in_style(*args, **kwargs) -> Figure:
        with plt.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            plt.close(figure)
        return figure

    return draw_in_style


def save_figure(figure: Figure, folder: str | Path, name: str, data: pd.DataFrame) -> Path:
    """Writes `name`.png, `name`.pdf and the figure's numbers as `name`.csv into `folder`; returns the path of the PNG."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure.savefig(folder / f"{name}.png")
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    data.to_csv(folder / f"{name}.csv", index=False)
    return folder / f"{name}.png"


@styled
def plot_training(train: pd.DataFrame, held_out: pd.DataFrame) -> Figure:
    """Loss, learning rates, gradient norm and speed over the steps of one run.

    `train` has a row a step (step, loss, cross_entropy, lr_muon, lr_aux, grad_norm, clip_threshold, clipped, skipped,
    tokens_per_second); `held_out` a row an evaluation (step, held_out_loss) and may be empty. Raises ValueError for an empty `train`.
    """
    train = _require_rows(train, "training steps")
    figure, ((loss, rates), (norm, speed)) = plt.subplots(2, 2, figsize=(12, 7), sharex=True)
    steps = train["step"]
    _noisy_line(loss, steps, train["loss"], ORANGE, "total, with regularisers", dashes="--")
    _noisy_line(loss, steps, train["cross_entropy"], BLUE, "training cross-entropy")
    if len(held_out):
        loss.plot(held_out["step"], held_out["held_out_loss"], "o-", color=BLACK, markersize=4, linewidth=1.2, label="held-out")
    _label(loss, "Loss", "nats per token")
    rates.plot(steps, train["lr_muon"], color=BLUE, label="Muon (matrices of the blocks)")
    rates.plot(steps, train["lr_aux"], "--", color=VERMILLION, label="AdamW (the rest)")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    rates.set_ylim(bottom=0)
    _label(rates, "Learning rate", "learning rate")
    _noisy_line(norm, steps, train["grad_norm"], BLUE, "norm")
    norm.plot(steps, train["clip_threshold"], "--", color=GREY, linewidth=1.2, label="clip threshold")
    norm.set_yscale("log")
    _mark_steps(norm, steps[train["clipped"].astype(bool)], 0.03, "|", VERMILLION, "clipped")
    _mark_steps(norm, steps[train["skipped"].astype(bool)], 0.10, "x", BLACK, "skipped")
    _label(norm, "Gradient", "global norm")
    median = train["tokens_per_second"].median()
    _noisy_line(speed, steps, train["tokens_per_second"], BLUE, "per step")
    speed.axhline(median, color=GREY, linestyle="--", linewidth=1.2, label=f"median {median:,.0f}")
    speed.set_ylim(0, 1.25 * train["tokens_per_second"].quantile(0.98))
    speed.yaxis.set_major_formatter("{x:,.0f}")
    _label(speed, "Speed", "tokens per second")
    for axes in (norm, speed):
        axes.set_xlabel("optimizer step")
    for axes in (loss, rates, norm, speed):
        axes.legend()
    return figure


_TERMS = {
    "label_smoothing": "Label smoothing",
    "entropy_bonus": "Entropy bonus",
    "entropy_target": "Entropy target",
    "activation_norm": "Activation norm",
}


@styled
def plot_objective_terms(train: pd.DataFrame, entropy_target_bits: float = 6.5) -> Figure:
    """What each regulariser adds to the loss (nats per token), and the entropy of the predictions (bits) with its target.

    `train` has step, entropy_bits and the four terms as columns. Raises ValueError when it is empty.
    """
    train = _require_rows(train, "training steps")
    figure, axes = plt.subplot_mosaic(
        [["label_smoothing", "entropy_bonus", "bits"], ["entropy_target", "activation_norm", "bits"]],
        figsize=(12, 6),
        width_ratios=(1, 1, 1.3),
        sharex=True,
    )
    for (term, title), color in zip(_TERMS.items(), (BLUE, VERMILLION, GREEN, ORANGE), strict=True):
        _noisy_line(axes[term], train["step"], train[term], color, None)
        axes[term].axhline(0, color=BLACK, linewidth=0.8)
        axes[term].ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        _label(axes[term], title, "nats per token")
    _noisy_line(axes["bits"], train["step"], train["entropy_bits"], BLUE, "entropy of the predictions")
    axes["bits"].plot(
        train["step"], train["cross_entropy"] / math.log(2), ":", color=GREY, linewidth=1.2, label="cross-entropy, for comparison"
    )
    axes["bits"].axhline(
        entropy_target_bits, color=BLACK, linestyle="--", linewidth=1.2, label=f"target {entropy_target_bits:g} bits"
    )
    axes["bits"].set_ylim(bottom=0)
    _label(axes["bits"], "Entropy", "bits per token")
    axes["bits"].legend()
    for name in ("entropy_target", "activation_norm", "bits"):
        axes[name].set_xlabel("optimizer step")
    return figure


_GROUPS = {"Attention": ATTENTION_ROLES, "MLP": MLP_ROLES, "LM head": ("lm_head",)}


@styled
def plot_clamp_events(clamp: pd.DataFrame) -> Figure:
    """What the spectral clamp met and did: condition before each clamp by role, and how many singular values it raised.

    `clamp` has a row per matrix and event: step, role, sigma_max, sigma_min, tau, raised. The ceiling drawn is the largest σ₁/τ, the
    `max_condition` of the role unless the floor was above it throughout. Raises ValueError when it is empty.
    """
    clamp = _require_rows(clamp, "clamp events")
    clamp = clamp.assign(condition=clamp["sigma_max"] / clamp["sigma_min"].where(clamp["sigma_min"] > 0))
    groups = {title: rows for title, roles in _GROUPS.items() if len(rows := clamp[clamp["role"].isin(roles)])}
    figure, axes = plt.subplots(
        2, len(groups), figsize=(4.2 * len(groups) + 0.6, 6.6), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 2)
    )
    marker = "o" if clamp["step"].nunique() <= 30 else None
    for column, (title, rows) in enumerate(groups.items()):
        condition, raised = axes[:, column]
        for role, role_rows in rows.groupby("role"):
            events = role_rows.groupby("step")
            style = {"color": ROLE_COLORS[role], "linestyle": ROLE_DASHES[role], "marker": marker, "markersize": 4}
            worst = events["condition"].max()
            condition.plot(worst.index, worst, label=role, **style)
            if role_rows.groupby("step").size().max() > 1:
                median = events["condition"].median()
                condition.plot(median.index, median, linewidth=0.9, **(style | {"marker": None}))
            total = events["raised"].sum()
            raised.plot(total.index, total, **style)
        ceiling = (rows["sigma_max"] / rows["tau"]).max()
        condition.axhline(ceiling, color=BLACK, linewidth=1, label=f"ceiling {ceiling:,.0f}")
        condition.set_yscale("log")
        condition.set_title(title)
        condition.legend(fontsize=9)
        raised.set_yscale("symlog", linthresh=1)
        raised.set_ylim(bottom=0)
        raised.set_xlabel("optimizer step")
    axes[0, 0].set_ylabel("condition σ₁/σₘᵢₙ before the clamp\n(bold: worst layer, thin: median)")
    axes[1, 0].set_ylabel("singular values raised")
    return figure


@styled
def plot_growth(
    runs: Mapping[str, pd.DataFrame], target_loss: float, source: str = "source", grown: str = "grown", scratch: str = "scratch"
) -> Figure:
    """Held-out loss of the source, the grown and the scratch model over tokens, FLOPs and time, with the speedups at `target_loss`.

    `runs` maps labels to curves (see `growth`); `source`, `grown` and `scratch` say which label is which. The grown run is drawn
    twice: by its own cost, and shifted by the whole cost of the source it was stacked from.
    """
    if missing := [label for label in (source, grown, scratch) if label not in runs]:
        raise ValueError(f"There is no run {missing[0]!r}; the runs given are {', '.join(runs)}.")
    table = growth.speedups(runs[source], runs[grown], runs[scratch], target_loss)
    figure, panels = plt.subplots(1, len(growth.COSTS), figsize=(14, 5.2), sharey=True)
    for axes, cost in zip(panels, growth.COSTS, strict=True):
        costs = table.loc[cost]
        unit, label = _cost_unit(cost, max(runs[scratch][cost].max(), runs[grown][cost].max() + costs["source"]))
        lines = (
            (source, 0.0, ":", None, GREY, source),
            (scratch, 0.0, "-", "s", VERMILLION, f"{scratch}: from scratch"),
            (grown, 0.0, "-", "o", BLUE, f"{grown}: its own cost"),
            (grown, costs["source"], "--", "o", SKY, f"{grown}: with the source's cost"),
        )
        for run, offset, dashes, marker, color, text in lines:
            curve = runs[run]
            axes.plot((curve[cost] + offset) / unit, curve["held_out_loss"], dashes, color=color, label=text)
            reached = costs["grown"] if run == grown else costs[scratch] if run == scratch else math.nan
            if marker and not math.isnan(reached):
                position = (reached + offset) / unit
                axes.plot([position], [target_loss], marker, color=color, markeredgecolor=BLACK, markersize=8, zorder=5)
                axes.vlines(position, 0, target_loss, color=color, linewidth=1, linestyle=":")
        axes.axhline(target_loss, color=BLACK, linewidth=1, linestyle="-.", label=f"target loss {target_loss:.2f}")
        axes.set_xlim(left=0)
        axes.set_xlabel(label)
        axes.set_title(_speedup_text(costs), fontsize=10.5)
    losses = pd.concat([curve["held_out_loss"] for curve in runs.values()]).dropna()
    lowest = losses.min()
    top = max(target_loss + 0.5, runs[grown]["held_out_loss"].quantile(0.95), lowest + 0.6 * (losses.max() - lowest))
    panels[0].set_ylim(lowest - 0.06 * (top - lowest), top)
    panels[0].set_ylabel("held-out loss (nats per token)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _speedup_text(costs: pd.Series) -> str:
    if costs["reached"] != "both":
        who = {
            "grown only": "reached by the grown model only",
            "scratch only": "reached from scratch only",
            "neither": "never reached",
        }
        return f"{costs.name}: target {who[costs['reached']]}"
    including, excluding = costs["speedup_including_source"], costs["speedup_excluding_source"]
    return f"{costs.name}: speedup {excluding:+.0%}\n{including:+.0%} with the source's cost"


def _cost_unit(cost: str, largest: float) -> tuple[float, str]:
    if cost == "tokens":
        return (1e9, "tokens (billions)") if largest >= 2e9 else (1e6, "tokens (millions)")
    if cost == "seconds":
        return (3600.0, "time (hours)") if largest >= 7200 else (60.0, "time (minutes)")
    power = math.floor(math.log10(largest)) if largest > 0 else 0
    return 10.0**power, f"compute ($10^{{{power}}}$ FLOP)"


@styled
def plot_generation_measures(frame: pd.DataFrame) -> Figure:
    """Bars of every measure of what the models wrote, a panel a measure.

    `frame` has a row per model: `model`, the label, and numeric columns as `generation.measure` gives them; `samples`, their number,
    is told in the title. Raises ValueError for an empty frame or a model that stands twice.
    """
    frame = _require_rows(frame, "measured models")
    if frame["model"].duplicated().any():
        raise ValueError("A model stands in more than one row; give one row per model.")
    measures = [column for column in frame.select_dtypes("number").columns if column != "samples"]
    columns = min(5, len(measures))
    rows = -(-len(measures) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.7 * rows + 0.5), squeeze=False)
    colors = [SEQUENCE[index % len(SEQUENCE)] for index in range(len(frame))]
    for axes, measure in zip(panels.flat, measures, strict=False):
        values = frame[measure].to_numpy(dtype=float)
        bars = axes.bar(range(len(frame)), values, color=colors, width=0.7, label=list(frame["model"]))
        is_share = measure.endswith("_rate") or measure.startswith("distinct_")
        axes.bar_label(bars, fmt="{:.0%}" if is_share else "{:,.3g}", fontsize=9, padding=2)
        axes.set_ylim(0, 1.15 if is_share else 1.2 * max(np.nanmax(values, initial=0), 1e-9))
        axes.set_title(measure.replace("_", " "), fontsize=10.5)
        axes.set_ylabel("share" if is_share else "per second" if measure.endswith("_per_second") else "mean", fontsize=9)
        axes.set_xticks([])
        axes.grid(axis="x", visible=False)
    for axes in panels.flat[len(measures) :]:
        axes.remove()
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(frame))
    if "samples" in frame:
        figure.suptitle(f"{' / '.join(f'{count:,.0f}' for count in frame['samples'].unique())} samples per model", fontsize=11)
    return figure


def _require_rows(frame: pd.DataFrame, what: str) -> pd.DataFrame:
    if frame.empty:
        raise ValueError(f"There are no {what} to draw; the table is empty.")
    return frame


def _label(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_ylabel(unit)


def _noisy_line(axes: Axes, x: pd.Series, y: pd.Series, color: str, label: str | None, dashes: str = "-") -> None:
    """A series too noisy to read: pale as it is, strong as its moving average; short ones are drawn once."""
    if len(y) <= 60:
        axes.plot(x, y, dashes, color=color, label=label)
        return
    axes.plot(x, y, color=color, alpha=0.25, linewidth=0.7, rasterized=True)
    axes.plot(x, y.ewm(span=len(y) / 40).mean(), dashes, color=color, label=label)


def _mark_steps(axes: Axes, steps: pd.Series, height: float, marker: str, color: str, what: str) -> None:
    """Ticks at a fixed height of the panel, one a step, and their number in the legend; nothing when there are none."""
    if len(steps):
        label = f"{what} ({len(steps):,} step{'s' * (len(steps) > 1)})"
        axes.plot(steps, np.full(len(steps), height), marker, color=color, transform=axes.get_xaxis_transform(), label=label)
