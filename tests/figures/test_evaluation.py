"""Figures of evaluation: each shows the numbers it was given, says in which unit, and refuses what
it cannot draw.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kl3m_nb.evaluation.documents import Prediction
from kl3m_nb.figures import evaluation
from kl3m_nb.figures.style import SEQUENCE
from kl3m_nb.growth.forecast import forecast_match
from kl3m_nb.profiles import ScheduleSpec


def drawn(figure: Figure) -> list[Axes]:
    figure.canvas.draw()
    return figure.axes


def texts(figure: Figure) -> str:
    return " | ".join(
        text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))
    )


def title(axes: Axes) -> str:
    return axes.get_title(loc="left")


def prediction(level: float) -> Prediction:
    documents = pd.DataFrame(
        {
            "identifier": list("abcd"),
            "domain": ["rules", "rules", "cases", "cases"],
            "family": list("abcc"),
            "tokens": [10, 10, 40, 40],
            "bytes": [40, 40, 160, 160],
            "loss": [level, level + 1, level, level],
            "entropy_bits": 4.0,
            "bits_per_byte": [level, level + 0.5, level, level],
        }
    )
    calibration = pd.DataFrame(
        {"confidence": [0.1, 0.5], "accuracy": [0.2, 0.4], "tokens": [90, 30]}
    )
    calibration.loc[2] = [0.9, 1.0, 1]  # one token says nothing
    return Prediction(documents, calibration)


def contexts(*names) -> dict[str, pd.DataFrame]:
    more = np.array([0.5, 0.2, 0.0])
    table = pd.DataFrame(
        {"context": [1, 16, 256], "more": more, "more_low": 0.8 * more, "more_high": 1.3 * more}
    )
    return {name: table * [1, factor, factor, factor] for factor, name in enumerate(names, start=1)}


class TestPrediction:
    def test_every_domain_has_a_row_and_every_model_its_marks(self):
        predictions = {"source": prediction(2.0), "trained": prediction(1.5)}
        domains, positions, calibration = drawn(
            evaluation.plot_prediction(predictions, contexts(*predictions))
        )
        assert [label.get_text() for label in domains.get_yticklabels()] == [
            "all",
            "cases",
            "rules",
        ]
        marks = [
            line
            for line in domains.lines
            if line.get_marker() in evaluation.MARKERS and len(line.get_xdata()) == 3
        ]
        np.testing.assert_allclose(marks[0].get_xdata(), [2.05, 2.0, 2.25])
        np.testing.assert_allclose(marks[1].get_xdata(), [1.55, 1.5, 1.75])
        assert (
            domains.get_xlabel() == "bits per byte"
            and positions.get_ylabel() == "nats per token more than with 256"
        )
        np.testing.assert_allclose(calibration.lines[1].get_xydata(), [(0.1, 0.2), (0.5, 0.4)])

    def test_a_value_stands_at_its_domain_whatever_each_tokenizer_makes_the_larger(self):
        """By tokens, "cases" is the larger domain of the first model and "rules" that of the
        second.
        """
        other = prediction(1.5)
        other.documents["tokens"] = [90, 90, 20, 20]
        predictions = {"ours": prediction(2.0), "theirs": other}
        domains, *_ = drawn(evaluation.plot_prediction(predictions, contexts(*predictions)))
        labels = [label.get_text() for label in domains.get_yticklabels()]
        marks = [
            line
            for line in domains.lines
            if line.get_marker() in evaluation.MARKERS and len(line.get_xdata()) == 3
        ]
        for line, level in zip(marks, (2.0, 1.5), strict=True):
            found = {labels[round(place)]: value for value, place in line.get_xydata()}
            assert (found["cases"], found["rules"]) == pytest.approx((level, level + 0.25))

    def test_what_context_is_worth_has_a_band(self):
        predictions = {"source": prediction(2.0), "trained": prediction(1.5)}
        _, positions, _ = drawn(evaluation.plot_prediction(predictions, contexts(*predictions)))
        table = contexts(*predictions)["trained"]
        np.testing.assert_allclose(positions.lines[1].get_xydata(), table[["context", "more"]])
        outline = positions.collections[1].get_paths()[0].vertices
        np.testing.assert_allclose(sorted(set(outline[:, 0])), table["context"])
        for row in table.itertuples():
            heights = outline[np.isclose(outline[:, 0], row.context), 1]
            assert (heights.min(), heights.max()) == pytest.approx((row.more_low, row.more_high))

    def test_a_domain_of_one_family_has_no_whisker_and_one_of_two_does_not_widen_the_axis(self):
        """Two values half a bit apart have an interval of more than six bits."""
        predictions = {"source": prediction(2.0)}
        domains, *_ = drawn(evaluation.plot_prediction(predictions, contexts(*predictions)))
        [bars] = domains.containers
        drawn_bars = [
            segment
            for segment in bars[2][0].get_segments()
            if np.isfinite(segment).all() and len(segment)
        ]
        low, high = predictions["source"].bits_per_byte[1:3]
        whole, rules = (
            segment[:, 0] for segment in drawn_bars
        )  # none of "cases", which is one family
        assert whole == pytest.approx((low, high)) and np.diff(rules) > 6
        assert (
            domains.get_xlim()[0] < low
            and high < domains.get_xlim()[1]
            and np.diff(domains.get_xlim()) < 2 * (high - low)
        )
        assert f"{predictions['source'].bits_per_byte.effective:.1f} families" in title(domains)

    @pytest.mark.parametrize("given", [({}, {}), ({"source": prediction(2.0)}, {})])
    def test_a_model_without_its_numbers_is_refused(self, given):
        with pytest.raises(ValueError, match="give both of the same models"):
            evaluation.plot_prediction(*given)


DIFFERENCES = pd.DataFrame(
    {
        "model": ["trained", "stack"],
        "difference": [-0.15, 0.16],
        "low": [-0.16, 0.14],
        "high": [-0.14, 0.19],
        "effective": 3.76,
        "better_on": [1.0, 0.0],
        "verdict": ["better", "worse"],
    }
)


def test_differences_stand_at_their_place_with_their_verdict():
    figure = evaluation.plot_differences(DIFFERENCES, "source", ["source", "stack", "trained"])
    [axes] = drawn(figure)
    marked = [line for line in axes.lines if line.get_marker() in "sD"]
    assert [line.get_color() for line in marked] == [
        SEQUENCE[2],
        SEQUENCE[1],
    ]  # as in the figures that draw all three
    assert axes.get_xlabel() == "bits per byte more than source"
    assert "−0.150, better; better on 100% of the documents; 3.8 families in effect" in texts(
        figure
    )
    assert [line.get_xdata()[0] for line in marked] == [-0.15, 0.16]
    with pytest.raises(ValueError, match="at least two models"):
        evaluation.plot_differences(DIFFERENCES.head(0), "source", ["source"])


MEASURES = {
    "samples": 40,
    "mean_tokens": 81.5,
    "end_rate": 0.25,
    "distinct_1": 0.3,
    "distinct_2": 0.6,
    "distinct_3": 0.8,
    "self_bleu": 0.3,
    "repetition_rate": 0.1,
    "loop_rate": 0.0,
    "balanced_brackets_rate": 0.9,
    "balanced_quotes_rate": 1.0,
    "numbers": 30,
    "numbering_rate": 0.7,
    "terms": 4,
    "terms_used_rate": 0.5,
    "citations": 5,
    "citations_rate": 0.2,
    "tokens_per_second": 310.0,
}


class TestGenerationMeasures:
    def test_a_panel_a_measure_and_a_bar_a_model(self):
        frame = pd.DataFrame(
            [{"model": name, **MEASURES} for name in ("source", "stack", "trained")]
        )
        figure = evaluation.plot_generation_measures(frame)
        panels = drawn(figure)
        assert len(panels) == 12 and all(len(axes.patches) == 3 for axes in panels)
        assert [panels[0].patches[0].get_height(), panels[1].patches[0].get_height()] == [
            81.5,
            0.25,
        ]
        assert {"source", "stack", "trained"} <= set(
            texts(figure).split(" | ")
        ) and "40 samples" in texts(figure)
        assert [label.get_text() for label in panels[-1].get_xticklabels()] == ["of 5"] * 3

    def test_a_measure_that_had_nothing_to_judge_says_so(self):
        frame = pd.DataFrame([{"model": "trained", **MEASURES, "citations_rate": math.nan}])
        figure = evaluation.plot_generation_measures(frame)
        assert texts(figure).count("nothing to judge") == 1
        assert "nothing to judge" in [text.get_text() for text in drawn(figure)[-1].texts]

    def test_a_model_twice_or_none_is_refused(self):
        frame = pd.DataFrame([{"model": "trained", **MEASURES}] * 2)
        with pytest.raises(ValueError, match="more than one row"):
            evaluation.plot_generation_measures(frame)
        with pytest.raises(ValueError, match="no measured models"):
            evaluation.plot_generation_measures(frame.head(0))


def test_the_advised_setting_of_a_sweep_carries_the_star():
    rows = [
        {
            "temperature": temperature,
            "top_p": top_p,
            "repetition_penalty": 1.0,
            "advised": temperature == 0.8 and top_p == 0.95,
        }
        | MEASURES
        | {"distinct_2": temperature / 2}
        for temperature in (0.4, 0.8)
        for top_p in (0.8, 0.95)
    ]
    figure = evaluation.plot_sampling_sweep(pd.DataFrame(rows))
    first = drawn(figure)[0]
    [star] = [line for line in first.lines if line.get_marker() == "*"]
    assert star.get_xydata().tolist() == [[0.8, 0.4]]
    assert {"top-p 0.8", "top-p 0.95", "the card's advice"} <= set(texts(figure).split(" | "))
    for axes in figure.axes:  # markers at 0 or 100% stand whole, below the title
        assert not any(line.get_clip_on() for line in axes.lines) and axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > 1.05 * max(line.get_ydata().max() for line in axes.lines)
    with pytest.raises(ValueError, match="no sampled settings"):
        evaluation.plot_sampling_sweep(pd.DataFrame(rows).head(0))


def test_entropy_along_the_sample_with_the_target():
    table = pd.DataFrame(
        {"position": range(10), "entropy_bits": 5.0, "surprise_bits": 4.0, "samples": 3}
    )
    figure = evaluation.plot_entropy_along({"trained": table})
    [axes] = drawn(figure)
    heights = {float(np.mean(line.get_ydata())) for line in axes.lines if len(line.get_ydata())}
    assert heights == {5.0, 4.0, 6.5}
    assert axes.get_ylabel() == "bits per token" and "target 6.5 bits" in texts(figure)


def test_memorisation_has_a_panel_a_model_and_both_sets():
    gap = pd.DataFrame({"prefix": [5, 50], "given": [0.2, 0.4], "not_given": [0.2, 0.1]})
    gap = gap.assign(given_documents=60, not_given_documents=41)
    for column in ("given", "not_given"):
        gap[f"{column}_low"], gap[f"{column}_high"] = gap[column] - 0.05, gap[column] + 0.05
    panels = drawn(evaluation.plot_memorisation({"source": gap, "trained": gap}))
    assert [title(axes) for axes in panels] == [
        f"{name}: 60 documents given, 41 not" for name in ("source", "trained")
    ]
    heights = [list(line.get_ydata()) for line in panels[1].lines if line.get_marker() in "os"]
    assert heights == [[0.2, 0.4], [0.2, 0.1]]
    with pytest.raises(ValueError, match="no models"):
        evaluation.plot_memorisation({})


def curve(losses) -> pd.DataFrame:
    return pd.DataFrame({"step": np.arange(1, len(losses) + 1) * 100, "held_out_loss": losses})


def test_over_training_shows_what_was_logged_and_what_was_evaluated():
    checkpoints = pd.DataFrame(
        {"step": [0, 100], "difference": [0.0, -0.2], "low": [0.0, -0.25], "high": [0.0, -0.15]}
    )
    logged, evaluated = drawn(
        evaluation.plot_over_training({"grown": curve([5.0, 4.0])}, checkpoints)
    )
    np.testing.assert_array_equal(logged.lines[0].get_xydata(), [[100, 5.0], [200, 4.0]])
    points = next(line for line in evaluated.lines if line.get_marker() == "o")
    np.testing.assert_array_equal(points.get_xydata(), [[0, 0.0], [100, -0.2]])
    assert (
        "nats per token" in logged.get_ylabel()
        and evaluated.get_ylabel() == "bits per byte more than at step 0"
    )
    with pytest.raises(ValueError, match="no evaluated checkpoints"):
        evaluation.plot_over_training({}, checkpoints.head(0))


def test_quality_match_marks_what_is_known_and_says_what_is_not():
    planned = ScheduleSpec(max_steps=4000, warmup_steps=1, min_lr_ratio=1.0)
    run = pd.DataFrame(
        {
            "step": np.arange(21) * 100,
            "held_out_loss": [9.0, *(4 - 0.3 * np.log(np.arange(1, 21) * 100))],
        }
    )
    forecasts = [forecast_match(run, reference, planned) for reference in (2.136, 1.7, 0.5)]
    assert [forecast.status for forecast in forecasts] == ["met", "forecast", "not before"]
    figure = evaluation.plot_quality_match(run, forecasts)
    [axes] = drawn(figure)
    marks = [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "s"]
    assert marks == [(500, run.held_out_loss[5]), (2200, 1.7)]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_marker() == ">"] == [
        forecasts[2].low
    ]
    assert "not before" in texts(figure) and "95% interval" in texts(figure)
    with pytest.raises(ValueError, match="no reference"):
        evaluation.plot_quality_match(run, [])
