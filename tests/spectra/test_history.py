"""A run's checkpoints in order, tables over them, and its clamp log as a history."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest

from kl3m_nb.runs import metrics
from kl3m_nb.spectra import history


def test_the_trajectory_of_a_run_begins_with_its_start(trained_run):
    run_dir, _ = trained_run
    steps = history.trajectory(run_dir, "the stack")
    assert steps[0] == "the stack" and list(steps) == [0, 3, 6]
    assert steps[6].name == "step-000006"
    assert list(history.trajectory(run_dir, "an earlier checkpoint", 3)) == [3, 6]


def test_a_run_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no whole checkpoint"):
        history.trajectory(tmp_path, "the stack")


def test_tables_of_checkpoints_stand_below_each_other_in_order():
    def measure(checkpoint, factor, offset=0):
        return pd.DataFrame({"step": -1, "value": [len(checkpoint) * factor + offset]})

    table = history.over_checkpoints({20: "aaa", 0: "a"}, measure, 10, offset=1)
    assert table.to_dict("list") == {"step": [0, 20], "value": [11, 31]}


def test_progress_runs_once_over_all_checkpoints():
    def measure(checkpoint, progress):
        for done in (1, 2, 3):
            progress(done, 3)
        return pd.DataFrame({"value": [checkpoint]})

    calls = []
    history.over_checkpoints(
        {0: "a", 20: "b"}, measure, progress=lambda *numbers: calls.append(numbers)
    )
    assert calls == [(done, 6) for done in range(1, 7)]


def write_clamps(run_dir, events) -> None:
    with open(run_dir / metrics.FILE_NAME, "w") as file:
        for step, matrices in events.items():
            columns = {key: [matrix[key] for matrix in matrices] for key in matrices[0]}
            file.write(
                json.dumps({"kind": "clamp", "step": step, "tokens": 0, "seconds": 0.0, **columns})
                + "\n"
            )


def matrix(layer, sigma_min, route, raised=0):
    return {
        "name": f"layers.{layer}.q",
        "layer": layer,
        "role": "q_proj" if layer >= 0 else "lm_head",
        "sigma_max": 6.0,
        "sigma_min": sigma_min,
        "tau": 0.002,
        "raised": raised,
        "route": route,
        "max_condition": 3000.0,
    }


def test_clamp_events_become_conditions_of_copies(tmp_path):
    write_clamps(
        tmp_path,
        {
            20: [
                matrix(-1, 0.1, "tested"),
                matrix(1, 0.001, "repaired", 4),
                matrix(5, 0.5, "certified"),
            ],
            40: [
                matrix(-1, 0.0, "decomposed"),
                matrix(1, 0.002, "repaired", 1),
                matrix(5, 0.01, "tested"),
            ],
        },
    )
    table = history.clamp_history(tmp_path, source_layers=4)
    assert list(table.step) == [20] * 3 + [40] * 3
    assert list(table.source_layer) == [-1, 1, 1] * 2 and list(table["copy"]) == [-1, 0, 1] * 2
    expected = [60.0, 6000.0, math.nan, math.inf, 3000.0, 600.0]
    assert list(table.condition) == pytest.approx(expected, nan_ok=True)
    assert list(table.at_ceiling) == [False, True, False, True, True, False]
    assert set(history.clamp_history(tmp_path, 4, last_step=39).step) == {20}
    assert history.clamp_history(tmp_path, 4, last_step=19).empty


def test_at_the_ceiling_is_what_comes_within_a_hundredth_of_it(tmp_path):
    shares = (0.8, 0.985, 0.995, 1.1)
    write_clamps(
        tmp_path,
        {
            20: [
                matrix(layer, 6.0 / (share * 3000.0), "tested")
                for layer, share in enumerate(shares)
            ]
        },
    )
    assert list(history.clamp_history(tmp_path, source_layers=4).at_ceiling) == [
        False,
        False,
        True,
        True,
    ]


def test_a_run_without_clamps_has_an_empty_history(tmp_path):
    assert history.clamp_history(tmp_path, source_layers=2).empty
