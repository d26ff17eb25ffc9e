"""Where things are, whatever folder a kernel or shell was started in.

Jupyter and nbval start kernels in the notebook's folder, papermill in the caller's; both must find
the same `runs/`. So what is written, recorded or streamed lies below the project's root. A model or
tokenizer that somebody names is looked for in the current folder first, as a shell would, and then
below the root.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


def project_root() -> Path:
    """The folder that holds `notebooks/` and `kl3m_nb/`; the current folder when the package is
    installed elsewhere.
    """
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "notebooks").is_dir() else Path.cwd()


def runs_dir() -> Path:
    """The folder of all runs: `$KL3M_NB_RUNS`, or `runs/` in the project's root."""
    return Path(os.environ.get("KL3M_NB_RUNS") or project_root() / "runs").resolve()


def cache_dir() -> Path:
    """Trained tokenizers and other things that can be made again: `$KL3M_NB_CACHE`, or
    `data/cache/` in the root.
    """
    return Path(os.environ.get("KL3M_NB_CACHE") or project_root() / "data" / "cache").resolve()


def notebooks_dir() -> Path:
    """The folder of the ordered notebooks."""
    return project_root() / "notebooks"


def prompts_dir() -> Path:
    """The folder of evaluation prompts."""
    return project_root() / "data" / "prompts"


def tasks_dir() -> Path:
    """The folder of the multiple-choice tasks."""
    return project_root() / "data" / "tasks"


def word_lists_dir() -> Path:
    """The folder of the word lists for toxicity and bias."""
    return project_root() / "data" / "words"


def resolve(path: str | os.PathLike) -> Path:
    """`path` as it is when absolute, else below the project's root."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else project_root() / path


def find(path: str | os.PathLike) -> Path:
    """Where a model or tokenizer lies that `path` names: seen from the current folder or, failing
    that, from the project's root.

    An absolute path is taken as it is. Where nothing is there, as of a hub id, it is the place
    below the root.
    """
    here = Path(os.path.abspath(Path(path).expanduser()))
    return here if os.path.exists(here) else Path(os.path.abspath(resolve(path)))


RUN_FILE = "run.json"  # what makes a folder the folder of a run


@dataclass(frozen=True)
class Place:
    """What the name of a checkpoint means.

    `kind` is "run" for the folder of a run, "folder" for any other, "file", "hub" for the id
    OWNER/NAME of a model on the hub, and "nothing". `path` is where it lies; of the last two, where
    a folder of that name would lie below the root. `name` is the text that libraries load it by: a
    path that does not depend on the current folder, or the hub id.
    """

    kind: Literal["run", "folder", "file", "hub", "nothing"]
    name: str
    path: Path

    @property
    def is_here(self) -> bool:
        """Whether it lies on this machine's disk."""
        return self.kind in ("run", "folder", "file")

    @property
    def folder(self) -> Path:
        """The folder itself, or the one that a file lies in."""
        return self.path.parent if self.kind == "file" else self.path


def checkpoint_place(name: str | os.PathLike) -> Place:
    """What `name` means, which somebody gives for a checkpoint or a tokenizer.

    A folder or file comes first, seen from the current folder and then from the root. Else it is a
    hub id where it has the form of one, except below runs/: that is a run which is not there.
    """
    return _place_at(find(name), os.fspath(name))


def recorded_place(name: str | os.PathLike) -> Place:
    """What `name` means in a record such as run.json or stack.json, which is written as seen from
    the root.
    """
    return _place_at(Path(os.path.abspath(resolve(name))), os.fspath(name))


def no_checkpoint(name: str | os.PathLike) -> str:
    """The sentence for a name that means nothing where a checkpoint is needed."""
    places = dict.fromkeys((os.path.abspath(Path(name).expanduser()), str(resolve(name))))
    return (
        f"There is no checkpoint folder {' or '.join(places)}; train one first, or name a folder or"
        " a hub id OWNER/NAME."
    )


def _place_at(path: Path, name: str) -> Place:
    # An absolute name stays as it is spelled: run.json has it so, and a resumed run compares it.
    # os.path says False, and raises nothing, where a name is too long for the disk.
    here = name if os.path.isabs(name) else str(path)
    if os.path.isdir(path):
        return Place("run" if (path / RUN_FILE).is_file() else "folder", here, path)
    if os.path.exists(path):
        return Place("file", here, path)
    return Place("hub" if _is_hub_id(name) else "nothing", name, path)


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError  # slow to import, and seldom needed
    from huggingface_hub.utils import validate_repo_id

    owner, slash, _ = name.partition("/")
    if not slash or owner == "runs":
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
