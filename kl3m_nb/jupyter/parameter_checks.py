"""What the parameters of each notebook accept beyond their types, checked before any work is done.

`run` asks before it starts a kernel, and each notebook in its configuration cell, for what was
typed in JupyterLab. What a notebook hands to a function that can judge it without work is judged by
that function.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from kl3m_nb.common import paths
from kl3m_nb.data import corpus
from kl3m_nb.data.special_ids import end_id, start_id
from kl3m_nb.data.tokenizer import CORPUS_NAMES, load_tokenizer, read_tokenizer
from kl3m_nb.evaluation import generation
from kl3m_nb.growth import compare, stacking
from kl3m_nb.jupyter.parameters import assigned_kinds, assigned_names, find_notebook, require_known
from kl3m_nb.model import decoder
from kl3m_nb.model.roles import BLOCK_ROLES, HEAD_LAYER
from kl3m_nb.profiles import (
    FIELD_TYPES,
    Profile,
    card_of,
    get_profile,
    profile_with,
    source_profile,
)
from kl3m_nb.runs import checkpoints, registry
from kl3m_nb.runs.folder import RUN_FILE, check_run_folder
from kl3m_nb.spectra.matrices import find_matrices
from kl3m_nb.spectra.singular_values import spectrum_key
from kl3m_nb.spectra.subject import find_subject
from kl3m_nb.training import torchrun

_RANGES = {  # what is accepted, in words: the test, and the parameters
    "a whole number, at least 1": (
        lambda value: isinstance(value, int) and value >= 1,
        "document_count prompt_count top_k",
    ),
    "a whole number, at least 0": (
        lambda value: isinstance(value, int) and value >= 0,
        "windows processes scratch_steps source_layers",
    ),
    "at least 0 and finite": (
        lambda value: isinstance(value, (int, float)) and 0 <= value < math.inf,
        "reference_loss",
    ),
}


_INJECTED = "# Parameters\n"  # how papermill begins the cell it injects


_TEXT_PARAMETERS = {
    "source": "source",
    "stack": "documents",
    "grown": "source",
}  # by stage: which names documents to read


def check_notebook(name: str, namespace: Mapping[str, object]) -> None:
    """`check_values` for a notebook's own cell: `name` is "02_training", `namespace` its
    `globals()`.

    Raises ValueError for a parameter that is missing, a name that the notebook does not have, and a
    value that is not of the type it is declared with, too: papermill injects any name and casts no
    value.
    """
    kinds = _declared_kinds(name, namespace)
    if not kinds:
        return
    require_known(_injected_names(namespace), kinds, name)
    if missing := [key for key in kinds if key not in namespace]:
        raise ValueError(
            f"The parameter {missing[0]!r} of {name} is not set; put its line back into the"
            " parameters cell."
        )
    values = {key: namespace[key] for key in kinds}
    for key, value in values.items():
        found = type(value).__name__
        if (
            kinds[key]
            and found != kinds[key]
            and (found, kinds[key]) not in (("int", "float"), ("str", "list"))
        ):
            raise ValueError(
                f"The parameter {key!r} of {name} is of type {kinds[key]}; {value!r} is not."
            )
    check_values(registry.NOTEBOOK_STAGES[name], values)


def _injected_names(namespace: Mapping[str, object]) -> Iterable[str]:
    """The names in the cell that papermill has injected, which IPython remembers; none where there
    is no such cell.
    """
    injected = [source for source in namespace.get("In", ()) if source.startswith(_INJECTED)]
    return assigned_names(injected[-1]) if injected else ()


def _declared_kinds(name: str, namespace: Mapping[str, object]) -> dict[str, str]:
    """{parameter: type} of the notebook's file; of what the kernel has seen where that is renamed
    or somewhere else.
    """
    try:
        notebook = find_notebook(name)
    except ValueError:
        seen = namespace.get("__annotations__", {})
        return {
            key: kind.__name__
            for key, kind in seen.items()
            if kind in (int, float, str, bool, list)
        }
    return assigned_kinds(notebook)


def check_values(stage: str, values: Mapping[str, object]) -> None:
    """Raises ValueError or FileNotFoundError, in one sentence, for the first of a notebook's
    parameters that cannot be meant.

    `stage` is the notebook's of `runs.NOTEBOOK_STAGES`. Nothing is downloaded: what a hub id names
    is found out by the work.
    """
    profile = notebook_profile(stage, values)
    for words, (accepts, keys) in _RANGES.items():
        for key in keys.split():
            if key in values and not accepts(values[key]):
                raise ValueError(f"The parameter {key} is {values[key]!r}; it must be {words}.")
    if stage in _TEXT_PARAMETERS and not _has_begun(stage, values):
        _check_tokenizer(profile)
    for key, of_stage in (("run", stage), ("scratch_run", "scratch")):
        registry.run_path(values["profile"], of_stage, values.get(key, ""))
    _check_checkpoints(stage, values)
    if stage in _TEXT_PARAMETERS and (text := values[_TEXT_PARAMETERS[stage]]):
        corpus.check_source(text)
    if stage == "stack":
        stacking.check_order(values["order"], values["noise"])
    elif stage == "grown":
        if values["processes"]:
            torchrun.check_processes(profile, values["processes"])
        _check_start(values, profile)
    elif stage == "spectra":
        _check_role(values)
    elif stage == "generation":
        _check_writing(values, profile)
    _check_run(stage, values, profile)


def notebook_profile(stage: str, values: Mapping[str, object]) -> Profile:
    """The profile that a notebook's parameters ask for; where it builds a model, those named like a
    profile's field change it.

    Where a source is stacked, vocabulary and context are the source's. Raises ValueError as
    `get_profile`.
    """
    if stage not in _TEXT_PARAMETERS:
        return get_profile(values["profile"])
    if stage == "stack" and (stacked := _source_to_stack(values)):
        settings = {
            key: values[key] for key in ("documents", "tokenizer", "seq_len", "held_out_windows")
        }
        return registry.profile_to_judge(values["profile"], stacked, **settings)
    fields = {key: value for key, value in values.items() if key in FIELD_TYPES}
    fields["source"] = values[_TEXT_PARAMETERS[stage]]
    if stage == "source":
        return source_profile(
            profile_with(values["profile"], **fields, source_steps=values["max_steps"])
        )
    return profile_with(values["profile"], **fields)


def _check_checkpoints(stage: str, values: Mapping[str, object]) -> None:
    """Refuses a checkpoint that a notebook would look for in vain. A run that has begun does not
    need its `init` any more.
    """
    keys = registry.CHECKPOINT_PARAMETERS.get(stage, ())
    if stage == "grown" and not _has_begun(stage, values):
        keys = ("init",) if values["init"] != "random" else ()
    for key in keys:
        for name in registry.listed(values[key]) if key == "others" else [values[key]]:
            if name and not _place(name) and (stage == "stack" or not paths.is_hub_id(name)):
                places = " or ".join(map(str, dict.fromkeys((Path.cwd(), paths.project_root()))))
                raise ValueError(
                    f"The parameter {key} names no checkpoint {name} below {places}; give a"
                    " checkpoint folder"
                    f"{'' if stage == 'stack' else ' or a hub id OWNER/NAME'}"
                    f"{', in quotes where it holds a comma or blank' if key == 'others' else ''}."
                )


def _has_begun(stage: str, values: Mapping[str, object]) -> bool:
    """Whether there is a run by these values."""
    return (registry.run_path(values["profile"], stage, values["run"]) / RUN_FILE).exists()


def _source_to_stack(values: Mapping[str, object]) -> Path | None:
    """The checkpoint that notebook 01 stacks; None where it is not there."""
    if values["source"]:
        return _place(values["source"])
    return checkpoints.latest_checkpoint(registry.run_path(values["profile"], "source"))


def _check_tokenizer(profile: Profile) -> None:
    """Refuses a tokenizer in a folder that the model has no room for, or that lacks a token which
    the data need.
    """
    name, data = profile.data.tokenizer, profile.data
    if name in CORPUS_NAMES or (paths.is_hub_id(name) and not paths.find(name).is_dir()):
        return
    tokenizer = load_tokenizer(name, data.source, profile.model.vocabulary)
    end_id(tokenizer)
    if data.packing == "segments":
        start_id(tokenizer)


def _check_start(values: Mapping[str, object], profile: Profile) -> None:
    """Refuses a run that would begin with a stack that is not there, or a checkpoint that the
    profile does not fit.
    """
    if _has_begun("grown", values) or values["init"] == "random":
        return
    stack = registry.stage_checkpoint(values["profile"], "stack")
    decoder.profile_of_start(profile, values["init"] or stack)
    if not values["init"] and not stack:
        raise ValueError(
            f"There is no stack in {registry.run_path(values['profile'], 'stack')} to begin with;"
            " make one with notebook 01, name a checkpoint (init), or begin with random weights"
            " (init random)."
        )


def _check_run(stage: str, values: Mapping[str, object], profile: Profile) -> None:
    """Refuses a run that was begun with other settings or from another start, as training would."""
    if stage in ("source", "grown"):
        stack = str(registry.run_path(values["profile"], "stack") / "checkpoint")
        start = (
            {"random": None, "": stack}.get(values["init"], values["init"])
            if stage == "grown"
            else None
        )
        folder = registry.run_path(values["profile"], stage, values["run"])
        check_run_folder(folder, profile, paths.located(start) if start else None)
    grown = registry.run_path(values["profile"], "grown")
    if stage == "growth" and (grown / RUN_FILE).is_file() and values["train_scratch"]:
        scratch = registry.run_path(values["profile"], "scratch", values["scratch_run"])
        check_run_folder(
            scratch, compare.plan_comparison(grown, values["scratch_steps"]).scratch, None
        )


def _place(checkpoint: str | Path) -> Path | None:
    """Where a checkpoint lies; None where it does not, as a hub id."""
    place = paths.find(checkpoint)
    return place if os.path.exists(place) else None  # also for a name that is too long for one


def _check_role(values: Mapping[str, object]) -> None:
    """Refuses a trained model that cannot be analysed or compared as asked, a role that it does not
    have, or one that no model has where it is not on this disk yet.
    """
    role, known = values["role"], BLOCK_ROLES
    trained = values["trained"] or registry.stage_checkpoint(values["profile"], "grown")
    if trained and _place(trained):
        against = values["stack"] or values["source"]
        if against and not _place(against):
            against = ""  # what a hub id names is found out by the work
        subject = find_subject(trained, against, values["source_layers"])
        matrices = find_matrices(subject.checkpoint)
        known = tuple(
            dict.fromkeys(
                spectrum_key(matrix.layer, matrix.role, matrix.expert)[1]
                for matrix in matrices
                if matrix.layer != HEAD_LAYER
            )
        )
    elif role.endswith("]"):  # of an expert
        role = role.partition("[")[0]
    if role and role not in known:
        raise ValueError(f"There is no role {values['role']!r}; choose one of {', '.join(known)}.")


def _check_writing(values: Mapping[str, object], profile: Profile) -> None:
    """Refuses a sampling that cannot be, texts that are longer than a model's context, and lm-eval
    where it is not installed.
    """
    card = card_of(mixture=bool(profile.model.experts))
    sampling = generation.chosen_sampling(
        card,
        values["temperature"],
        values["top_p"],
        values["repetition_penalty"],
        values["max_new_tokens"],
    )
    if values["with_lm_eval"] and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "with_lm_eval is set and lm-eval is not installed; pip install -e '.[harness]', or"
            " leave it at false."
        )
    prompts = [prompt.text for prompt in generation.choose_prompts(values["prompt_count"])]
    given = {
        "source": values["source"],
        "stack, step 0": values["stack"],
        "trained": values["trained"],
    }
    for checkpoint in registry.named_checkpoints(
        values["profile"], given, values["others"]
    ).values():
        if place := _place(checkpoint):
            config = decoder.check_checkpoint(place)
            if context := config.get("max_position_embeddings"):  # GPT-2 has another name for it
                tokenizer = read_tokenizer(str(place))
                generation.check_room(context, tokenizer, prompts, sampling)
                registry.document_prefix(place, tokenizer)
