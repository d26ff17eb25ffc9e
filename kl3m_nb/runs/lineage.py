"""Where a model comes from: the steps and tokens it carries, the stack it was grown by, the source
of that stack.

Growth is told by stack.json, by the training state or by the model card, never by a name: the
project's own exports are all named like the family's models, and many were never grown.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from kl3m_nb.common import paths
from kl3m_nb.model.folder import STACK_RECORD, TRAINED_STEPS, ModelOrCheckpoint, read_stack
from kl3m_nb.profiles import Profile
from kl3m_nb.runs import checkpoints

_KNOWN_BY_CARD = ("source_layers", "factor")


_KNOWN_BY_RECORD = (*_KNOWN_BY_CARD, "source_sha256", "order", "noise")


_GROWN = re.compile(
    r"^(\s*- g_stack|tags:.*\bg_stack\b.*|#*\s*G_stack( Methodology)?)\s*$", re.MULTILINE
)  # a tag or a section


_GROWN_FROM = re.compile(r"(?:grown|stacked) from (\d+)")


def carried_stack(init: str | Path | None, profile: Profile) -> dict:
    """What a run started from `init`, a folder or hub id, takes over of how that was grown; {} when
    it was not.

    It is the stack's `stack.json`, which a model trained from the stack has too. Of a start without
    one its own card says whether it was grown, and from how many layers; where the card does not
    name them, `profile` does. Then there is `source_layers` and `factor`, and `order` if it is
    random, but no `source`. Raises ValueError for a `stack.json` that is broken.
    """
    if init is None:
        return {}
    folder = _folder_of(init)
    record = checkpoints.stack_record(folder)
    if not record:
        return _told_by(read_card(folder), profile)
    if missing := [
        key
        for key in (_KNOWN_BY_RECORD if "source" in record else _KNOWN_BY_CARD)
        if key not in record
    ]:
        raise ValueError(
            f"The {STACK_RECORD} of {init} has no {missing[0]!r}; put back the one that stacking"
            " wrote, or remove it."
        )
    return record


def _folder_of(init: str | Path) -> Path:
    """The folder of a start. Of a hub id that which its record and its card are kept in, as far as
    the hub can be reached.
    """
    place = paths.checkpoint_place(init)
    folder = place.path
    if place.kind == "hub":
        for name in (STACK_RECORD, CARD_FILE):
            with contextlib.suppress(
                EntryNotFoundError
            ):  # offline too: weights that are kept here can be trained all the same
                folder = Path(hf_hub_download(place.name, name)).parent
    return folder


def _told_by(card: str, profile: Profile) -> dict:
    if not _GROWN.search(card):
        return {}
    layers = profile.model.layers
    told = _GROWN_FROM.search(card)
    source_layers = int(told[1]) if told else 0
    if not source_layers or layers % source_layers:
        source_layers = layers // profile.growth_factor
    order = {"order": "random"} if "by random blocks" in card else {}
    return {"source_layers": source_layers, "factor": layers // source_layers, **order}


CARD_FILE = "README.md"


_STEP_IN_NAME = re.compile(r"-(?:step|checkpoint-)(\d+)$")


_COUNT = (  # "**Valid Tokens**: 3,914,825,728", with or without Markdown around it
    r"{}\W*:\W*([\d,]+)"
)


@dataclass(frozen=True)
class Counts:
    """Optimizer steps behind a model, and the tokens and valid labels they saw."""

    step: int = 0
    tokens: int = 0
    valid_tokens: int = 0


def carried_counts(init: str | Path | None) -> Counts:
    """The steps and tokens that a run started from `init` carries on, a folder or hub id; all zero
    for any other start.

    A name that ends in -stepN or -checkpoint-N, as the family's do, says that N steps are behind
    the model, and its card how many tokens. Every other checkpoint is a beginning. Raises
    ValueError when such a model's card does not name its tokens.
    """
    steps = _steps_by_name(init)
    if steps == 0:
        return Counts()
    place = paths.checkpoint_place(init)
    text = _fetch_card(place.name) if place.kind == "hub" else read_card(place.path)
    found = {
        name: re.search(_COUNT.format(name), text, re.IGNORECASE)
        for name in ("Tokens Processed", "Valid Tokens")
    }
    if found["Tokens Processed"] is None:
        raise ValueError(
            f"{init} has {steps} steps behind it by its name, and its {CARD_FILE} has no line"
            " 'Tokens Processed: …' to go on counting from; add it, or rename the folder so that"
            " counting starts at 0."
        )
    tokens = _number(found["Tokens Processed"])
    return Counts(
        steps, tokens, _number(found["Valid Tokens"]) if found["Valid Tokens"] else tokens
    )


def _steps_by_name(init: str | Path | None) -> int:
    match = _STEP_IN_NAME.search(str(init).rstrip("/")) if init else None
    return int(match[1]) if match else 0


def _number(match: re.Match) -> int:
    return int(match[1].replace(",", ""))


def read_card(folder: Path) -> str:
    """The text of a folder's card; empty when it has none."""
    path = folder / CARD_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _fetch_card(hub_id: str) -> str:
    try:
        return Path(hf_hub_download(hub_id, CARD_FILE)).read_text(encoding="utf-8")
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"The card of {hub_id} cannot be reached; go online, or name a local folder."
        ) from error
    except EntryNotFoundError:
        return ""


UNKNOWN_STEP = -1  # the `step` of a model that does not tell how long it was trained


_STEP_NAME = re.compile(r"step-(\d+)")


def model_step(model_or_checkpoint: ModelOrCheckpoint) -> int:
    """Optimizer steps behind a checkpoint, -1 where nothing says.

    It is the number in `step-000200`, 0 for a fresh stack, and what `stack.json` says of a model
    that was trained from one. Raises ValueError for a `stack.json` that is broken.
    """
    if isinstance(model_or_checkpoint, torch.nn.Module):
        return UNKNOWN_STEP
    folder = paths.checkpoint_place(model_or_checkpoint).folder
    if match := _STEP_NAME.fullmatch(folder.resolve().name):
        return int(match[1])
    return (
        read_stack(folder).get(TRAINED_STEPS, 0)
        if (folder / STACK_RECORD).is_file()
        else UNKNOWN_STEP
    )
