"""How a model was grown, taken over by the run that starts from it: told by its stack.json, its training state or its card.

A name says nothing of it: the project's own exports are all named like the family's models, and many were never grown.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from kl3m_nb import checkpoints, paths
from kl3m_nb.cards import CARD_FILE, read_card
from kl3m_nb.model_folder import STACK_RECORD
from kl3m_nb.profiles import Profile

_KNOWN_BY_CARD = ("source_layers", "factor")
_KNOWN_BY_RECORD = (*_KNOWN_BY_CARD, "source_sha256", "order", "noise")
_GROWN = re.compile(r"^(\s*- g_stack|tags:.*\bg_stack\b.*|#*\s*G_stack( Methodology)?)\s*$", re.MULTILINE)  # a tag or a section
_GROWN_FROM = re.compile(r"(?:grown|stacked) from (\d+)")


def carried_stack(init: str | Path | None, profile: Profile) -> dict:
    """What a run started from `init`, a folder or hub id, takes over of how that was grown; {} when it was not.

    It is the stack's `stack.json`, which a model trained from the stack has too. Of a start without one its own card says whether
    it was grown, and from how many layers; where the card does not name them, `profile` does. Then there is `source_layers` and
    `factor`, and `order` if it is random, but no `source`. Raises ValueError for a `stack.json` that is broken.
    """
    if init is None:
        return {}
    folder = _folder_of(init)
    record = checkpoints.stack_record(folder)
    if not record:
        return _told_by(read_card(folder), profile)
    if missing := [key for key in (_KNOWN_BY_RECORD if "source" in record else _KNOWN_BY_CARD) if key not in record]:
        raise ValueError(
            f"The {STACK_RECORD} of {init} has no {missing[0]!r}; put back the one that stacking wrote, or remove it."
        )
    return record


def _folder_of(init: str | Path) -> Path:
    """The folder of a start. Of a hub id that which its record and its card are kept in, as far as the hub can be reached."""
    folder = paths.resolve(init)
    if not folder.is_dir():
        for name in (STACK_RECORD, CARD_FILE):
            with contextlib.suppress(EntryNotFoundError):  # offline too: weights that are kept here can be trained all the same
                folder = Path(hf_hub_download(str(init), name)).parent
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
