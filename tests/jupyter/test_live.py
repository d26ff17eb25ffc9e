from __future__ import annotations

import time
from unittest.mock import MagicMock

import pytest
from IPython.display import HTML
from jupyter_client.manager import start_new_kernel

from kl3m_nb.jupyter import live
from kl3m_nb.jupyter.progress import PROGRESS_VARIABLE, read_progress
from kl3m_nb.runs import folder, metrics
from kl3m_nb.training import loop
from tests.conftest import small_profile

BUSY_CELL = """
import time
from pathlib import Path
from IPython.display import display
from kl3m_nb.jupyter.live import save_button
display(save_button({folder!r}))
until = time.time() + 30
while not Path({folder!r}, "save-now").exists():
    assert time.time() < until, "nobody heard the click"
    time.sleep(0.05)
"""


def test_the_button_asks_the_run_for_a_checkpoint(trained_run):
    button = live.save_button(trained_run[0])
    button.click()
    assert button.description.startswith("Asked for")
    assert folder.take_save_request(trained_run[0])


def test_a_run_that_goes_on_elsewhere_can_be_looked_at(tmp_path):
    pages = []

    def look(row):
        if row["kind"] == "train" and row["step"] in (3, 5):
            pages.append(live.show_run(tmp_path / "run").data)

    loop.train(small_profile(), tmp_path / "run", callbacks=[look])
    assert (
        len(pages) == 2
        and all("data:image/png;base64," in page for page in pages)
        and pages[0] != pages[1]
    )


def test_the_time_left_goes_by_the_whole_pace_not_by_the_last_step(trained_run, monkeypatch):
    now = [500.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setenv(PROGRESS_VARIABLE, str(trained_run[0] / "progress"))
    monkeypatch.setattr(live, "display", MagicMock())  # gives a handle in a notebook only
    view = live.LiveView(trained_run[0])
    view({"kind": "start", "step": 40, "max_steps": 60, "run": "r", "runtime": "cpu"})
    now[0] += 300.0  # an evaluation and a checkpoint in it
    view({"kind": "train", "step": 50, "cross_entropy": 4.0, "tokens_per_second": 1e9})
    assert read_progress(trained_run[0] / "progress").endswith("· 5:00 left")


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


def test_a_click_is_heard_while_the_cell_trains(tmp_path):
    """As JupyterLab sends it: to a subshell of the kernel, whose main thread is in the cell."""
    (tmp_path / folder.RUN_FILE).touch()
    manager, client = start_new_kernel()
    try:
        executed = client.execute(BUSY_CELL.format(folder=str(tmp_path)))
        button = None
        while button is None:
            data = client.get_iopub_msg(timeout=60)["content"].get("data", {})
            button = data.get("application/vnd.jupyter.widget-view+json", {}).get("model_id")
        client.control_channel.send(client.session.msg("create_subshell_request"))
        subshell = client.get_control_msg(timeout=30)["content"]["subshell_id"]
        click = {"comm_id": button, "data": {"method": "custom", "content": {"event": "click"}}}
        message = client.session.msg("comm_msg", click)
        message["header"]["subshell_id"] = subshell
        client.shell_channel.send(message)
        while (reply := client.get_shell_msg(timeout=90))["parent_header"].get(
            "msg_id"
        ) != executed:
            pass
        assert reply["content"]["status"] == "ok" and (tmp_path / folder.SAVE_REQUEST).exists()
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.fixture
def shown(monkeypatch):
    """What a live view displays, as a list of outputs, each the list of what stood in it."""
    outputs = []

    class Output(list):
        update = list.append

    def display(content, display_id):
        outputs.append(Output([content]))
        return outputs[-1]

    monkeypatch.setattr(live, "display", display)
    monkeypatch.delenv(PROGRESS_VARIABLE, raising=False)
    return outputs


def test_the_button_goes_when_the_training_ends(tmp_path, shown):
    loop.train(small_profile(), tmp_path / "run", callbacks=[live.LiveView(tmp_path / "run")])
    button, _ = shown
    assert isinstance(button[0], live.widgets.Button)
    assert isinstance(button[-1], HTML) and not button[-1].data


def test_the_first_figure_has_lines_and_a_continued_run_shows_what_it_has(
    tmp_path, shown, monkeypatch
):
    monkeypatch.setattr(live, "_MOST_DRAWING", 1e9)
    view = live.LiveView(tmp_path / "run", text_seconds=0.0, figure_seconds=0.0)
    rows = []

    def stop(row):
        view(row)
        if row["kind"] in ("start", "train"):
            rows.append("<img" in shown[1][-1].data)
        if row.get("step") == 4 and row["kind"] == "train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(small_profile(), tmp_path / "run", callbacks=[stop])
    assert rows == [False, False, True, True, True]
    assert len(metrics.read_metrics(tmp_path / "run", "train")) > 1
    again = live.LiveView(tmp_path / "run")
    loop.train(small_profile(), tmp_path / "run", callbacks=[again])
    assert "<img" in shown[3][0].data
