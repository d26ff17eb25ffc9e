"""What a run did to its matrices over time: its checkpoints in order, any table measured at each of
them, its clamp events.

A run keeps its newest checkpoints only; the clamp's log, written at every event, fills in what lies
between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from kl3m_nb.model.folder import ModelOrCheckpoint
from kl3m_nb.model.roles import HEAD_LAYER
from kl3m_nb.optim.model_clamp import LOOKED_AT
from kl3m_nb.runs import checkpoints, metrics

AT_CEILING = 0.99  # share of the ceiling from which a matrix counts as sitting at it


# beyond what a healthy matrix drifts to between two clamps (the family reports 2208 at 2000)
FAR_ABOVE_CEILING = 1.15


def trajectory(
    run_dir: str | Path, start: ModelOrCheckpoint, start_step: int = 0
) -> dict[int, ModelOrCheckpoint]:
    """`start` (the stack the run was begun from, or what stands for it) at `start_step`, and the
    run's later whole checkpoints.

    Raises ValueError when the run has no checkpoint.
    """
    checkpoints.require_checkpoint(Path(run_dir))
    folders = {
        checkpoints.checkpoint_step(folder): folder
        for folder in checkpoints.whole_checkpoints(Path(run_dir))
    }
    return {start_step: start} | {
        step: folder for step, folder in folders.items() if step > start_step
    }


def over_checkpoints(
    steps: Mapping[int, ModelOrCheckpoint],
    measure: Callable[..., pd.DataFrame],
    *arguments,
    progress: Callable[[int, int], None] | None = None,
    **options,
) -> pd.DataFrame:
    """`measure(checkpoint, *arguments, **options)` at every checkpoint of `steps`, in one table
    with a column `step` in front.

    over_checkpoints(trajectory(run, stack), copies.copy_divergence, 30, reference=stack) is the
    divergence over training. `progress` hears (done, total) over all checkpoints, of a `measure`
    that has such a `progress` itself.
    """
    tables = []
    for before, (step, checkpoint) in enumerate(sorted(steps.items())):
        if progress is not None:
            options["progress"] = lambda done, total, before=before: progress(
                before * total + done, len(steps) * total
            )
        table = measure(checkpoint, *arguments, **options)
        tables.append(table.drop(columns="step", errors="ignore"))
        tables[-1].insert(0, "step", step)
    return pd.concat(tables, ignore_index=True)


def clamp_history(
    run_dir: str | Path, source_layers: int, last_step: float = math.inf
) -> pd.DataFrame:
    """A row per matrix and clamp event up to `last_step`: step, layer, source_layer, copy, role,
    name, route, sigma_max, sigma_min, tau, raised, max_condition, condition and at_ceiling.

    `condition` is σ₁/σ_min before the clamp, NaN for a matrix that a certificate spared from being
    looked at; `at_ceiling` tells whether it had reached its max_condition (`raised` values were
    then put back). Empty without clamp events.
    """
    events = metrics.read_metrics(run_dir, "clamp")
    if events.empty or (events := events[events["step"] <= last_step]).empty:
        return pd.DataFrame()
    sigma_max, sigma_min = events["sigma_max"].astype(float), events["sigma_min"].astype(float)
    condition = (sigma_max / sigma_min).where(was_measured(events))
    in_block = events["layer"] != HEAD_LAYER
    return events.assign(
        source_layer=(events["layer"] % source_layers).where(in_block, HEAD_LAYER),
        copy=(events["layer"] // source_layers).where(in_block, HEAD_LAYER),
        condition=condition,
        at_ceiling=condition >= AT_CEILING * events["max_condition"],
    )


def was_measured(events: pd.DataFrame) -> pd.Series:
    """Tell for each row of `clamp_history`'s events whether the clamp measured its σ₁ and σ_min; a
    certificate measures neither.
    """
    return events["route"].isin(LOOKED_AT)
