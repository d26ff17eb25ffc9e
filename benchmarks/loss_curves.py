"""Held-out curves of many small runs, to test forecasts on: what `growth.forecast_match` is
calibrated with.

    python benchmarks/loss_curves.py

The runs differ in length, warmup, schedule, learning rate, seed and depth; every fourth is grown
from a run before it. They train on the embedded corpus. `results/loss_curves.csv` has a row for
each evaluation, about 40 a run. All 36 runs take about seven minutes of one core.
`tests/test_forecasts.py` takes the width of the band from them and judges each run by the others.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import pandas as pd
import torch
from _common import RESULTS, environment

from kl3m_nb import profiles
from kl3m_nb.growth import stacking
from kl3m_nb.runs.metrics import read_metrics
from kl3m_nb.training import loop

LENGTHS = (120, 200, 320)
MIN_LR_RATIOS = (0.1, 0.0, 1.0, 0.1)  # 1.0: a constant learning rate
BASE_LRS = (0.01, 0.005, 0.02)
SIZE = dict(
    hidden=64,
    mlp=128,
    heads=4,
    kv_heads=2,
    head_size=16,
    vocabulary=1024,
    context=64,
    seq_len=64,
    micro_batch=8,
    held_out_windows=64,
    ns_precision="float32",
    clamp_every=0,
)


def settings() -> list[tuple[str, profiles.Profile]]:
    """(kind, profile) of every run: three of random weights, then one grown from the last of 3
    layers before it, and so on.
    """
    described = []
    for number, (length, (ratio, base_lr)) in enumerate(
        itertools.product(LENGTHS, zip(MIN_LR_RATIOS * 3, BASE_LRS * 4, strict=True))
    ):
        kind = "grown" if number % 4 == 3 else "scratch"
        layers = 6 if kind == "grown" or number % 3 == 2 else 3
        described.append(
            (
                kind,
                profiles.get_profile(
                    "tiny",
                    **SIZE,
                    layers=layers,
                    growth_factor=1,
                    seed=100 + number,
                    base_lr=base_lr,
                    max_steps=length,
                    warmup_steps=length // 10,
                    min_lr_ratio=ratio,
                    eval_every=length // 40,
                    checkpoint_every=length,
                ),
            )
        )
    return described


def table(number: int, kind: str, profile: profiles.Profile, curve: pd.DataFrame) -> pd.DataFrame:
    """The rows of one run."""
    schedule = {
        key: getattr(profile.schedule, key) for key in ("max_steps", "warmup_steps", "min_lr_ratio")
    }
    facts = {
        "run": number,
        "kind": kind,
        "layers": profile.model.layers,
        "base_lr": profile.optimizer.base_lr,
        **schedule,
    }
    return (
        curve[["step", "held_out_loss"]]
        .round({"held_out_loss": 5})
        .assign(**facts)[[*facts, "step", "held_out_loss"]]
    )


def write(tables: list[pd.DataFrame]) -> None:
    """Writes all runs, below a line on the machine and the versions."""
    path = RESULTS / "loss_curves.csv"
    with path.open("w", encoding="utf-8") as file:
        file.write(
            "# " + ", ".join(f"{key} {value}" for key, value in environment().items()) + "\n"
        )
        pd.concat(tables).to_csv(file, index=False)
    print(path)


def main() -> None:
    torch.set_num_threads(1)
    tables, newest = [], None
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, profile) in enumerate(settings()):
            start = None
            if kind == "grown":
                start = Path(folder) / f"stack-{number}"
                stacking.stack_checkpoint(newest, start, 2)
            result = loop.train(profile, Path(folder) / f"run-{number}", start)
            if kind == "scratch" and profile.model.layers == 3:
                newest = result.checkpoint
            tables.append(table(number, kind, profile, read_metrics(result.run_dir, "held_out")))
            print(
                f"run {number} of {kind}, {profile.schedule.max_steps} steps:"
                f" {result.held_out_loss:.3f}",
                flush=True,
            )
    write(tables)


if __name__ == "__main__":
    main()
