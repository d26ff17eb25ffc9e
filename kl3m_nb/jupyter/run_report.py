"""A run as one HTML page: what it has reached, its curves, what was clipped, skipped and clamped,
and its settings.

Drawn from the run folder alone: while the run goes on, after a crash, or on another machine.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from kl3m_nb.common import paths
from kl3m_nb.common.text import clock
from kl3m_nb.figures import training
from kl3m_nb.jupyter.report_page import ReportPage
from kl3m_nb.profiles import Profile
from kl3m_nb.runs import checkpoints, folder
from kl3m_nb.runs.metrics import read_metrics
from kl3m_nb.spectra import findings, history

PAGE = "report.html"


def write_run_report(run_dir: str | Path) -> Path:
    """Writes report.html and its figures into the run folder and returns the page's path.

    Raises ValueError when `run_dir` is no run folder or no step of it was logged.
    """
    run_dir = paths.resolve(run_dir)
    profile = folder.read_run_profile(run_dir)
    train, held_out, experts = (
        read_metrics(run_dir, kind) for kind in ("train", "held_out", "experts")
    )
    if train.empty:
        raise ValueError(
            f"{run_dir} has no training steps yet; train it first, or name another run."
        )
    page = ReportPage(run_dir)
    page.sentences += [*_progress(train, profile), *_losses(held_out), *_interventions(train)]
    page.heading("Training")
    page.figure(
        training.plot_training(train, held_out),
        "training",
        "Loss, learning rates, gradient norm and speed.",
        train,
    )
    page.heading("What the objective consists of")
    figure = training.plot_objective_terms(train, profile.objective)
    page.figure(
        figure,
        "objective_terms",
        "What each regulariser adds, and the entropy of the predictions.",
        train,
    )
    clamps = history.clamp_history(run_dir, profile.model.layers // profile.growth_factor)
    if not clamps.empty:
        page.heading("What the clamp does")
        page.sentences += findings.describe_clamp(clamps)
        caption = "Condition before each clamp, and how many singular values it raised."
        page.figure(training.plot_clamp_events(clamps), "clamp_events", caption, clamps)
    if not experts.empty:
        page.heading("How the experts are used")
        page.figure(
            training.plot_expert_use(experts),
            "experts",
            "Each expert's share of its layer's choices.",
            experts,
        )
    page.sentences += _checkpoints(run_dir)
    settings = {
        "started from": folder.read_run_init(run_dir) or "random weights",
        "carried out on": folder.read_run_runtime(run_dir),
        **profile.table(),
    }
    return page.write(run_dir / PAGE, f"Run {run_dir.name}", settings)


def _progress(train: pd.DataFrame, profile: Profile) -> list[str]:
    last = train.iloc[-1]
    return [
        f"{profile.name} has {int(last['step']):,} of {profile.schedule.max_steps:,} steps behind"
        f" it: {int(last['tokens']):,} tokens in {clock(last['seconds'])} of training,"
        f" {train['tokens_per_second'].median():,.0f} tokens/s in the median step."
    ]


def _losses(held_out: pd.DataFrame) -> list[str]:
    known = held_out.dropna(subset=["held_out_loss"]) if len(held_out) else held_out
    if known.empty:
        return ["The held-out loss has not been measured."]
    first, last, best = known.iloc[0], known.iloc[-1], known.loc[known["held_out_loss"].idxmin()]
    return [
        f"The held-out loss went from {first['held_out_loss']:.3f} nats per token at step"
        f" {int(first['step']):,} to {last['held_out_loss']:.3f} at step {int(last['step']):,}; the"
        f" lowest is {best['held_out_loss']:.3f}, at step {int(best['step']):,}."
    ]


def _interventions(train: pd.DataFrame) -> list[str]:
    clipped, skipped = int(train["clipped"].sum()), int(train["skipped"].sum())
    return [
        f"In {clipped:,} steps the gradient was clipped; {skipped:,} steps were not finite and"
        " changed nothing."
    ]


def _checkpoints(run_dir: Path) -> list[str]:
    newest = checkpoints.latest_checkpoint(run_dir)
    return [f"The newest checkpoint is {newest.name}." if newest else "There is no checkpoint yet."]
