"""What a run has reached so far, in sentences made from its folder alone."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from kl3m_nb.common.text import clock
from kl3m_nb.runs.checkpoints import latest_checkpoint
from kl3m_nb.runs.folder import read_run_profile
from kl3m_nb.runs.metrics import read_metrics


def describe_run(run_dir: str | Path) -> list[str]:
    """Sentences on a run: steps, tokens and speed, held-out losses, steps that were clipped or
    skipped, the newest checkpoint.

    Raises ValueError when `run_dir` is no run folder or no step of it was logged.
    """
    profile, train = read_run_profile(run_dir), read_metrics(run_dir, "train")
    if train.empty:
        raise ValueError(
            f"{run_dir} has no training steps yet; train it first, or name another run."
        )
    last, newest = train.iloc[-1], latest_checkpoint(Path(run_dir))
    clipped, skipped = int(train["clipped"].sum()), int(train["skipped"].sum())
    return [
        f"{profile.name} has {int(last['step']):,} of {profile.schedule.max_steps:,} steps behind"
        f" it: {int(last['tokens']):,} tokens in {clock(last['seconds'])} of training,"
        f" {train['tokens_per_second'].median():,.0f} tokens/s in the median step.",
        _describe_losses(read_metrics(run_dir, "held_out")),
        f"In {clipped:,} steps the gradient was clipped; {skipped:,} steps were not finite and"
        " changed nothing.",
        f"The newest checkpoint is {newest.name}." if newest else "There is no checkpoint yet.",
    ]


def _describe_losses(held_out: pd.DataFrame) -> str:
    known = held_out.dropna(subset=["held_out_loss"]) if len(held_out) else held_out
    if known.empty:
        return "The held-out loss has not been measured."
    first, last, best = known.iloc[0], known.iloc[-1], known.nsmallest(1, "held_out_loss").iloc[0]
    return (
        f"The held-out loss went from {first['held_out_loss']:.3f} nats per token at step"
        f" {int(first['step']):,} to {last['held_out_loss']:.3f} at step {int(last['step']):,}; the"
        f" lowest is {best['held_out_loss']:.3f}, at step {int(best['step']):,}."
    )
