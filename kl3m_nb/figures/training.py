"""Figures of a run: stack, training, objective, clamp, growth. Each function takes a table and
returns a Figure.

Their look is that of `figures`, whose `use_style` and `save_figure` are at hand here too. Figures
of spectra are in `figures.spectra`, those of predictions and samples in `figures.evaluation`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kl3m_nb.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    ROLE_LINES,
    SKY,
    VERMILLION,
    percent_axis,
    plain_log_axis,
    step_axis,
    styled,
)
from kl3m_nb.growth import speedups
from kl3m_nb.model.experts import IDLE
from kl3m_nb.optim.loss import entropy_target_parts
from kl3m_nb.profiles import ATTENTION_ROLES, MLP_ROLES, ObjectiveSpec
from kl3m_nb.spectra.history import was_measured


@styled
def plot_stack_map(order: Sequence[int], source_layers: int) -> Figure:
    """Which source block each target block came from: `order[i]` is the source of target block i,
    below `source_layers`.
    """
    order = np.asarray(order, dtype=int)
    if not order.size or order.min() < 0 or order.max() >= source_layers:
        raise ValueError(
            f"A stack map needs source blocks from 0 to {source_layers - 1}; the order given is"
            f" {order[:8].tolist()} …"
        )
    targets = np.arange(len(order))
    jumps = np.flatnonzero(np.diff(order) < 0) + 1  # where a further copy begins
    figure, axes = plt.subplots(figsize=(12, 2.2 + 3.2 * min(1.0, source_layers / 12)))
    for part in np.split(targets, jumps):
        axes.plot(part, order[part], color=GREY, linewidth=0.8, zorder=1)
    side = min(24.0, 720 / len(order))
    axes.scatter(
        targets, order, s=side**2, c=order, marker="s", edgecolor="white", linewidth=0.4, zorder=2
    )
    if len(order) <= 40:
        for target, block in zip(targets, order, strict=True):
            shade = "white" if block < 0.6 * source_layers else BLACK
            axes.text(
                target,
                block,
                str(block),
                ha="center",
                va="center",
                fontsize=min(11.0, 0.5 * side),
                color=shade,
            )
    if np.array_equal(order, targets % source_layers):
        for copy, part in enumerate(np.split(targets, jumps)):
            axes.text(
                part.mean(),
                1.01,
                f"copy {copy}",
                ha="center",
                va="bottom",
                transform=axes.get_xaxis_transform(),
            )
            if copy:
                axes.axvline(part[0] - 0.5, color=BLACK, linewidth=0.8, linestyle="--")
    axes.set(xlim=(-0.7, len(order) - 0.3), ylim=(source_layers - 0.2, -0.8))
    axes.set(xlabel="block of the target", ylabel="block of the source")
    axes.xaxis.set_major_locator(MaxNLocator(13, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(7, integer=True))
    return figure


@styled
def plot_training(train: pd.DataFrame, held_out: pd.DataFrame) -> Figure:
    """Loss, learning rates, gradient norm and speed over the steps of one run.

    `train` has a row a step or every few steps (step, loss, cross_entropy, lr_muon, lr_aux,
    grad_norm, clip_threshold, tokens_per_second; clipped, skipped: how many steps since the row
    before were); `held_out` a row an evaluation (step, held_out_loss) and may be empty. Raises
    ValueError if `train` is.
    """
    train = _require_rows(train, "training steps")
    figure, ((loss, rates), (norm, speed)) = plt.subplots(2, 2, figsize=(12, 7), sharex=True)
    steps = train["step"]
    _noisy_line(loss, steps, train["cross_entropy"], BLUE, "training cross-entropy")
    loss.plot(steps, _smooth(train["loss"]), "--", color=ORANGE, label="with the regularisers")
    if len(held_out):
        loss.plot(
            held_out["step"],
            held_out["held_out_loss"],
            "o-",
            color=BLACK,
            markersize=4,
            linewidth=1.2,
            label="held-out",
        )
    loss.set(title="Loss", ylabel="nats per token")
    rates.plot(steps, train["lr_muon"], color=BLUE, label="Muon (matrices of the blocks)")
    rates.plot(steps, train["lr_aux"], "--", color=VERMILLION, label="AdamW (the rest)")
    rates.yaxis.set_major_formatter("{x:g}")
    rates.set_ylim(bottom=0)
    rates.set(title="Learning rate", ylabel="learning rate")
    _noisy_line(norm, steps, train["grad_norm"], BLUE, "norm")
    norm.plot(
        steps,
        _smooth(train["clip_threshold"]),
        "--",
        color=BLACK,
        linewidth=1.2,
        label="clip threshold",
    )
    plain_log_axis(norm.yaxis)
    _mark_steps(norm, steps, train["clipped"], 0.03, "|", VERMILLION, "clipped")
    _mark_steps(norm, steps, train["skipped"], 0.10, "x", BLACK, "skipped")
    norm.set(title="Gradient", ylabel="global norm")
    median = train["tokens_per_second"].median()
    _noisy_line(speed, steps, train["tokens_per_second"], BLUE, "per step")
    speed.axhline(median, color=BLACK, linestyle="--", linewidth=1.2, label=f"median {median:,.0f}")
    speed.set_ylim(0, 1.35 * train["tokens_per_second"].quantile(0.98))
    speed.yaxis.set_major_formatter("{x:,.0f}")
    speed.set(title="Speed", ylabel="tokens per second")
    for axes in (norm, speed):
        step_axis(axes)
    for axes in (loss, rates, norm, speed):
        axes.legend()
    return figure


_TERMS = {
    "label_smoothing": "Label smoothing",
    "entropy_bonus": "Entropy bonus",
    "entropy_target": "Entropy target",
    "activation_norm": "Activation norm",
    "router_loss": "Router loss, weighted",
}


@styled
def plot_objective_terms(train: pd.DataFrame, spec: ObjectiveSpec) -> Figure:
    """What each regulariser adds to the loss (nats per token), and the entropy of the predictions
    (bits) with its target.

    Of the entropy target both parts are drawn, as `loss.entropy_target_parts` has them.

    `train` has step, cross_entropy, entropy_bits and the four terms as columns, of a mixture also
    its router_loss. Raises ValueError when it is empty.
    """
    train = _require_rows(train, "training steps")
    below_bits = "router_loss" if "router_loss" in train else "bits"
    figure, axes = plt.subplot_mosaic(
        [
            ["label_smoothing", "entropy_bonus", "bits"],
            ["entropy_target", "activation_norm", below_bits],
        ],
        figsize=(12, 6),
        width_ratios=(1, 1, 1.3),
        sharex=True,
    )
    for (term, title), color in zip(
        _TERMS.items(), (BLUE, VERMILLION, GREEN, ORANGE, PURPLE), strict=True
    ):
        if term in axes:
            _noisy_line(axes[term], train["step"], 1000 * train[term], color, None)
            axes[term].axhline(0, color=BLACK, linewidth=0.8)
            axes[term].set(title=title, ylabel="$10^{-3}$ nats per token")
    parts = 1000 * entropy_target_parts(train, spec)
    for part, dashes in (("spread", "--"), ("offset", ":")):
        axes["entropy_target"].plot(
            train["step"], _smooth(parts[part]), dashes, color=BLACK, linewidth=1.2, label=part
        )
    axes["entropy_target"].legend()
    _noisy_line(
        axes["bits"], train["step"], train["entropy_bits"], BLUE, "entropy of the predictions"
    )
    bits = _smooth(train["cross_entropy"]) / math.log(2)
    axes["bits"].plot(
        train["step"], bits, "-.", color=VERMILLION, label="cross-entropy, for comparison"
    )
    target = f"target {spec.entropy_target_bits:g} bits"
    axes["bits"].axhline(
        spec.entropy_target_bits, color=BLACK, linestyle="--", linewidth=1.2, label=target
    )
    axes["bits"].set_ylim(bottom=0)
    axes["bits"].set(title="Entropy", ylabel="bits per token")
    axes["bits"].legend(loc="lower left")
    for name in ("entropy_target", "activation_norm", below_bits):
        step_axis(axes[name])
    return figure


_GROUPS = {"Attention": ATTENTION_ROLES, "MLP": MLP_ROLES, "LM head": ("lm_head",)}


@styled
def plot_clamp_events(clamp: pd.DataFrame) -> Figure:
    """What the spectral clamp met and did: condition before each clamp by role, and how many
    singular values it raised.

    `clamp` has a row per matrix and event: step, role, sigma_max, sigma_min, raised, max_condition
    and route. A matrix that was certified healthy was not looked at, so it has no condition to
    draw. Raises ValueError when the table is empty.
    """
    clamp = _require_rows(clamp, "clamp events")
    sigma_max, sigma_min = clamp["sigma_max"].astype(float), clamp["sigma_min"].astype(float)
    measured = was_measured(clamp)
    clamp = clamp.assign(condition=(sigma_max / sigma_min.where(sigma_min > 0)).where(measured))
    events = np.sort(clamp["step"].unique())
    groups = {title: roles for title, roles in _GROUPS.items() if clamp["role"].isin(roles).any()}
    figure, axes = plt.subplots(
        2,
        len(groups),
        figsize=(4.2 * len(groups) + 0.6, 6.6),
        sharex=True,
        squeeze=False,
        height_ratios=(3, 2),
    )
    for column, (title, roles) in enumerate(groups.items()):
        condition, raised = axes[:, column]
        condition.sharey(axes[0, 0])
        of_group = clamp[clamp["role"].isin(roles)]
        ceiling = of_group["max_condition"].max()
        condition.axhline(ceiling, color=BLACK, linewidth=1)
        beside = {
            "xycoords": ("axes fraction", "data"),
            "va": "center",
        }  # inside, the curves would run through it
        condition.annotate(f"ceiling\n{ceiling:,.0f}", (1.01, ceiling), fontsize=9, **beside)
        bottom = np.zeros(len(events))
        for role in [role for role in roles if role in set(of_group["role"])]:
            by_step = of_group[of_group["role"] == role].groupby("step")
            worst, median = (
                by_step["condition"].max().dropna(),
                by_step["condition"].median().dropna(),
            )
            marker = "o" if len(worst) <= 30 else None
            condition.plot(
                worst.index, worst, label=role, marker=marker, markersize=4, **ROLE_LINES[role]
            )
            if not median.equals(worst):
                condition.plot(median.index, median, linewidth=0.9, **ROLE_LINES[role])
            counts = by_step["raised"].sum().reindex(events, fill_value=0).to_numpy(dtype=float)
            width = 0.8 * np.diff(events).min(initial=max(1, events[-1] - events[0]))
            raised.bar(events, counts, width, bottom, color=ROLE_LINES[role]["color"])
            bottom += counts
        singular = of_group.loc[measured & (sigma_min <= 0), "step"].drop_duplicates()
        _mark_steps(condition, singular, singular > 0, 0.98, "^", VERMILLION, "singular")
        condition.set_title(title)
        if not bottom.any():
            raised.text(
                0.5, 0.5, "none", color=GREY, ha="center", va="center", transform=raised.transAxes
            )
        raised.set_ylim(0, max(1.0, 1.08 * bottom.max()))
        raised.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        raised.grid(axis="x", visible=False)
        step_axis(raised)
    for condition in axes[0]:
        plain_log_axis(condition.yaxis)
    axes[0, 0].set_ylabel(
        "condition $\\sigma_1/\\sigma_{min}$ before the clamp\n(bold: worst layer, thin: median)"
    )
    axes[1, 0].set_ylabel("singular values raised")
    named = {
        label: handle
        for panel in axes[0]
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named))
    return figure


@styled
def plot_expert_use(experts: pd.DataFrame) -> Figure:
    """How a mixture's router shares out the tokens: each expert of each layer at the last step, and
    each layer over the steps.

    `experts` has a row per step, layer and expert with `share`, of the layer's choices. The least
    share of every layer is a thin line, and a dotted one stands where training warns of an idle
    expert. Raises ValueError when the table is empty.
    """
    experts = _require_rows(experts, "expert shares")
    even = 1.0 / experts["expert"].nunique()
    last = experts[experts["step"] == experts["step"].max()].pivot(
        index="layer", columns="expert", values="share"
    )
    by_layer = experts.groupby(["step", "layer"])["share"].agg(["min", "max"]).unstack("layer")
    figure, (now, over_time) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(2, 3))
    image = now.imshow(last, cmap="PuOr_r", vmin=0, vmax=2 * even, aspect="auto")
    now.set(xlabel="expert", ylabel="layer", title=f"step {experts['step'].max():,}")
    now.set_xticks(range(last.shape[1]))
    now.yaxis.set_major_locator(MaxNLocator(9, integer=True))
    now.grid(visible=False)
    percent_axis(figure.colorbar(image, ax=now, label="share of the layer's choices").ax.yaxis)
    for extreme, color, label in (("max", VERMILLION, "busiest"), ("min", BLUE, "idlest")):
        shares = by_layer[extreme]
        over_time.fill_between(
            shares.index,
            shares.min(axis=1),
            shares.max(axis=1),
            color=color,
            alpha=0.2,
            linewidth=0,
        )
        median = shares.median(axis=1)
        over_time.plot(
            median.index,
            median,
            color=color,
            marker="o",
            markersize=3.5,
            label=f"{label} expert of a layer",
        )
    over_time.plot(by_layer["min"], color=BLUE, linewidth=0.5, alpha=0.6)
    over_time.axhline(
        IDLE * even,
        color=BLACK,
        linewidth=0.9,
        linestyle=":",
        label=f"idle below {IDLE * even:.0%}",
    )
    over_time.axhline(even, color=BLACK, linewidth=0.9, linestyle="--")
    over_time.annotate(
        "even", (1, even), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9
    )
    over_time.set(
        ylim=(0, None), ylabel="share (line: median layer, band: all layers)", title="over the run"
    )
    percent_axis(over_time.yaxis)
    step_axis(over_time)
    over_time.legend()
    return figure


@styled
def plot_growth(
    runs: Mapping[str, pd.DataFrame],
    target_loss: float,
    source: str = "source",
    grown: str = "grown",
    scratch: str = "scratch",
) -> Figure:
    """Held-out loss of the source, the grown and the scratch model over tokens and operations;
    speedups at `target_loss`.

    `runs` maps labels to curves (see `growth`); `source`, `grown` and `scratch` say which label is
    which. The grown run is drawn twice: by its own cost, and shifted by the whole cost of the
    source it was stacked from. A bar through a crossing spans the two evaluations that it lies
    between.
    """
    if missing := [label for label in (source, grown, scratch) if label not in runs]:
        raise ValueError(f"There is no run {missing[0]!r}; the runs given are {', '.join(runs)}.")
    table = speedups.speedups(runs[source], runs[grown], runs[scratch], target_loss)
    figure, panels = plt.subplots(1, len(speedups.COSTS), figsize=(13, 5.2), sharey=True)
    for axes, cost in zip(panels, speedups.COSTS, strict=True):
        costs = table.loc[cost]
        unit, label = _cost_unit(
            cost, max(runs[scratch][cost].max(), runs[grown][cost].max() + costs["source"])
        )
        lines = (
            (source, 0.0, ":", None, GREY, source),
            (scratch, 0.0, "-", "s", VERMILLION, scratch),
            (grown, 0.0, "-", "o", BLUE, f"{grown}: its own cost"),
            (grown, costs["source"], "--", "o", SKY, f"{grown}: with the source's cost"),
        )
        for run, offset, dashes, marker, color, text in lines:
            curve = runs[run]
            dot = "." if len(curve) == 1 else None  # of a published source only the end is known
            axes.plot(
                (curve[cost] + offset) / unit,
                curve["held_out_loss"],
                dashes,
                marker=dot,
                color=color,
                label=text,
            )
            name = "grown" if run == grown else "scratch"
            if marker and not math.isnan(costs[name]):
                low, position, high = (
                    (costs[f"{name}{end}"] + offset) / unit for end in ("_low", "", "_high")
                )
                axes.hlines(target_loss, low, high, color=color, linewidth=5, alpha=0.6, zorder=4)
                axes.plot(
                    [position],
                    [target_loss],
                    marker,
                    color=color,
                    markeredgecolor=BLACK,
                    markersize=8,
                    zorder=5,
                )
                axes.vlines(position, 0, target_loss, color=color, linewidth=1, linestyle=":")
        axes.axhline(
            target_loss,
            color=BLACK,
            linewidth=1,
            linestyle="-.",
            label=f"target loss {target_loss:.2f}",
        )
        axes.set(xlabel=label, xlim=(0, None))
        axes.set_title(_speedup_text(costs), fontsize=10.5)
    losses = pd.concat([curve["held_out_loss"] for curve in runs.values()]).dropna()
    lowest = losses.min()
    top = max(
        target_loss + 0.5,
        runs[grown]["held_out_loss"].quantile(0.95),
        lowest + 0.6 * (losses.max() - lowest),
    )
    panels[0].set(
        ylim=(lowest - 0.06 * (top - lowest), top), ylabel="held-out loss (nats per token)"
    )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _speedup_text(costs: pd.Series) -> str:
    including, excluding = (
        speedups.speedup_in_words(costs, which) for which in ("including", "excluding")
    )
    what = {"tokens": "Tokens", "flops": "Operations"}[costs.name]
    text = (
        f"{what}: speedup {including} with the source's cost\n{excluding} without it; target"
        f" reached by {costs['reached']}\none run of each kind"
    )
    return text.replace("-", "−")


def _cost_unit(cost: str, largest: float) -> tuple[float, str]:
    if cost == "tokens":
        return (1e9, "tokens (billions)") if largest >= 2e9 else (1e6, "tokens (millions)")
    power = math.floor(math.log10(largest)) if largest > 0 else 0
    return 10.0**power, f"compute ($10^{{{power}}}$ FLOP)"


def _require_rows(frame: pd.DataFrame, what: str) -> pd.DataFrame:
    if frame.empty:
        raise ValueError(f"There are no {what} to draw; the table is empty.")
    return frame


def _smooth(y: pd.Series) -> pd.Series:
    """Running median, then mean, over a fortieth of the run: neither a spike nor a slow first step
    bends it; short runs as is.
    """
    window = {"window": max(5, len(y) // 40), "center": True, "min_periods": 1}
    return y if len(y) <= 60 else y.rolling(**window).median().rolling(**window).mean()


def _noisy_line(axes: Axes, x: pd.Series, y: pd.Series, color: str, label: str | None) -> None:
    """A series too noisy to read: pale as it is, strong as its running median; short ones are drawn
    once.
    """
    if len(y) > 60:
        axes.plot(x, y, color=color, alpha=0.25, linewidth=0.7, rasterized=True)
    axes.plot(x, _smooth(y), color=color, label=label)


def _mark_steps(
    axes: Axes,
    steps: pd.Series,
    counts: pd.Series,
    height: float,
    marker: str,
    color: str,
    what: str,
) -> None:
    """Ticks at a fixed height of the panel, one for each of `steps` with a count, and the sum in
    the legend; nothing for zero.
    """
    if number := int(counts.sum()):
        label = f"{what} ({number:,} step{'s' * (number > 1)})"
        steps = steps[counts > 0]
        axes.plot(
            steps,
            np.full(len(steps), height),
            marker,
            color=color,
            transform=axes.get_xaxis_transform(),
            label=label,
        )
