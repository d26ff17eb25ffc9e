"""The registry of runs: what a run is called, and a table of all that lie in `runs/`. Folders are
the only database.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from transformers import PreTrainedTokenizerBase

from kl3m_nb.common import paths, values
from kl3m_nb.common.files import read_json
from kl3m_nb.data.loader import Reading
from kl3m_nb.data.special_ids import border_id, start_id
from kl3m_nb.model.folder import TRAINED_STEPS, read_stack, stack_source
from kl3m_nb.profiles import Profile, get_profile, profile_with
from kl3m_nb.runs import checkpoints
from kl3m_nb.runs.folder import RUN_FILE, init_name, read_run_init, read_run_profile
from kl3m_nb.runs.metrics import FILE_NAME, first_step, read_metrics
from kl3m_nb.runs.status import newest_state


class UnknownTraining(ValueError):
    """What a checkpoint, or one that it was begun from, was trained on is not recorded here; the
    message is one sentence.
    """


# What each notebook writes; the laptop profile's runs are the demonstration.
NOTEBOOK_STAGES = {
    "00_source_model": "source",
    "01_stacking": "stack",
    "02_training": "grown",
    "03_spectral_analysis": "spectra",
    "04_generation_evaluation": "generation",
    "05_growth_comparison": "growth",
}


# What the checkpoints that can be judged are called, and the stage each belongs to.
CHECKPOINT_STAGES = {
    "source": "source",
    "stack, step 0": "stack",
    "trained": "grown",
    "scratch": "scratch",
}


def run_path(profile_name: str, stage: str, run: str = "") -> Path:
    """The folder `run` below runs/, or when it is empty the one a stage of a profile writes by
    itself.

    run_path("tiny", "grown") is runs/demo-grown, run_path("kl3m-007-500m", "grown")
    runs/kl3m-007-500m-grown. Raises ValueError for a `run` that is no text or lies elsewhere, where
    `load_runs` would not find it, and without one for an unknown profile.
    """
    if not isinstance(run, str) or os.sep in run or run in (".", ".."):
        raise ValueError(
            f"The run {run!r} is no name of a folder right below {paths.runs_dir()}; give one such"
            " as my-run."
        )
    if not run:
        get_profile(profile_name)
    return paths.runs_dir() / (
        run or f"{'demo' if profile_name == 'tiny' else profile_name}-{stage}"
    )


def stage_profile(profile_name: str, stage: str) -> Profile:
    """The profile that a stage's run was trained with, or the named profile itself where there is
    no such run yet.
    """
    folder = run_path(profile_name, stage)
    return read_run_profile(folder) if (folder / RUN_FILE).is_file() else get_profile(profile_name)


def stage_checkpoint(profile_name: str, stage: str) -> Path | None:
    """The newest sound checkpoint of a stage of a profile, or its stack; None where there is none
    yet.

    The source is what the stack was made of, wherever that lies; the source run's newest where that
    is gone or there is no stack.
    """
    folder, stack = run_path(profile_name, stage), run_path(profile_name, "stack") / "checkpoint"
    if stage == "stack":
        return stack if stack.is_dir() else None
    if stage == "source" and (source := stack_source(read_stack(stack))):
        return source
    return checkpoints.require_checkpoint(folder) if checkpoints.latest_checkpoint(folder) else None


def require_stage_checkpoint(profile_name: str, stage: str) -> Path:
    """`stage_checkpoint` of a stage that is trained. Raises ValueError that says what to run where
    there is none.
    """
    return stage_checkpoint(profile_name, stage) or checkpoints.require_checkpoint(
        run_path(profile_name, stage)
    )


def named_checkpoints(
    profile_name: str, given: Mapping[str, str], others: str | list[str] = ""
) -> dict[str, str | Path]:
    """{name: checkpoint}: that of every stage of a profile that has one, then those listed in
    `others`, named as given.

    A checkpoint in `given`, by a name of `CHECKPOINT_STAGES`, is taken in place of its stage's; an
    empty string names none. Raises ValueError for an unknown profile, a stage without a sound
    checkpoint, `others` as `listed`, and where there is no checkpoint at all.
    """
    found = {
        name: given.get(name) or stage_checkpoint(profile_name, stage)
        for name, stage in CHECKPOINT_STAGES.items()
    }
    named = {name: checkpoint for name, checkpoint in found.items() if checkpoint}
    named |= {name: name for name in listed(others)}
    if not named:
        raise ValueError(
            f"There is no checkpoint of {profile_name} yet; run notebook 00, or name a checkpoint."
        )
    return named


def listed(others: str | list[str]) -> list[str]:
    """The checkpoints that a notebook's parameter `others` names, as a list or in one text, as
    `values.listed` reads it.

    Raises ValueError for anything else.
    """
    try:
        return values.listed(others)
    except ValueError as error:
        raise ValueError(
            f"others is {others!r}{error}; give checkpoint folders or hub ids as a list, or as one"
            " text, separated by commas or blanks, with those that hold a comma or blank in"
            " quotes."
        ) from None


def profile_of(checkpoint: str | Path) -> Profile | None:
    """The profile a checkpoint was trained with; None for one that no run here wrote."""
    folder = paths.checkpoint_place(checkpoint).path
    run_dir = folder.parent.parent
    known = (run_dir / RUN_FILE).is_file() and folder in checkpoints.whole_checkpoints(run_dir)
    return read_run_profile(run_dir) if known else None


def profile_to_judge(
    profile_name: str, checkpoint: str | Path, documents: str = "", tokenizer: str = "", **changes
) -> Profile:
    """The named profile with the text, tokenizer, vocabulary and context that a `checkpoint` to be
    stacked is judged with.

    Unless `documents` and `tokenizer` are given, they are those the checkpoint was trained with:
    told by its run, its tokenizer by the checkpoint itself, and by the named profile where neither
    says. Vocabulary and context are those of its config.json. `changes` are as in `profile_with`, 0
    being the profile's own. Raises ValueError for values that no profile can have.
    """
    folder, made_with = (
        paths.checkpoint_place(checkpoint).path,
        profile_of(checkpoint) or get_profile(profile_name),
    )
    own = str(folder) if (folder / "tokenizer.json").is_file() else made_with.data.tokenizer
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    keys = {
        "vocabulary": "vocab_size",
        "context": "max_position_embeddings",
    }  # windows that the checkpoint can read
    return profile_with(
        profile_name,
        source=documents or made_with.data.source,
        tokenizer=tokenizer or own,
        **{field: config.get(key, getattr(made_with.model, field)) for field, key in keys.items()},
        **changes,
    )


def trained_on(checkpoint: str | Path) -> tuple[Profile, int] | None:
    """The profile a checkpoint was trained with and the windows it had seen; None for a checkpoint
    that no run here wrote.

    Steps that a run carries on from a published checkpoint read other data and are not counted.
    Raises ValueError when the run's metrics, which tell at which step it began, are lost.
    """
    profile, folder = profile_of(checkpoint), paths.checkpoint_place(checkpoint).path
    if profile is None:
        return None
    run_dir = folder.parent.parent
    began = first_step(run_dir)
    if began is None:
        raise ValueError(
            f"{run_dir / FILE_NAME} has no evaluation that tells at which step the run began; put"
            " back the file that it wrote."
        )
    steps = checkpoints.checkpoint_step(folder) - began
    return profile, steps * profile.data.micro_batch * profile.data.grad_accumulation


def readings(checkpoint: str | Path) -> list[Reading]:
    """What the run of a checkpoint had read, then what the run that it was begun from had, and so
    on to random weights.

    Of a stack it is what its source had read. Raises UnknownTraining where one of them was not
    written by a run here.
    """
    known, folder = trained_on(checkpoint), paths.checkpoint_place(checkpoint).path
    if known is None:
        record = read_stack(folder)
        source = stack_source(record)
        if source is None or record.get(
            TRAINED_STEPS
        ):  # a model trained from a stack, by no run here
            raise UnknownTraining(f"What {checkpoint} was trained on is not recorded here.")
        return readings(source)
    profile, windows = known
    init = read_run_init(folder.parent.parent)
    return [
        Reading(profile.data, windows, checkpoints.stream_state(folder)),
        *(readings(init) if init else []),
    ]


def document_prefix(checkpoint: str | Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that a checkpoint's training had before a document: what its first token is
    to be predicted from.

    Segments begin a document with the beginning-of-text token and never read the end-of-text token,
    which in dense windows stands between two documents. A fresh stack is as its source was trained;
    where no run here tells, windows are taken as dense. Raises ValueError when the tokenizer names
    no such token.
    """
    record = read_stack(paths.checkpoint_place(checkpoint).path)
    source = None if record.get(TRAINED_STEPS) else stack_source(record)
    profile = profile_of(checkpoint) or (profile_of(source) if source else None)
    in_segments = profile is not None and profile.data.packing == "segments"
    return start_id(tokenizer) if in_segments else border_id(tokenizer)


def load_runs(runs_dir: str | Path | None = None) -> pd.DataFrame:
    """A row per run folder: run, profile, layers, init, step, max_steps, held_out_loss (nats per
    token), tokens, seconds, notebook, checkpoint. All are those of the newest checkpoint, the loss
    of the last evaluation before it; `notebook` says what became of the last one that was run into
    the folder: running, completed, failed, interrupted, killed, or nothing.

    Without `runs_dir` the project's own folder is read. A run without evaluations yet has NaN as
    its loss. Warns of a folder that cannot be read and leaves it out.
    """
    folder = paths.runs_dir() if runs_dir is None else paths.resolve(runs_dir)
    rows = []
    for path in sorted(folder.glob(f"*/{RUN_FILE}")):
        try:
            rows.append(_row(path.parent))
        except (ValueError, OSError) as error:
            warnings.warn(
                f"The run {path.parent.name} is left out of the table: {error}", stacklevel=2
            )
    return pd.DataFrame(rows)


def _row(run_dir: Path) -> dict:
    profile = read_run_profile(run_dir)
    checkpoint = checkpoints.latest_checkpoint(run_dir)
    step = checkpoints.checkpoint_step(checkpoint) if checkpoint else 0
    held_out, saved, trained = (
        _last_up_to(step, read_metrics(run_dir, kind))
        for kind in ("held_out", "checkpoint", "train")
    )
    return {
        "run": run_dir.name,
        "profile": profile.name,
        "layers": profile.model.layers,
        "init": init_name(read_run_init(run_dir)),
        "step": step,
        "max_steps": profile.schedule.max_steps,
        "held_out_loss": held_out.get("held_out_loss", float("nan")),
        "tokens": max(row.get("tokens", 0) for row in (saved, trained)),
        "seconds": max(row.get("seconds", 0.0) for row in (saved, trained)),
        "notebook": newest_state(run_dir),
        "checkpoint": str(checkpoint) if checkpoint else "",
    }


def _last_up_to(step: int, rows: pd.DataFrame) -> dict:
    rows = rows[rows["step"] <= step] if len(rows) else rows
    return dict(rows.iloc[-1]) if len(rows) else {}
