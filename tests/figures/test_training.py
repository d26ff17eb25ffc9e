"""Figures of a run: every panel says what it shows and in which unit, and shows the numbers it was
given.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kl3m_nb.figures import training
from kl3m_nb.growth import speedups
from kl3m_nb.profiles import ATTENTION_ROLES, ObjectiveSpec


def drawn(figure: Figure) -> list[Axes]:
    """The panels of a figure that was really rendered, once every row has a unit and every column
    says what runs along it.
    """
    figure.canvas.draw()
    for axes in figure.axes:
        place = axes.get_subplotspec()
        assert axes.get_ylabel() or not place.is_first_col()
        assert axes.get_xlabel() or not place.is_last_row() or not len(axes.get_xticks())
    return figure.axes


def texts(figure: Figure) -> str:
    return " | ".join(
        text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))
    )


def line(axes: Axes, label: str):
    [found] = [line for line in axes.lines if line.get_label() == label]
    return found


def training_log(steps: int) -> pd.DataFrame:
    step = np.arange(1, steps + 1)
    log = pd.DataFrame(
        {
            "step": step,
            "cross_entropy": 4 + 1 / step,
            "entropy_bits": 6 + 1 / step,
            "label_smoothing": 0.005,
            "entropy_bonus": -0.006,
            "entropy_target": 0.002,
            "activation_norm": 0.1 / step,
            "lr_muon": 0.01,
            "lr_aux": 0.002,
            "grad_norm": 2 + np.sin(step),
            "clip_threshold": 2.5,
            "skipped": False,
            "tokens_per_second": 1000.0 + step,
        }
    )
    log["loss"] = log.cross_entropy + 0.1
    log["clipped"] = log.grad_norm > log.clip_threshold
    return log


HELD_OUT = pd.DataFrame({"step": [0, 5, 10], "held_out_loss": [5.0, 4.5, 4.25]})


class TestTraining:
    def test_four_labelled_panels_hold_what_was_logged(self):
        log = training_log(40)
        figure = training.plot_training(log, HELD_OUT)
        loss, rates, norm, speed = drawn(figure)
        assert [axes.get_ylabel() for axes in (loss, norm, speed)] == [
            "nats per token",
            "global norm",
            "tokens per second",
        ]
        assert norm.get_xlabel() == speed.get_xlabel() == "optimizer step"
        np.testing.assert_array_equal(line(loss, "held-out").get_ydata(), HELD_OUT.held_out_loss)
        np.testing.assert_array_equal(
            line(loss, "training cross-entropy").get_ydata(), log.cross_entropy
        )
        np.testing.assert_array_equal(rates.lines[1].get_ydata(), log.lr_aux)
        assert norm.get_yscale() == "log"

    def test_steps_clipped_between_two_rows_are_counted(self):
        log = training_log(30).assign(clipped=[0, 4, 1] + 27 * [0])
        assert line(
            training.plot_training(log, HELD_OUT).axes[2], "clipped (5 steps)"
        ).get_xdata().tolist() == [2, 3]

    def test_clipped_and_skipped_steps_are_marked_and_counted(self):
        log = training_log(40)
        log.loc[7, "skipped"] = True
        log.loc[7, ["loss", "cross_entropy", "grad_norm"]] = np.nan
        norm = drawn(training.plot_training(log, HELD_OUT))[2]
        clipped = line(norm, f"clipped ({log.clipped.sum()} steps)")
        np.testing.assert_array_equal(clipped.get_xdata(), log.step[log.clipped])
        assert list(line(norm, "skipped (1 step)").get_xdata()) == [8]

    def test_nothing_is_marked_in_a_run_without_clipping(self):
        log = training_log(10).assign(clipped=False)
        assert "clipped" not in texts(training.plot_training(log, HELD_OUT))

    def test_a_long_run_is_smoothed_by_what_a_spike_cannot_bend(self):
        log = training_log(400).assign(cross_entropy=4.0)
        log.loc[200, "cross_entropy"] = 90.0
        loss = drawn(training.plot_training(log, HELD_OUT))[0]
        np.testing.assert_array_equal(
            line(loss, "training cross-entropy").get_ydata(), np.full(400, 4.0)
        )
        assert any(
            90.0 in pale.get_ydata() for pale in loss.lines
        )  # the spike itself stays to be seen

    def test_a_run_not_yet_evaluated_is_drawn_and_one_not_begun_is_refused(self):
        assert len(drawn(training.plot_training(training_log(1), HELD_OUT.head(0)))) == 4
        with pytest.raises(ValueError, match="no training steps"):
            training.plot_training(training_log(3).head(0), HELD_OUT)


def test_objective_terms_are_in_thousandths_and_the_target_in_bits():
    log = training_log(30)
    figure = training.plot_objective_terms(log, ObjectiveSpec(entropy_target_bits=5.5))
    panels = {axes.get_title(loc="left"): axes for axes in drawn(figure)}
    assert set(panels) == {
        "Label smoothing",
        "Entropy bonus",
        "Entropy target",
        "Activation norm",
        "Entropy",
    }
    np.testing.assert_allclose(panels["Entropy bonus"].lines[0].get_ydata(), -6)
    np.testing.assert_allclose(panels["Activation norm"].lines[0].get_ydata(), 100 / log.step)
    offset = (log.entropy_bits - 5.5) ** 2  # of a weight of 0.001, in thousandths
    np.testing.assert_allclose(line(panels["Entropy target"], "offset").get_ydata(), offset)
    np.testing.assert_allclose(
        line(panels["Entropy target"], "spread").get_ydata(), 1000 * log.entropy_target - offset
    )
    assert (
        "10^{-3}" in panels["Entropy bonus"].get_ylabel()
        and panels["Entropy"].get_ylabel() == "bits per token"
    )
    assert set(line(panels["Entropy"], "target 5.5 bits").get_ydata()) == {5.5}
    np.testing.assert_allclose(
        panels["Entropy"].lines[1].get_ydata(), log.cross_entropy / math.log(2)
    )


def test_of_a_mixture_the_router_has_its_panel_among_the_terms():
    log = training_log(30).assign(router_loss=0.1)
    panels = {
        axes.get_title(loc="left"): axes
        for axes in drawn(training.plot_objective_terms(log, ObjectiveSpec()))
    }
    assert len(panels) == 6
    np.testing.assert_allclose(panels["Router loss, weighted"].lines[0].get_ydata(), 100)


def clamp_log(events: int, layers: int) -> pd.DataFrame:
    rows = [
        {
            "step": 20 * event,
            "role": role,
            "layer": layer,
            "sigma_max": 10.0,
            "sigma_min": 10.0 / (100 * (layer + 1)),
            "raised": layer,
            "max_condition": 3000.0 if role in ATTENTION_ROLES else 2000.0,
            "route": "tested",
        }
        for event in range(1, events + 1)
        for role, layers_of_role in (
            ("q_proj", layers),
            ("o_proj", layers),
            ("down_proj", layers),
            ("lm_head", 1),
        )
        for layer in range(layers_of_role)
    ]
    return pd.DataFrame(rows)


class TestClampEvents:
    def test_worst_and_median_by_role_below_the_ceiling_of_their_group(self):
        log = clamp_log(events=3, layers=120)
        figure = training.plot_clamp_events(log)
        panels = drawn(figure)
        assert [axes.get_title(loc="left") for axes in panels[:3]] == [
            "Attention",
            "MLP",
            "LM head",
        ]
        np.testing.assert_allclose(line(panels[0], "q_proj").get_ydata(), 12_000)
        assert any(np.allclose(other.get_ydata(), 100 * 60.5) for other in panels[0].lines)
        assert "ceiling\n3,000" in texts(figure) and "ceiling\n2,000" in texts(figure)
        figure.draw_without_rendering()  # places the panels
        for axes, other in zip(
            panels[:3], [*panels[1:3], None], strict=True
        ):  # beside the panel, where no line runs
            label = axes.texts[0].get_window_extent()
            assert label.x0 > axes.get_window_extent().x1 and label.x1 < figure.bbox.x1
            assert other is None or label.x1 < other.get_tightbbox().x0
        assert (
            "condition" in panels[0].get_ylabel()
            and panels[3].get_ylabel() == "singular values raised"
        )

    def test_bars_add_up_to_the_values_raised(self):
        log = clamp_log(events=4, layers=12)
        attention, _, head = drawn(training.plot_clamp_events(log))[3:]
        assert (
            sum(bar.get_height() for bar in attention.patches)
            == log[log.role.isin(ATTENTION_ROLES)].raised.sum()
        )
        assert "none" in [text.get_text() for text in head.texts]

    def test_a_matrix_that_was_not_looked_at_has_no_condition(self):
        log = clamp_log(events=2, layers=2)
        log.loc[(log.step == 40) & (log.role == "q_proj"), ["route", "sigma_min"]] = [
            "certified",
            1e-9,
        ]
        attention = drawn(training.plot_clamp_events(log))[0]
        assert list(line(attention, "q_proj").get_xdata()) == [20]

    def test_singular_and_unmeasured_weights_do_not_break_the_picture(self):
        log = clamp_log(events=2, layers=2)
        log["sigma_min"] = log["sigma_min"].astype(object)  # as null comes back from JSON
        log.loc[0, ["sigma_min", "route"]] = [None, "not_finite"]
        log.loc[1, ["sigma_min", "route"]] = [0.0, "repaired"]
        attention = drawn(training.plot_clamp_events(log))[0]
        assert list(line(attention, "singular (1 step)").get_xdata()) == [20]

    def test_a_run_without_clamp_is_refused(self):
        with pytest.raises(ValueError, match="no clamp events"):
            training.plot_clamp_events(clamp_log(1, 1).head(0))


def curve(losses, tokens, seconds, flops) -> pd.DataFrame:
    step = np.arange(len(losses)) * 10
    return pd.DataFrame(
        {
            "step": step,
            "tokens": step * tokens,
            "seconds": step * seconds,
            "flops": step * flops,
            "held_out_loss": losses,
        }
    )


RUNS = {
    "source": curve([8.0, 6.0, 5.0], 1e4, 1.0, 1e9),
    "grown": curve([5.2, 4.0, 3.0], 1e4, 4.0, 4e9),
    "scratch": curve([8.0, 7.0, 6.0, 5.0, 4.0, 3.5], 1e4, 4.0, 4e9),
}


class TestGrowth:
    def test_the_grown_run_is_drawn_with_and_without_the_sources_cost(self):
        figure = training.plot_growth(RUNS, target_loss=4.0)
        tokens, flops = drawn(figure)
        own, shifted = (
            line(tokens, f"grown: {which}").get_xdata()
            for which in ("its own cost", "with the source's cost")
        )
        np.testing.assert_allclose(shifted - own, 0.2)  # 200,000 tokens of the source, in millions
        assert tokens.get_xlabel() == "tokens (millions)"
        assert "FLOP" in flops.get_xlabel() and "10^{11}" in flops.get_xlabel()
        np.testing.assert_allclose(line(flops, "scratch").get_xdata()[-1], 50 * 4e9 / 1e11)

    def test_speedups_are_those_of_the_growth_module(self):
        panels = drawn(training.plot_growth(RUNS, target_loss=4.0))
        table = speedups.speedups(RUNS["source"], RUNS["grown"], RUNS["scratch"], 4.0)
        for axes, (_, row) in zip(panels, table.iterrows(), strict=True):
            title = axes.get_title(loc="left").replace("−", "-")
            assert (
                f"{row.speedup_excluding_source:+.0%}" in title
                and f"{row.speedup_including_source:+.0%}" in title
            )
        assert "+300%" in panels[0].get_title(loc="left") and "+33%" in panels[0].get_title(
            loc="left"
        )

    def test_the_crossings_are_marked_on_the_target(self):
        tokens = drawn(training.plot_growth(RUNS, target_loss=4.0))[0]
        marks = sorted(mark.get_xdata()[0] for mark in tokens.lines if len(mark.get_xdata()) == 1)
        assert marks == pytest.approx([0.1, 0.3, 0.4])

    def test_a_bar_spans_the_evaluations_that_a_crossing_lies_between(self):
        tokens = drawn(training.plot_growth(RUNS, target_loss=4.5))[0]
        bars = [
            bar.get_segments()[0][:, 0] for bar in tokens.collections if bar.get_linewidth()[0] == 5
        ]
        np.testing.assert_allclose(
            sorted(bars, key=lambda bar: bar[0]), [[0, 0.1], [0.2, 0.3], [0.3, 0.4]]
        )

    def test_a_target_never_reached_is_said(self):
        assert "reached by neither" in texts(training.plot_growth(RUNS, target_loss=1.0))
        figure = training.plot_growth(RUNS, target_loss=3.2)
        assert "more than +25%" in texts(figure).replace(
            "−", "-"
        ) and "reached by grown only" in texts(figure)
        assert sum(len(mark.get_xdata()) == 1 for mark in figure.axes[0].lines) == 2

    def test_runs_may_have_other_names_and_must_be_there(self):
        renamed = {"30 layers": RUNS["source"], "stacked": RUNS["grown"], "fresh": RUNS["scratch"]}
        figure = training.plot_growth(
            renamed, 4.0, source="30 layers", grown="stacked", scratch="fresh"
        )
        assert "stacked: its own cost" in texts(figure) and "+300%" in texts(figure)
        with pytest.raises(
            ValueError, match="no run 'scratch'; the runs given are 30 layers, stacked, fresh"
        ):
            training.plot_growth(renamed, 4.0, source="30 layers", grown="stacked")


class TestStackMap:
    @pytest.mark.parametrize(("layers", "source_layers"), [(12, 3), (120, 30)])
    def test_every_target_block_has_its_mark_at_its_source(self, layers, source_layers):
        order = [i % source_layers for i in range(layers)]
        figure = training.plot_stack_map(order, source_layers)
        [axes] = drawn(figure)
        np.testing.assert_array_equal(
            axes.collections[0].get_offsets(), np.column_stack([range(layers), order])
        )
        assert [f"copy {copy}" in texts(figure) for copy in range(5)] == [True] * 4 + [False]
        assert axes.get_xlabel() and axes.get_ylabel()

    def test_no_copies_are_named_where_they_are_not_in_sequence(self):
        assert "copy" not in texts(training.plot_stack_map([0, 0, 1, 1, 2, 2], 3))

    @pytest.mark.parametrize("order", [[], [0, 3], [-1, 0]])
    def test_impossible_orders_are_refused(self, order):
        with pytest.raises(ValueError, match="from 0 to 2"):
            training.plot_stack_map(order, 3)


class TestExpertUse:
    def test_the_last_step_is_mapped_and_every_step_has_its_extremes(self):
        shares = {
            1: [[0.1, 0.4, 0.3, 0.2], [0.25] * 4],
            5: [[0.0, 0.5, 0.3, 0.2], [0.2, 0.3, 0.25, 0.25]],
        }
        rows = [
            {"step": step, "layer": layer, "expert": expert, "share": share}
            for step, layers in shares.items()
            for layer, of_layer in enumerate(layers)
            for expert, share in enumerate(of_layer)
        ]
        figure = training.plot_expert_use(pd.DataFrame(rows))
        figure.canvas.draw()
        now, over_time = figure.axes[:2]
        np.testing.assert_allclose(now.images[0].get_array(), shares[5])
        np.testing.assert_allclose(
            line(over_time, "busiest expert of a layer").get_ydata(),
            [(0.4 + 0.25) / 2, (0.5 + 0.3) / 2],
        )
        np.testing.assert_allclose(
            line(over_time, "idlest expert of a layer").get_ydata(), [(0.1 + 0.25) / 2, 0.1]
        )
        np.testing.assert_allclose(line(over_time, "idle below 5%").get_ydata(), 0.05)
        drawn = [list(each.get_ydata()) for each in over_time.lines]
        assert all(least in drawn for least in ([0.1, 0.0], [0.25, 0.2])), drawn

    def test_a_dense_run_is_refused(self):
        with pytest.raises(ValueError, match="no expert shares"):
            training.plot_expert_use(pd.DataFrame(columns=["step", "layer", "expert", "share"]))
