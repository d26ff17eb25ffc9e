"""Figures of predictions, samples and their comparison. Each function takes tables and returns a
Figure in the look of `figures`.

A model keeps its colour and marker within a figure; whiskers and bands are 95% intervals over
document families, and left out where a single family gives none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kl3m_nb.evaluation.documents import ENTROPY_TARGET_BITS, Prediction
from kl3m_nb.figures.style import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    SEQUENCE,
    VERMILLION,
    percent_axis,
    plain_log_axis,
    step_axis,
    styled,
)
from kl3m_nb.growth.forecast import Forecast

MARKERS = "osD^vP*"


FEWEST_TOKENS = 20  # a bin of fewer says nothing about calibration


DASHES = ("-", "--", "-.", ":")


def _look(number: int) -> dict:
    return {"color": SEQUENCE[number % len(SEQUENCE)], "marker": MARKERS[number % len(MARKERS)]}


@styled
def plot_prediction(
    predictions: Mapping[str, Prediction], contexts: Mapping[str, pd.DataFrame]
) -> Figure:
    """Bits per byte by domain, what the loss gains when context is cut, and calibration: a colour a
    model.

    `contexts` holds what `documents.worth_of_context` gives of each model. Whiskers of a domain of
    few families run out of the panel. Raises ValueError without a model, or for a model that is not
    in both.
    """
    if not predictions or predictions.keys() != contexts.keys():
        raise ValueError(
            f"plot_prediction was given predictions of {list(predictions)} and contexts of"
            f" {list(contexts)}; give both of the same models, at least one."
        )
    figure, (domains, positions, calibration) = plt.subplots(
        1, 3, figsize=(14, 5), width_ratios=(1.25, 1, 1)
    )
    calibration.plot(
        [0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="as sure as right"
    )
    highest = 0.0
    for number, (name, prediction) in enumerate(predictions.items()):
        look = _look(number)
        _domain_row(
            domains,
            prediction,
            (number - (len(predictions) - 1) / 2) * 0.7 / len(predictions),
            name,
            look,
        )
        context = contexts[name]
        band = {"color": look["color"], "alpha": 0.12, "linewidth": 0}
        positions.fill_between(
            context["context"], context["more_low"], context["more_high"], **band
        )
        positions.plot(
            context["context"],
            context["more"],
            DASHES[number % 4],
            markersize=4,
            label=name,
            **look,
        )
        bins = prediction.calibration[prediction.calibration["tokens"] >= FEWEST_TOKENS]
        sizes = 4 + 10 * np.sqrt(bins["tokens"] / bins["tokens"].max())
        calibration.plot(
            bins["confidence"],
            bins["accuracy"],
            DASHES[number % 4],
            color=look["color"],
            linewidth=1.2,
            label=name,
        )
        calibration.scatter(
            bins["confidence"],
            bins["accuracy"],
            s=sizes**2 / 2,
            color=look["color"],
            marker=look["marker"],
        )
        highest = max(highest, bins["confidence"].max(), bins["accuracy"].max())
    labels = ["all", *next(iter(predictions.values())).by_domain()["domain"]]
    domains.set_yticks(range(len(labels)), labels)
    domains.invert_yaxis()
    effective = next(iter(predictions.values())).bits_per_byte.effective
    domains.set(title=f"By domain ({effective:.1f} families in effect)", xlabel="bits per byte")
    _limit_to_means(domains, predictions)
    positions.set_xscale("log", base=2)
    positions.xaxis.set_major_formatter("{x:,.0f}")
    positions.axhline(0, color=GREY, linewidth=1)
    longest = max(context["context"].max() for context in contexts.values())
    title = "The same tokens, context cut"
    positions.set(
        title=title, xlabel="tokens of context", ylabel=f"nats per token more than with {longest:,}"
    )
    limit = min(1.0, 1.05 * highest)
    calibration.set(
        title="Calibration",
        xlabel="confidence in the likeliest token",
        ylabel="how often it is right",
    )
    calibration.set(xlim=(0, limit), ylim=(0, limit))
    for axis in (calibration.xaxis, calibration.yaxis):
        percent_axis(axis)
    calibration.legend(handles=[calibration.lines[0]], loc="upper left")
    figure.legend(
        *positions.get_legend_handles_labels(), loc="outside lower center", ncols=len(predictions)
    )
    return figure


def _domain_row(axes: Axes, prediction: Prediction, offset: float, name: str, look: dict) -> None:
    table = prediction.by_domain()
    whole = prediction.bits_per_byte
    means = np.array([whole.mean, *table["bits_per_byte"]])
    low = np.array([whole.low, *table["bits_per_byte_low"]])
    high = np.array([whole.high, *table["bits_per_byte_high"]])
    spread = [np.maximum(0, means - low), np.maximum(0, high - means)]
    axes.errorbar(
        means,
        np.arange(len(means)) + offset,
        xerr=spread,
        linestyle="",
        capsize=2.5,
        markersize=6,
        label=name,
        **look,
    )


def _limit_to_means(axes: Axes, predictions: Mapping[str, Prediction]) -> None:
    """Two families leave an interval 13 times its standard error: the axis shows all means and the
    intervals of the whole.
    """
    shown = [
        value
        for prediction in predictions.values()
        for value in prediction.by_domain()["bits_per_byte"]
    ]
    shown += [
        value for prediction in predictions.values() for value in prediction.bits_per_byte[:3]
    ]
    low, high = np.nanmin(shown), np.nanmax(shown)
    if low < high < np.inf:
        axes.set_xlim(low - 0.1 * (high - low), high + 0.1 * (high - low))


@styled
def plot_differences(differences: pd.DataFrame, reference: str, models: Sequence[str]) -> Figure:
    """How far each model is from `reference` in bits per byte, paired by document; left of the line
    is better.

    `differences` is what `comparison.differences_table` returns, `models` the names in the order in
    which the other figures draw them, whose colours they have. Raises ValueError when there are no
    differences.
    """
    if differences.empty:
        raise ValueError("There are no differences to draw; compare at least two models.")
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.55 * len(differences)))
    axes.axvline(0, color=BLACK, linewidth=1)
    for place, row in enumerate(differences.itertuples()):
        spread = [[row.difference - row.low], [row.high - row.difference]]
        axes.errorbar(
            [row.difference], [place], xerr=spread, capsize=4, **_look(models.index(row.model))
        )
        text = (
            f"{row.difference:+.3f}, {row.verdict}; better on {row.better_on:.0%} of the documents"
        )
        text = f"{text}; {row.effective:.1f} families in effect".replace("-", "−")
        axes.annotate(
            text,
            (row.difference, place),
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(differences)), differences["model"])
    axes.set(ylim=(len(differences) - 0.5, -0.7), xlabel=f"bits per byte more than {reference}")
    axes.margins(x=0.35)
    return figure


_MEASURES = {
    "mean_tokens": ("Length", "tokens"),
    "end_rate": ("Ended by itself", "share of texts"),
    "distinct_1": ("Distinct words", "share of words"),
    "distinct_2": ("Distinct pairs", "share of word pairs"),
    "self_bleu": ("Self-BLEU", "BLEU-4"),
    "repetition_rate": ("Repeated phrases", "share of 4-grams"),
    "loop_rate": ("Ended in a loop", "share of texts"),
    "balanced_brackets_rate": ("Balanced brackets", "share of texts"),
    "balanced_quotes_rate": ("Balanced quotes", "share of texts"),
    "numbering_rate": ("Numbers count on", "share of numbers"),
    "terms_used_rate": ("Defined terms used", "share of terms"),
    "citations_rate": ("Citations parse", "share of citations"),
}


@styled
def plot_generation_measures(frame: pd.DataFrame) -> Figure:
    """Bars of every measure of what the models wrote, a panel a measure.

    `frame` has a row per model: `model`, the label, `samples`, their number, and what else
    `writing.measure` gives. Raises ValueError for an empty frame or a model that stands twice.
    """
    if frame.empty:
        raise ValueError("There are no measured models to draw; the table is empty.")
    if frame["model"].duplicated().any():
        raise ValueError("A model stands in more than one row; give one row per model.")
    figure, panels = plt.subplots(2, 6, figsize=(15, 5.9))
    colors = [_look(number)["color"] for number in range(len(frame))]
    for axes, (measure, (title, unit)) in zip(panels.flat, _MEASURES.items(), strict=True):
        values = frame[measure].to_numpy(dtype=float)
        bars = axes.bar(
            range(len(frame)), values, color=colors, width=0.7, label=list(frame["model"])
        )
        is_share = unit.startswith("share")
        if measure in _JUDGED:
            axes.set_xticks(
                range(len(frame)), [f"of {count}" for count in frame[_JUDGED[measure]]], fontsize=8
            )
            axes.tick_params(axis="x", length=0)
        else:
            axes.set_xticks([])
        axes.bar_label(
            bars,
            fmt="{:.0%}" if is_share else "{:,.2g}" if measure == "self_bleu" else "{:,.3g}",
            fontsize=9,
            padding=2,
        )
        axes.set_ylim(0, 1.15 if is_share else 1.2 * max(np.nanmax(values, initial=0), 1e-9))
        if is_share:
            percent_axis(axes.yaxis)
        if np.isnan(values).all():
            axes.text(
                0.5,
                0.5,
                "nothing to judge",
                color=GREY,
                ha="center",
                va="center",
                transform=axes.transAxes,
            )
        axes.set(title=title, ylabel=unit)
        axes.grid(axis="x", visible=False)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(frame)
    )
    figure.suptitle(
        f"{' / '.join(f'{count:,}' for count in frame['samples'].unique())} samples per model",
        fontsize=11,
    )
    return figure


# How many of a set there were to judge: a share of three says little.
_JUDGED = {"numbering_rate": "numbers", "terms_used_rate": "terms", "citations_rate": "citations"}


_SWEPT = (
    "distinct_2",
    "self_bleu",
    "repetition_rate",
    "loop_rate",
    "balanced_brackets_rate",
    "end_rate",
)


@styled
def plot_sampling_sweep(sweep: pd.DataFrame) -> Figure:
    """What temperature, top-p and repetition penalty do to a model's texts: a line a top-p and
    penalty; a star marks the card.

    `sweep` is what `writing.sampling_sweep` returns. Raises ValueError when it is empty.
    """
    if sweep.empty:
        raise ValueError("There are no sampled settings to draw; the table is empty.")
    figure, panels = plt.subplots(2, 3, figsize=(13, 6.4), sharex=True)
    for axes, measure in zip(panels.flat, _SWEPT, strict=True):
        title, unit = _MEASURES[measure]
        for number, ((top_p, penalty), line) in enumerate(
            sweep.groupby(["top_p", "repetition_penalty"])
        ):
            line = line.sort_values("temperature")
            label = f"top-p {top_p:g}" + (
                f", penalty {penalty:g}" if sweep["repetition_penalty"].nunique() > 1 else ""
            )
            look = {"markersize": 5, "clip_on": False, **_look(number)}
            axes.plot(line["temperature"], line[measure], DASHES[number % 4], label=label, **look)
        star = {"color": BLACK, "markersize": 14, "zorder": 5, "clip_on": False}
        advised = sweep[sweep["advised"]]
        axes.plot(advised["temperature"], advised[measure], "*", label="the card's advice", **star)
        if unit.startswith("share"):
            percent_axis(axes.yaxis)
        axes.set(title=title, ylabel=unit)
        axes.set_ylim(
            0, 1.08 * np.nanmax(sweep[measure].to_numpy(dtype=float), initial=0.0) or None
        )
    for axes in panels[-1]:
        axes.set_xlabel("temperature")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return figure


@styled
def plot_entropy_along(entropies: Mapping[str, pd.DataFrame]) -> Figure:
    """Entropy of the prediction along the samples (bold) and surprise at the token drawn (pale): a
    colour a model.

    `entropies` maps labels to what `writing.entropy_along` returns.
    """
    figure, axes = plt.subplots(figsize=(9, 5))
    for number, (name, table) in enumerate(entropies.items()):
        color = _look(number)["color"]
        window = {"window": max(1, len(table) // 12), "center": True, "min_periods": 1}
        axes.plot(
            table["position"],
            table["surprise_bits"].rolling(**window).mean(),
            ":",
            color=color,
            linewidth=1.2,
        )
        axes.plot(
            table["position"],
            table["entropy_bits"].rolling(**window).mean(),
            DASHES[number % 3],
            color=color,
            label=name,
        )
    axes.axhline(
        ENTROPY_TARGET_BITS,
        color=BLACK,
        linewidth=1,
        linestyle="--",
        label=f"training target {ENTROPY_TARGET_BITS:g} bits",
    )
    axes.plot([], [], ":", color=GREY, linewidth=1.2, label="surprise at the token drawn")
    axes.set(xlabel="token of the continuation", ylabel="bits per token")
    axes.set_ylim(bottom=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@styled
def plot_memorisation(gaps: Mapping[str, pd.DataFrame]) -> Figure:
    """Tokens continued verbatim by length of the prefix, in passages given in training and not
    given yet: a panel a model.

    `gaps` maps labels to what `memorisation.memorisation_gap` returns. Raises ValueError without a
    model.
    """
    if not gaps:
        raise ValueError("plot_memorisation was given no models; measure at least one.")
    figure, panels = plt.subplots(
        1, len(gaps), figsize=(1.5 + 4.2 * len(gaps), 4.6), sharey=True, squeeze=False
    )
    for axes, (name, gap) in zip(panels[0], gaps.items(), strict=True):
        for column, label, color, marker, shift in (
            ("given", "given in training", VERMILLION, "o", 0.97),
            ("not_given", "not given yet", BLUE, "s", 1.03),
        ):
            spread = [gap[column] - gap[f"{column}_low"], gap[f"{column}_high"] - gap[column]]
            axes.errorbar(
                gap["prefix"] * shift,
                gap[column],
                yerr=spread,
                color=color,
                marker=marker,
                capsize=3,
                label=label,
            )
        plain_log_axis(axes.xaxis)
        axes.set_xticks(gap["prefix"], [f"{prefix}" for prefix in gap["prefix"]])
        axes.minorticks_off()
        axes.set(
            title=(
                f"{name}: {gap['given_documents'].iloc[0]} documents given,"
                f" {gap['not_given_documents'].iloc[0]} not"
            )
        )
        axes.set_xlabel("tokens of the prefix")
        percent_axis(axes.yaxis)
    panels[0, 0].set_ylabel("identical tokens, position by position")
    panels[0, 0].set_ylim(bottom=0)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@styled
def plot_over_training(curves: Mapping[str, pd.DataFrame], checkpoints: pd.DataFrame) -> Figure:
    """Held-out loss of each run over its steps as it was logged, and how checkpoints evaluated
    afterwards differ from the first.

    `curves` maps labels to tables with step and held_out_loss. `checkpoints`, as
    `comparison.steps_table` gives it, has a row per checkpoint of one run: step, difference, low,
    high. Raises ValueError when it is empty.
    """
    if checkpoints.empty:
        raise ValueError("There are no evaluated checkpoints to draw; evaluate at least one.")
    figure, (logged, evaluated) = plt.subplots(1, 2, figsize=(12, 4.8))
    for number, (name, curve) in enumerate(curves.items()):
        logged.plot(
            curve["step"],
            curve["held_out_loss"],
            DASHES[number % 4],
            markersize=4,
            label=name,
            **_look(number),
        )
    logged.set(title="As logged", ylabel="held-out loss (nats per token)")
    logged.legend()
    difference = checkpoints["difference"]
    spread = [difference - checkpoints["low"], checkpoints["high"] - difference]
    evaluated.axhline(0, color=GREY, linewidth=1)
    evaluated.errorbar(
        checkpoints["step"], difference, yerr=spread, color=BLACK, marker="o", capsize=4
    )
    first = f"step {checkpoints['step'].min():,}"
    evaluated.set(
        title="Checkpoints, on the same whole documents",
        ylabel=f"bits per byte more than at {first}",
    )
    for axes in (logged, evaluated):
        step_axis(axes)
    return figure


@styled
def plot_quality_match(held_out: pd.DataFrame, forecasts: Sequence[Forecast]) -> Figure:
    """The held-out curve of a run, the reference losses, and where it meets them, as far as that is
    known.

    A square is where a loss was met or is expected, with its interval; an arrow where it comes at
    the earliest.

    Raises ValueError without a reference.
    """
    if not forecasts:
        raise ValueError("plot_quality_match was given no reference; ask for at least one.")
    figure, axes = plt.subplots(figsize=(10, 5.2))
    fitted = next((forecast.curve for forecast in forecasts if len(forecast.curve)), None)
    if fitted is not None:
        axes.fill_between(
            fitted["step"],
            fitted["low"],
            fitted["high"],
            color=ORANGE,
            alpha=0.3,
            linewidth=0,
            label="law of the schedule, 95%",
        )
        axes.plot(fitted["step"], fitted["loss"], "--", color=ORANGE, linewidth=1.2)
    axes.plot(
        held_out["step"],
        held_out["held_out_loss"],
        "o-",
        color=BLUE,
        markersize=4,
        label="evaluated",
    )
    place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "fontsize": 9}
    for forecast in forecasts:
        axes.axhline(forecast.reference_loss, color=GREY, linewidth=0.9, linestyle=":")
        axes.annotate(str(forecast), (0.99, forecast.reference_loss), **place)
        if forecast.status == "forecast":
            axes.plot(
                [forecast.low, forecast.high],
                [forecast.reference_loss] * 2,
                "|-",
                color=BLACK,
                markersize=10,
            )
            axes.plot([forecast.step], [forecast.reference_loss], "s", color=BLACK, markersize=7)
        if forecast.status == "not before":
            axes.plot([forecast.low], [forecast.reference_loss], ">", color=BLACK, markersize=8)
        if forecast.status == "met":
            evaluated = held_out.loc[held_out["step"] == forecast.step, "held_out_loss"]
            axes.plot([forecast.step], evaluated, "s", color=BLACK, markersize=7)
    references = [forecast.reference_loss for forecast in forecasts]
    lowest, highest = (
        min(*references, held_out["held_out_loss"].min()),
        max(*references, held_out["held_out_loss"].quantile(0.9)),
    )
    axes.set_ylim(lowest - 0.08 * (highest - lowest), highest + 0.15 * (highest - lowest))
    axes.set_ylabel("held-out loss (nats per token)")
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, -0.12), ncols=2)
    step_axis(axes)
    return figure
