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
