"""The demonstration's own part: what it removes. Its notebooks run in tests/notebooks."""

from __future__ import annotations

import pytest

from kl3m_nb.jupyter import demo
from kl3m_nb.runs import folder, registry

OF_THE_DEMO = ("demo-source", "demo-grown", "demo-scratch", "demo-report")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("KL3M_NB_RUNS", str(tmp_path))
    monkeypatch.setattr(demo, "run_notebook", lambda *_: 1)
    for name in (*OF_THE_DEMO, "demo-train", "demo-my-long-run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
    return tmp_path


def test_a_fresh_demonstration_removes_its_own_runs_and_no_other(folders):
    assert (
        registry.run_path("tiny", "train").name == "demo-train"
    )  # where the shell trains by default
    assert demo.run_demo(fresh=True) == 1
    assert {path.name for path in folders.iterdir()} == {
        "demo-train",
        "demo-my-long-run",
        "demo-report",
    }
    assert list((folders / "demo-report").iterdir()) == []


def test_nothing_is_removed_while_somebody_trains_there(folders):
    before = sorted(folders.rglob("*.jsonl"))
    with folder.RunLock(folders / "demo-grown") as lock:
        lock.acquire()
        with pytest.raises(folder.RunIsBusy, match="demo-grown is in use"):
            demo.run_demo(fresh=True)
    assert sorted(folders.rglob("*.jsonl")) == before
