"""The page that `report` makes of a run, and the sentences on it."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from kl3m_nb import cli
from kl3m_nb.runs import folder
from kl3m_nb.runs.metrics import read_metrics
from kl3m_nb.runs.summary import describe_run
from kl3m_nb.training import loop
from tests.conftest import small_profile


def test_the_page_says_what_the_metrics_say(tmp_path):
    profile = small_profile(
        experts=4,
        active_experts=2,
        sliding_window=16,
        router_aux_loss=0.05,
        clip_mode="fixed",
        clip_max_norm=1e-3,
        attention_max_condition=3.0,
        clamp_every=3,
    )
    run_dir = tmp_path / "run"
    loop.train(profile, run_dir)
    assert cli.main(["report", str(run_dir)]) == 0
    text = (run_dir / "report.html").read_text()
    train, held_out = (read_metrics(run_dir, kind) for kind in ("train", "held_out"))
    raised = int(read_metrics(run_dir, "clamp").raised.sum())
    losses = held_out.held_out_loss
    assert raised > 0
    for words in (
        f"6 of 6 steps behind it: {train.tokens.iloc[-1]:,} tokens",
        f"from {losses.iloc[0]:.3f} nats per token at step 0 to {losses.iloc[-1]:.3f} at step 6",
        "In 6 steps the gradient was clipped; 0 steps were not finite",
        f"it raised {raised:,} singular values",
        "The newest checkpoint is step-000006.",
        "random weights",
    ):
        assert words in text, words
    assert len(re.findall(r'src="data:image/png;base64,', text)) == 4
    assert not re.search(r"""(src|href)=["']?http""", text)
    for name in ("training", "objective_terms", "clamp_events", "experts"):
        assert len(pd.read_csv(run_dir / "figures" / f"{name}.csv"))


def test_a_run_that_has_only_begun_has_a_page_too(tmp_path):
    def crash(row):
        if row["kind"] == "train":
            raise SystemExit

    run_dir = tmp_path / "run"
    with pytest.raises(SystemExit):
        loop.train(small_profile(clamp_every=0), run_dir, callbacks=[crash])
    assert cli.main(["report", str(run_dir)]) == 0
    text = (run_dir / "report.html").read_text()
    assert "1 of 6 steps" in text and "There is no checkpoint yet." in text
    assert not (run_dir / "figures" / "clamp_events.png").exists()


def test_a_run_without_a_step_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="is no run folder"):
        describe_run(tmp_path)
    folder.write_run_file(tmp_path, small_profile(), None, "cpu")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "has no training steps yet" in capsys.readouterr().err
    assert not list(tmp_path.glob("report*"))
