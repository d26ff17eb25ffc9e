from __future__ import annotations

import time
from unittest.mock import MagicMock

from conftest import small_profile

from kl3m_nb import live, progress, run_folder, training


def test_the_button_asks_the_run_for_a_checkpoint(trained_run):
    button = live.save_button(trained_run[0])
    button.click()
    assert button.description.startswith("Asked for")
    assert run_folder.take_save_request(trained_run[0])


def test_a_run_that_goes_on_elsewhere_can_be_looked_at(tmp_path):
    pages = []

    def look(row):
        if row["kind"] == "train" and row["step"] in (3, 5):
            pages.append(live.show_run(tmp_path / "run").data)

    training.train(small_profile(), tmp_path / "run", callbacks=[look])
    assert len(pages) == 2 and all("data:image/png;base64," in page for page in pages) and pages[0] != pages[1]


def test_the_time_left_goes_by_the_whole_pace_not_by_the_last_step(trained_run, monkeypatch):
    now = [500.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setenv(progress.PROGRESS_VARIABLE, str(trained_run[0] / "progress"))
    monkeypatch.setattr(live, "display", MagicMock())  # gives a handle in a notebook only
    view = live.LiveView(trained_run[0])
    view({"kind": "start", "step": 40, "max_steps": 60, "run": "r", "runtime": "cpu"})
    now[0] += 300.0  # an evaluation and a checkpoint in it
    view({"kind": "train", "step": 50, "cross_entropy": 4.0, "tokens_per_second": 1e9})
    assert progress.read_progress(trained_run[0] / "progress").endswith("· 5:00 left")


def test_a_figure_that_takes_long_is_drawn_seldom(trained_run, monkeypatch):
    now, drawn_at = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(live, "display", MagicMock())

    def draw(view):
        drawn_at.append(now[0])
        now[0] += 2.0
        return ""

    monkeypatch.setattr(live.LiveView, "_draw", draw)
    view = live.LiveView(trained_run[0])
    view({"kind": "start", "step": 0, "max_steps": 500, "run": "r", "runtime": "cpu"})
    for step in range(1, 301):
        now[0] += 1.0
        view({"kind": "train", "step": step, "cross_entropy": 4.0, "tokens_per_second": 1.0})
    assert 0.01 < 2.0 * len(drawn_at) / now[0] <= 0.03
