"""The runs that a growth comparison is made of, found from the grown one: what it was stacked from, and what that had cost.

The grown run's own record of its stack decides which source is counted in, not the name of a folder: a stack can be made of any
checkpoint. Where no run here wrote that, its cost cannot be known, and no other's is put in its place.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from kl3m_nb import checkpoints, flops, paths
from kl3m_nb.matrices import UNKNOWN_STEP, model_step
from kl3m_nb.metrics import FILE_NAME, read_metrics
from kl3m_nb.model_folder import TRAINED_STEPS, read_json, read_stack
from kl3m_nb.profiles import DataSpec, ModelSpec, Profile, get_profile, override_profile, source_profile
from kl3m_nb.run_folder import RUN_FILE, read_run_init, read_run_profile

_HELD_OUT = ("source", "tokenizer", "seq_len", "held_out_windows")  # what decides which windows a run is evaluated on


class Source(NamedTuple):
    """The run whose checkpoint of `step` was stacked."""

    run_dir: Path
    step: int


class Plan(NamedTuple):
    """What a comparison counts in as the source, and the profile that the run from scratch is trained with."""

    source: Source
    scratch: Profile


def plan_comparison(grown_dir: Path, scratch_steps: int = 0) -> Plan:
    """What the run in `grown_dir` is to be compared with: the grown run's own profile from scratch, for `scratch_steps` steps.

    0 steps are as many as the grown run's. Raises ValueError when there is no grown run, and like `find_source` and
    `source_curve`: weeks of training would end without what to compare with.
    """
    grown = read_run_profile(grown_dir)
    source = find_source(grown_dir)
    source_curve(source)
    return Plan(source, override_profile(grown, max_steps=scratch_steps or grown.schedule.max_steps))


def find_source(grown_dir: Path) -> Source:
    """What the stack that a run was started from was made of.

    Raises ValueError when the run was not started from a fresh stack, nothing says what that was made of, or it is no checkpoint
    of a run that lies here and began with random weights.
    """
    return _source_in(_stack_of(grown_dir), grown_dir)


def _source_in(record: dict, grown_dir: Path) -> Source:
    if "source" not in record:
        raise ValueError(
            f"Nothing says what the start of {grown_dir}, {read_run_init(grown_dir)}, was made of, so its cost cannot be counted "
            "in; compare a run that was started from a stack of notebook 01."
        )
    checkpoint = paths.resolve(record["source"])
    run_dir, step = checkpoint.parent.parent, model_step(checkpoint)
    if step == UNKNOWN_STEP or not (run_dir / RUN_FILE).is_file() or not _is_as_stacked(checkpoint, record):
        raise ValueError(
            f"{grown_dir} was grown from {record['source']}, which no run here has written as it was then, so its cost cannot be "
            "counted in; put back the folder of the run that trained it, or grow from a checkpoint of a run."
        )
    if init := read_run_init(run_dir):
        raise ValueError(
            f"{run_dir}, which {grown_dir} was grown from, was itself started from {init}, so its costs are not all that the "
            "source took; compare what was grown from a source that began with random weights."
        )
    return Source(run_dir, step)


def source_curve(source: Source) -> pd.DataFrame:
    """The held-out curve of a source's run up to the step that was stacked.

    Between two evaluations the costs are the checkpoint's and the loss is that of the evaluation before. Raises ValueError when
    the run's metrics do not reach that step.
    """
    run_dir, step = source
    curve, saved = (read_metrics(run_dir, kind) for kind in ("held_out", "checkpoint"))
    if len(curve) and step in {*curve["step"]}:
        return curve[curve["step"] <= step]
    row = saved[saved["step"] == step].tail(1) if len(saved) else saved
    if curve.empty or row.empty or not (curve["step"] < step).any():
        raise ValueError(
            f"{run_dir / FILE_NAME} does not tell what the source had cost at step {step}, which was stacked; put back the file "
            "that the run wrote."
        )
    curve, profile = curve[curve["step"] < step], read_run_profile(run_dir)
    tokens = float(row["tokens"].iloc[0])
    costs = {"flops": tokens * flops.flops_per_token(profile.model, profile.data.seq_len)}
    last = curve.tail(1).assign(**{key: row[key].iloc[0] for key in ("step", "tokens", "seconds")}, **costs)
    return pd.concat([curve, last], ignore_index=True)


def curves(grown_dir: Path, scratch_dir: Path) -> dict[str, pd.DataFrame]:
    """The held-out curves of source, grown and scratch run, by these names.

    Raises ValueError like `find_source`, and for a scratch run that is another model, did not begin with random weights, or is
    evaluated on other text. Warns where the source is: its cost counts, its losses are not to be compared.
    """
    grown, found = read_run_profile(grown_dir), find_source(grown_dir)
    if (scratch_dir / RUN_FILE).is_file():
        scratch = read_run_profile(scratch_dir)
        others = _differences(scratch.model, grown.model) + _differences(scratch.data, grown.data, _HELD_OUT)
        if init := read_run_init(scratch_dir):
            others.append(f"init is {init}")
        if others:
            raise ValueError(
                f"{scratch_dir} is no run from scratch to compare {grown_dir} with: its {', '.join(others)}; name one that "
                "notebook 05 has trained (scratch_run), or let it train one."
            )
    if others := _differences(read_run_profile(found.run_dir).data, grown.data, _HELD_OUT):
        warnings.warn(
            f"The source {found.run_dir.name} was evaluated on other windows ({', '.join(others)}): its cost counts, its losses "
            "are not to be compared.",
            stacklevel=2,
        )
    source = source_curve(found)
    return {"source": source, "grown": read_metrics(grown_dir, "held_out"), "scratch": read_metrics(scratch_dir, "held_out")}


def _differences(ours: ModelSpec | DataSpec, theirs: ModelSpec | DataSpec, names: Sequence[str] = ()) -> list[str]:
    """The fields, those in `names` or all, in which the two differ, in words."""
    pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in names or [field.name for field in fields(ours)]]
    return [f"{name} is {one!r} instead of {other!r}" for name, one, other in pairs if one != other]


def is_laptop_run(grown_dir: Path) -> bool:
    """Whether a run is the laptop's with nothing changed, source and stack included: what it should show is known."""
    laptop = get_profile("tiny")
    if not (grown_dir / RUN_FILE).is_file() or read_run_profile(grown_dir) != laptop:
        return False
    try:
        record = _stack_of(grown_dir)
        source = _source_in(record, grown_dir)
    except ValueError:
        return False
    plain = record.get("order") == "cyclic" and not record.get("noise")
    return plain and read_run_profile(source.run_dir) == source_profile(laptop) and source.step == laptop.source_steps


def _stack_of(grown_dir: Path) -> dict:
    """The record of the fresh stack that a run was started from. Its checkpoints keep it, where the stack may be gone."""
    init = read_run_init(grown_dir)
    if init is None:
        raise ValueError(f"{grown_dir} was started from random weights, so nothing was grown; compare a run of a stack.")
    newest = checkpoints.latest_checkpoint(grown_dir)
    record = (checkpoints.start_record(newest) if newest else {}) or read_stack(paths.resolve(init))
    if record.get(TRAINED_STEPS):
        raise ValueError(
            f"{grown_dir} was started from {init}, which had been trained since it was stacked, so its costs are not all that "
            "growing took; compare the run that was started from the stack."
        )
    return record


def _is_as_stacked(checkpoint: Path, record: dict) -> bool:
    """False when the run was trained anew since: its checkpoint has other weights. One that was removed is taken as it was."""
    if not checkpoint.is_dir():
        return True
    manifest = checkpoint / checkpoints.MANIFEST
    files = read_json(manifest)["files"] if manifest.is_file() else {}
    return all(files.get(name, {}).get("sha256") == sha256 for name, sha256 in record.get("source_sha256", {}).items())
