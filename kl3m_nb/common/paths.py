"""Where things are, whatever folder a kernel or shell was started in.

Jupyter and nbval start kernels in the notebook's folder, papermill in the caller's; both must find
the same `runs/`. So what is written, recorded or streamed lies below the project's root. A model or
tokenizer that somebody names is looked for in the current folder first, as a shell would, and then
below the root.
"""

from __future__ import annotations

import os
import re
from pathlib import Path


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


def located(name: str | os.PathLike) -> str:
    """`find` of a relative name as text, where something lies there; else the name as it is:
    absolute, or a hub id.
    """
    place = find(name)
    return str(place) if os.path.exists(place) and not os.path.isabs(name) else os.fspath(name)


def is_hub_id(name: str) -> bool:
    """True for what can be meant as OWNER/NAME on the hub, and not as a folder."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and not name.startswith("runs/")
