"""The runs that a growth comparison is made of, found from the grown one: what it was stacked from,
and what that had cost.

The grown run's own record of its stack decides which source is counted in, not the name of a
folder: a stack can be made of any checkpoint. A run that lies here tells its cost itself; of a
published model its card does, and not its steps times a batch (the family's cards name 15.83
billion tokens for 63,000 steps of 655,360). Where neither is there, the cost cannot be known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from kl3m_nb.common import files as common_files
from kl3m_nb.common import paths
from kl3m_nb.common.files import read_json
from kl3m_nb.data import tokenizer
from kl3m_nb.data.windows import held_out_windows
from kl3m_nb.model import decoder, scoring
from kl3m_nb.model.costs import run_flops
from kl3m_nb.model.folder import TRAINED_STEPS, read_stack
from kl3m_nb.model.runtime import choose_runtime
from kl3m_nb.profiles import (
    DataSpec,
    ModelSpec,
    Profile,
    get_profile,
    override_profile,
    source_profile,
)
from kl3m_nb.runs import checkpoints, lineage
from kl3m_nb.runs.folder import RUN_FILE, read_run_init, read_run_profile
from kl3m_nb.runs.lineage import UNKNOWN_STEP, carried_stack, model_step
from kl3m_nb.runs.metrics import FILE_NAME, read_metrics

_HELD_OUT = (
    "source",
    "tokenizer",
    "seq_len",
    "held_out_windows",
)  # what decides which windows a run is evaluated on


class Source(NamedTuple):
    """The run whose checkpoint of `step` was stacked."""

    run_dir: Path
    step: int

    def __str__(self) -> str:
        return f"step {self.step:,} of {self.run_dir.name}"


class PublishedSource(NamedTuple):
    """A published checkpoint that was stacked, with the steps and tokens of its card."""

    checkpoint: Path
    counts: lineage.Counts
    # the grown run's, as deep as the source: the cards name no other context or optimizer to count
    # with
    profile: Profile

    def __str__(self) -> str:
        return (
            f"{self.checkpoint.name}, by its card {self.counts.step:,} steps and"
            f" {self.counts.tokens:,} tokens"
        )


class Plan(NamedTuple):
    """What a comparison counts in as the source, and the profile that the run from scratch is
    trained with.
    """

    source: Source | PublishedSource
    scratch: Profile


def plan_comparison(grown_dir: Path, scratch_steps: int = 0) -> Plan:
    """What the run in `grown_dir` is to be compared with: the grown run's own profile from scratch,
    for `scratch_steps` steps.

    0 steps are as many as the grown run's. Raises ValueError when there is no grown run, and like
    `find_source` and `source_curve`: weeks of training would end without what to compare with.
    """
    grown = read_run_profile(grown_dir)
    source = find_source(grown_dir)
    if isinstance(source, Source):
        source_curve(source)
    return Plan(
        source, override_profile(grown, max_steps=scratch_steps or grown.schedule.max_steps)
    )


def find_source(grown_dir: Path) -> Source | PublishedSource:
    """What the stack that a run was started from was made of.

    Raises ValueError when the run was not started from a fresh stack, nothing says what that was
    made of, or it is neither a checkpoint of a run that lies here nor a published one with its
    card, trained from random weights.
    """
    return _source_in(_stack_of(grown_dir), grown_dir)


def _source_in(record: dict, grown_dir: Path) -> Source | PublishedSource:
    if "source" not in record:
        raise ValueError(
            f"Nothing says what the start of {grown_dir}, {read_run_init(grown_dir)}, was made of,"
            " so its cost cannot be counted in; compare a run that was started from a stack of"
            " notebook 01."
        )
    checkpoint = paths.recorded_place(record["source"]).path
    if published := _published(checkpoint, record, grown_dir):
        return published
    run_dir, step = checkpoint.parent.parent, model_step(checkpoint)
    if (
        step == UNKNOWN_STEP
        or not (run_dir / RUN_FILE).is_file()
        or not _is_as_stacked(checkpoint, record)
    ):
        raise ValueError(
            f"{grown_dir} was grown from {record['source']}, which no run here has written as it"
            " was then, so its cost cannot be counted in; put back the folder of the run that"
            " trained it, or grow from a checkpoint of a run or from a published model, a folder"
            " whose name ends in -stepN and whose card names its tokens."
        )
    if init := read_run_init(run_dir):
        raise ValueError(
            f"{run_dir}, which {grown_dir} was grown from, was itself started from {init}, so its"
            " costs are not all that the source took; compare what was grown from a source that"
            " began with random weights."
        )
    return Source(run_dir, step)


def _published(checkpoint: Path, record: dict, grown_dir: Path) -> PublishedSource | None:
    """The source, if it is a model in the family's form that is here as it was stacked."""
    counts = lineage.carried_counts(checkpoint) if checkpoint.is_dir() else lineage.Counts()
    if not counts.step:
        return None
    if any(
        common_files.sha256(checkpoint / name) != digest
        for name, digest in record.get("source_sha256", {}).items()
    ):
        raise ValueError(
            f"{checkpoint} has changed since {grown_dir} was grown from it; put back the model that"
            " was stacked."
        )
    grown = read_run_profile(grown_dir)
    profile = override_profile(grown, layers=record["source_layers"], growth_factor=1)
    if carried_stack(checkpoint, profile):
        raise ValueError(
            f"{checkpoint}, which {grown_dir} was grown from, was itself grown, so its card does"
            " not name all that it took; compare what was grown from a source that was trained"
            " from random weights."
        )
    return PublishedSource(checkpoint, counts, profile)


def source_curve(source: Source | PublishedSource) -> pd.DataFrame:
    """The held-out curve of a source's run up to the step that was stacked.

    Between two evaluations the costs are the checkpoint's and the loss is that of the evaluation
    before. Of a published source there is one row: the costs by its card without seconds, and the
    loss measured now. Raises ValueError when the run's metrics do not reach that step.
    """
    if isinstance(source, PublishedSource):
        step, tokens = source.counts.step, source.counts.tokens
        costs = {
            "step": step,
            "tokens": tokens,
            "seconds": math.nan,
            "flops": run_flops(source.profile, step, tokens),
        }
        return pd.DataFrame(
            [{**costs, "held_out_loss": _measured_loss(source.checkpoint, source.profile)}]
        )
    run_dir, step = source
    curve, saved = _evaluations(run_dir), read_metrics(run_dir, "checkpoint")
    if len(curve) and step in {*curve["step"]}:
        return curve[curve["step"] <= step]
    row = saved[saved["step"] == step].tail(1) if len(saved) else saved
    if curve.empty or row.empty or not (curve["step"] < step).any():
        raise ValueError(
            f"{run_dir / FILE_NAME} does not tell what the source had cost at step {step}, which"
            " was stacked; put back the file that the run wrote."
        )
    curve = curve[curve["step"] < step]
    costs = {key: row[key].iloc[0] for key in ("step", "tokens", "seconds")}
    costs["flops"] = run_flops(read_run_profile(run_dir), step, float(costs["tokens"]))
    return pd.concat([curve, curve.tail(1).assign(**costs)], ignore_index=True)


def _evaluations(run_dir: Path) -> pd.DataFrame:
    """A run's held-out rows. Operations are counted anew, as the rows of earlier versions are
    without Newton-Schulz.
    """
    curve = read_metrics(run_dir, "held_out")
    if curve.empty:
        return curve
    return curve.assign(flops=run_flops(read_run_profile(run_dir), curve["step"], curve["tokens"]))


def _measured_loss(checkpoint: Path, profile: Profile) -> float:
    """The loss of a checkpoint on the held-out windows of `profile`, with the checkpoint's own
    tokenizer.
    """
    runtime = choose_runtime(profile)
    precision = torch.bfloat16 if runtime.precision == "bfloat16" else None
    model = decoder.load_model(checkpoint).to(runtime.device)
    windows = held_out_windows(profile.data, tokenizer.read_tokenizer(str(checkpoint)))
    return scoring.held_out_loss(model, windows, batch_windows=1, autocast=precision).loss


def curves(grown_dir: Path, scratch_dir: Path) -> dict[str, pd.DataFrame]:
    """The held-out curves of source, grown and scratch run, by these names.

    The last loss of a source that was evaluated on other windows is measured again on the grown
    run's, and its others are NaN. Raises ValueError like `find_source`, when that source's
    checkpoint is gone, and for a scratch run that is another model, did not begin with random
    weights, or is evaluated on other text.
    """
    grown, found = read_run_profile(grown_dir), find_source(grown_dir)
    if (scratch_dir / RUN_FILE).is_file():
        scratch = read_run_profile(scratch_dir)
        others = _differences(scratch.model, grown.model) + _differences(
            scratch.data, grown.data, _HELD_OUT
        )
        if init := read_run_init(scratch_dir):
            others.append(f"init is {init}")
        if others:
            raise ValueError(
                f"{scratch_dir} is no run from scratch to compare {grown_dir} with: its"
                f" {', '.join(others)}; name one that notebook 05 has trained (scratch_run), or let"
                " it train one."
            )
    source = source_curve(found)
    if isinstance(found, Source) and _differences(
        read_run_profile(found.run_dir).data, grown.data, _HELD_OUT
    ):
        source = source.assign(held_out_loss=math.nan)
        source.iloc[-1, source.columns.get_loc("held_out_loss")] = _measured_loss(
            _checkpoint_of(found), grown
        )
    return {
        "source": source,
        "grown": _evaluations(grown_dir),
        "scratch": _evaluations(scratch_dir),
    }


def _checkpoint_of(source: Source) -> Path:
    return source.run_dir / "checkpoints" / f"step-{source.step:06d}"


def _differences(
    ours: ModelSpec | DataSpec, theirs: ModelSpec | DataSpec, names: Sequence[str] = ()
) -> list[str]:
    """The fields, those in `names` or all, in which the two differ, in words."""
    pairs = [
        (name, getattr(ours, name), getattr(theirs, name))
        for name in names or [field.name for field in fields(ours)]
    ]
    return [f"{name} is {one!r} instead of {other!r}" for name, one, other in pairs if one != other]


def is_laptop_run(grown_dir: Path) -> bool:
    """Whether a run is the laptop's with nothing changed, source and stack included: what it should
    show is known.
    """
    laptop = get_profile("tiny")
    if not (grown_dir / RUN_FILE).is_file() or read_run_profile(grown_dir) != laptop:
        return False
    try:
        record = _stack_of(grown_dir)
        source = _source_in(record, grown_dir)
    except ValueError:
        return False
    if isinstance(source, PublishedSource):
        return False
    plain = record.get("order") == "cyclic" and not record.get("noise")
    return (
        plain
        and read_run_profile(source.run_dir) == source_profile(laptop)
        and source.step == laptop.source_steps
    )


def _stack_of(grown_dir: Path) -> dict:
    """The record of the fresh stack that a run was started from. Its checkpoints keep it, where the
    stack may be gone.
    """
    init = read_run_init(grown_dir)
    if init is None:
        raise ValueError(
            f"{grown_dir} was started from random weights, so nothing was grown; compare a run of a"
            " stack."
        )
    newest = checkpoints.latest_checkpoint(grown_dir)
    record = (checkpoints.start_record(newest) if newest else {}) or read_stack(
        paths.recorded_place(init).path
    )
    if record.get(TRAINED_STEPS):
        raise ValueError(
            f"{grown_dir} was started from {init}, which had been trained since it was stacked, so"
            " its costs are not all that growing took; compare the run that was started from the"
            " stack."
        )
    return record


def _is_as_stacked(checkpoint: Path, record: dict) -> bool:
    """False when the run was trained anew since: its checkpoint has other weights. One that was
    removed is taken as it was.
    """
    if not checkpoint.is_dir():
        return True
    manifest = checkpoint / checkpoints.MANIFEST
    files = read_json(manifest)["files"] if manifest.is_file() else {}
    return all(
        files.get(name, {}).get("sha256") == sha256
        for name, sha256 in record.get("source_sha256", {}).items()
    )
