"""A checkpoint as a model for others: copied under the name that the family gives it, or uploaded to the hub.

Training state and kept spectra stay here. A checkpoint that is not as it was written is refused.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from huggingface_hub import HfApi

from kl3m_nb import checkpoints, model_folder, paths
from kl3m_nb.cards import CARD_FILE, read_card

_NOT_PUBLISHED = (model_folder.STATE_FOLDER, model_folder.SPECTRA_FOLDER)


def export_model(checkpoint: str | Path, folder: str | Path) -> Path:
    """Copies `checkpoint` to `folder`/NAME, NAME as the family names it, and returns that folder.

    Training state and kept spectra stay here. What is copied has the layout of a published model: it loads with transformers
    alone, and `init` continues from it. Raises ValueError when the checkpoint is damaged or has no card, or the target exists,
    OSError when there is no room; nothing half copied stays then.
    """
    checkpoint = paths.resolve(checkpoint)
    checkpoints.check_sound(checkpoint)
    target = paths.resolve(folder) / card_name(checkpoint)
    if target.exists():
        raise ValueError(f"{target} exists; remove it or choose another folder.")
    try:
        with model_folder.written_whole(target) as folder:
            shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*_NOT_PUBLISHED), dirs_exist_ok=True)
    except shutil.Error as error:  # a list of (from, to, reason)
        raise OSError(f"{checkpoint} could not be copied to {target}: {error.args[0][0][2]}.") from error
    return target


def push_to_hub(checkpoint: str | Path, owner: str, private: bool = True) -> str:
    """Uploads `checkpoint`, without training state and kept spectra, to OWNER/NAME on the hub and returns that id.

    Nothing else in the project uploads anything. The login is huggingface_hub's own. Raises ValueError when the checkpoint is
    damaged or has no card.
    """
    checkpoint = paths.resolve(checkpoint)
    checkpoints.check_sound(checkpoint)
    repository = f"{owner}/{card_name(checkpoint)}"
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=checkpoint, ignore_patterns=[f"{name}/*" for name in _NOT_PUBLISHED])
    return repository


def card_name(checkpoint: Path) -> str:
    """The name that a checkpoint's card gives it. Raises ValueError when it has none."""
    match = re.search(r"^model_name: (\S+)$", read_card(checkpoint), re.MULTILINE)
    if match is None:
        raise ValueError(f"{checkpoint} holds no {CARD_FILE} with a model_name; name a checkpoint folder of a run.")
    return match[1]
