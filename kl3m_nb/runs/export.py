"""A checkpoint as a model for others: copied under the name that the family gives it or another, or
uploaded to the hub.

Only the files of a model, known by their names, leave the folder; training state, kept spectra and
whatever else lies there stay, and what a link points to does too. What the state tells of the stack
that the model was trained from goes along, as stack.json. A checkpoint that is not as it was
written is refused, and no model is written over.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import (
    httpx,
)  # the library it asks with, which is another in its second version

from kl3m_nb.common import paths
from kl3m_nb.common.files import written_whole
from kl3m_nb.model.folder import STACK_RECORD, WEIGHT_ENDINGS, model_files
from kl3m_nb.model.older_readers import REWRITTEN, older_file
from kl3m_nb.runs import checkpoints
from kl3m_nb.runs.card import public_name
from kl3m_nb.runs.lineage import CARD_FILE, read_card

_NAME = re.compile(r"[A-Za-z0-9]+([._-][A-Za-z0-9]+)*")  # what both a folder and the hub take


_STEP_ENDING = re.compile(r"-step\d+$")


def export_model(checkpoint: str | Path, folder: str | Path, name: str | None = None) -> Path:
    """Copies `checkpoint` to `folder`/NAME and returns that folder. NAME is `name`, else the one
    that its card has.

    What is copied has the layout of a published model, with NAME in its card: it loads with
    transformers alone, and `init` continues from it. Raises ValueError when the checkpoint is
    damaged or has no card, the name is none or the target exists, OSError when there is no room;
    nothing half copied stays then.
    """
    checkpoint = paths.checkpoint_place(checkpoint).path
    checkpoints.check_sound(checkpoint)
    name = _checked_name(checkpoint, name)
    target = paths.resolve(folder) / name
    if target.exists():
        raise ValueError(
            f"{target} exists; remove it, choose another folder, or give the model another name"
            " (--name)."
        )
    files = _published(checkpoint, name)
    try:
        with written_whole(target) as folder:
            for file, content in files.items():
                _write(folder / file, content)
    except OSError as error:
        raise OSError(
            f"{checkpoint} could not be copied to {target}: {error.strerror or error}."
        ) from error
    return target


def push_to_hub(
    checkpoint: str | Path, owner: str, private: bool = True, name: str | None = None
) -> str:
    """Uploads to OWNER/NAME on the hub what `export_model` would copy, in one commit, and returns
    that id.

    Nothing else in the project uploads anything. The login is huggingface_hub's own. Raises
    ValueError as `free_repository`.
    """
    repository = free_repository(checkpoint, owner, name)
    files = _published(paths.checkpoint_place(checkpoint).path, repository.rpartition("/")[2])
    api = HfApi()
    additions = [CommitOperationAdd(file, content) for file, content in files.items()]
    with _asking_the_hub(repository):
        api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(repository, additions, commit_message="Add the model")
    return repository


def free_repository(checkpoint: str | Path, owner: str, name: str | None = None) -> str:
    """The id OWNER/NAME that `push_to_hub` uploads `checkpoint` to.

    Raises ValueError when the checkpoint is damaged or has no card, the name is none, or the
    repository holds a model already, this one or another; one without weights may be there. Raises
    ConnectionError when the hub does not answer or refuses.
    """
    checkpoint = paths.checkpoint_place(checkpoint).path
    checkpoints.check_sound(checkpoint)
    repository, api = f"{owner}/{_checked_name(checkpoint, name)}", HfApi()
    with _asking_the_hub(repository):
        held = api.list_repo_files(repository) if api.repo_exists(repository) else []
    if weights := [file for file in held if file.endswith(WEIGHT_ENDINGS)]:
        raise ValueError(
            f"The repository {repository} on the hub holds a model already ({weights[0]}), which is"
            " not written over; give this one another name (--name), or delete the repository"
            " first."
        )
    return repository


@contextlib.contextmanager
def _asking_the_hub(repository: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:  # no answer, or an error for an answer
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConnectionError(
            f"The hub could not be asked for {repository} ({reason}); check the network, and the"
            " login with `hf auth whoami`."
        ) from error


def card_name(checkpoint: Path) -> str:
    """The name that a checkpoint's card gives it. Raises ValueError when it has none."""
    match = re.search(r"^model_name: (\S+)$", read_card(checkpoint), re.MULTILINE)
    if match is None:
        raise ValueError(
            f"{checkpoint} holds no {CARD_FILE} with a model_name; name a checkpoint folder of a"
            " run."
        )
    return match[1]


def _checked_name(checkpoint: Path, name: str | None) -> str:
    """`name`, or that of the card. ValueError when it is no name, or says other steps than the
    card's.
    """
    own = card_name(checkpoint)
    if name is None:
        return own
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"The model cannot be named {name!r}; a name of a folder and repository is made of"
            " letters and digits, with single . _ or - between them."
        )
    ending = _STEP_ENDING.search(own)
    if ending and not name.endswith(ending[0]):
        raise ValueError(
            f"The model cannot be named {name!r}; give a name that ends in {ending[0]}, because"
            " training that continues from it counts on from there."
        )
    return name


def _published(checkpoint: Path, name: str) -> dict[str, Path | bytes]:
    """What others get of a checkpoint: by its path in the model's folder, the file to copy or the
    content.
    """
    files: dict[str, Path | bytes] = {
        path.relative_to(checkpoint).as_posix(): path for path in model_files(checkpoint)
    }
    # A checkpoint of an earlier version holds these files as transformers 5 alone reads them.
    files |= {each: older_file(checkpoint / each) for each in REWRITTEN if each in files}
    files[CARD_FILE] = _named_card(read_card(checkpoint), card_name(checkpoint), name).encode()
    record = checkpoints.stack_record(checkpoint)
    if "source" in record:  # what only a card told stands in the card
        shown = {key: public_name(record[key]) for key in ("source", "target") if key in record}
        files[STACK_RECORD] = (json.dumps(record | shown, indent=2) + "\n").encode()
    return files


def _named_card(card: str, own: str, name: str) -> str:
    """The card with `name` where it names its model; a start of the same name stays."""
    return re.sub(
        rf'(^model_name: |^# |["`]){re.escape(own)}(?=$|["`])',
        rf"\g<1>{name}",
        card,
        flags=re.MULTILINE,
    )


def _write(path: Path, content: Path | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        shutil.copy(content, path)
