"""Does anything grow? 2,000 steps with checkpoints, clamps and resumes in a loop; memory, open
files, threads and step time.

The run is stopped and resumed in the same process every `--resume-every` steps, as somebody does
who goes on with it in a notebook for days. Writes benchmarks/results/soak.csv, a row for every
resume, and docs/soak.png.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from _common import write_table

from kl3m_nb import profiles
from kl3m_nb.figures import style
from kl3m_nb.runs.metrics import read_metrics
from kl3m_nb.training import loop

PAGE = os.sysconf("SC_PAGE_SIZE")
LIMITS = {
    "memory_mib": 0.01,
    "open_files": 0.0,
    "threads": 0.0,
    "median_step_ms": 0.1,
}  # of growth, from half to half


def soak(steps: int, resume_every: int, run_dir: Path) -> list[dict]:
    """A row for each resume: what the process holds at its end, and the time of its steps."""
    profile = profiles.get_profile(
        "tiny",
        layers=4,
        hidden=64,
        mlp=128,
        heads=4,
        kv_heads=2,
        head_size=16,
        growth_factor=1,
        vocabulary=1024,
        context=64,
        seq_len=64,
        micro_batch=4,
        grad_accumulation=2,
        held_out_windows=8,
        max_steps=steps,
        warmup_steps=20,
        eval_every=50,
        checkpoint_every=10,
        clamp_every=10,
        keep_checkpoints=2,
    )
    rows = []
    while True:
        goal = (len(rows) + 1) * resume_every

        def stop(row, goal=goal) -> None:
            if row["kind"] == "train" and row["step"] == goal and goal < steps:
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            finished = loop.train(profile, run_dir, callbacks=[stop])
        except KeyboardInterrupt:
            finished = None
        rows.append({"steps": min(goal, steps), **_held()})
        if finished:
            break
    times = (
        read_metrics(run_dir, "train").tokens_per_second.rdiv(profile.tokens_per_step).to_numpy()
        * 1e3
    )
    for number, row in enumerate(rows):
        row["median_step_ms"] = float(np.median(times[number * resume_every : row["steps"]]))
    return rows


def _held() -> dict:
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    return {
        "memory_mib": resident / 2**20,
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def draw(rows: list[dict], path: Path) -> None:
    """Four small panels over the steps, each from zero: a leak is a slope."""
    style.use_style()
    steps = [row["steps"] for row in rows]
    panels = {
        "memory_mib": "resident memory, MiB",
        "median_step_ms": "median step, ms",
        "open_files": "open files",
        "threads": "threads",
    }
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 4.2), sharex=True, layout="constrained")
    for axis, (column, title) in zip(axes.flat, panels.items(), strict=True):
        values = [row[column] for row in rows]
        axis.plot(steps, values, marker="o", markersize=3)
        axis.set_ylim(0, 1.25 * max(values))
        axis.set_title(title)
    for axis in axes[1]:
        axis.set_xlabel("optimizer step")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--resume-every", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = soak(options.steps, options.resume_every, Path(folder) / "run")
    write_table("soak", table)
    draw(table, Path(__file__).resolve().parent.parent / "docs" / "soak.png")
    settled = table[len(table) // 4 :]  # the first resumes fill caches
    halves = settled[: len(settled) // 2], settled[len(settled) // 2 :]
    early, late = (
        {key: float(np.median([row[key] for row in half])) for key in LIMITS} for half in halves
    )
    grown = {key: late[key] / early[key] - 1 for key in LIMITS}
    print(
        "from the first half to the second: "
        + ", ".join(f"{key} {value:+.1%}" for key, value in grown.items())
    )
    sys.exit(any(grown[key] > limit for key, limit in LIMITS.items()))
