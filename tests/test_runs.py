"""The registry: which profile a stage was trained with."""

from __future__ import annotations

import pytest

from kl3m_nb import run_folder, runs
from kl3m_nb.profiles import get_profile


def test_a_stage_has_the_profile_it_was_trained_with_or_the_named_one(tmp_path, monkeypatch):
    monkeypatch.setenv("KL3M_NB_RUNS", str(tmp_path))
    assert runs.stage_profile("tiny", "grown") == get_profile("tiny")
    trained = get_profile("tiny", max_steps=3, source="files:texts/*.jsonl")
    runs.run_path("tiny", "grown").mkdir()
    run_folder.write_run_file(runs.run_path("tiny", "grown"), trained, None, "")
    assert runs.stage_profile("tiny", "grown") == trained
    with pytest.raises(ValueError, match="no profile"):
        runs.stage_profile("huge", "grown")


@pytest.mark.parametrize("name", [".", "..", "a/b", "/tmp/a", "../a"])
def test_a_run_lies_right_below_the_folder_of_runs(tmp_path, monkeypatch, name):
    monkeypatch.setenv("KL3M_NB_RUNS", str(tmp_path))
    with pytest.raises(ValueError, match=f"The run '{name}' is no name of a folder right below {tmp_path}"):
        runs.run_path("tiny", "train", name)


def test_a_run_that_cannot_be_read_is_named_and_the_others_are_shown(tmp_path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
        run_folder.write_run_file(tmp_path / name, get_profile("tiny"), None, "cpu")
    (tmp_path / "a" / "run.json").write_text("")
    (tmp_path / "c" / "run.json").write_text("[]")
    with pytest.warns(UserWarning) as warned:
        table = runs.load_runs(tmp_path)
    assert table["run"].tolist() == ["b", "d"] and set(table["init"]) == {"random weights"}
    for warning, name in zip(warned, ("a", "c"), strict=True):
        assert str(warning.message).startswith(f"The run {name} is left out of the table: {tmp_path / name / 'run.json'}")


def test_a_checkpoint_is_known_by_the_run_it_lies_in(trained_run, tmp_path):
    run_dir, result = trained_run
    profile, windows = runs.trained_on(result.checkpoint)
    assert profile == run_folder.read_run_profile(run_dir)
    assert windows == result.step * profile.data.micro_batch * profile.data.grad_accumulation
    assert runs.trained_on(str(result.checkpoint)) == (profile, windows)
    assert runs.trained_on(tmp_path / "checkpoint") is None
    assert runs.trained_on(run_dir / "export" / "kl3m-tiny-step6") is None  # lies in the run, and is no checkpoint of it
    assert runs.trained_on("alea-institute/kl3m-006-170m") is None
