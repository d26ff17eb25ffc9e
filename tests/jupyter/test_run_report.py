from __future__ import annotations

import re

import pandas as pd
import pytest

from kl3m_nb.jupyter import run_report
from kl3m_nb.runs import folder
from kl3m_nb.runs.metrics import read_metrics
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
    loop.train(profile, tmp_path / "run")
    text = run_report.write_run_report(tmp_path / "run").read_text()
    train, held_out = (read_metrics(tmp_path / "run", kind) for kind in ("train", "held_out"))
    raised = int(read_metrics(tmp_path / "run", "clamp").raised.sum())
    assert raised > 0
    for words in (
        f"6 of 6 steps behind it: {train.tokens.iloc[-1]:,} tokens",
        (
            f"from {held_out.held_out_loss.iloc[0]:.3f} nats per token at step 0 to"
            f" {held_out.held_out_loss.iloc[-1]:.3f} at step 6"
        ),
        "In 6 steps the gradient was clipped; 0 steps were not finite",
        f"it raised {raised:,} singular values",
        "The newest checkpoint is step-000006.",
        "random weights",
    ):
        assert words in text, words
    assert len(re.findall(r'<img src="data:image/png;base64,', text)) == 4
    assert not re.search(r"""(src|href)=["']?http""", text)
    for name in ("training", "objective_terms", "clamp_events", "experts"):
        assert len(pd.read_csv(tmp_path / "run" / "figures" / f"{name}.csv"))


def test_a_run_that_has_only_begun_has_a_page_too(tmp_path):
    def crash(row):
        if row["kind"] == "train":
            raise SystemExit

    with pytest.raises(SystemExit):
        loop.train(small_profile(clamp_every=0), tmp_path / "run", callbacks=[crash])
    text = run_report.write_run_report(tmp_path / "run").read_text()
    assert (
        "1 of 6 steps" in text
        and "There is no checkpoint yet." in text
        and "What the clamp does" not in text
    )


def test_a_run_without_a_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no run folder"):
        run_report.write_run_report(tmp_path)
    folder.write_run_file(tmp_path, small_profile(), None, "cpu")
    with pytest.raises(ValueError, match="has no training steps yet; train it first"):
        run_report.write_run_report(tmp_path)
    assert not (tmp_path / run_report.PAGE).exists()
