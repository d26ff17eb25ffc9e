"""The demonstration: notebooks 00 to 05 at laptop size, one after the other, then a short table and
an index page.

What is finished and still made by the same notebooks and package is reused; a changed notebook is
run again together with all behind it, and its training continues from the runs on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from pathlib import Path

from kl3m_nb.common.files import read_json, replace_text
from kl3m_nb.common.text import clock
from kl3m_nb.growth import compare, speedups
from kl3m_nb.jupyter.pages import IndexEntry, write_index
from kl3m_nb.jupyter.parameters import find_notebook, load_notebook
from kl3m_nb.jupyter.runner import EXIT_OK, run_notebook
from kl3m_nb.model.runtime import versions
from kl3m_nb.runs import registry
from kl3m_nb.runs.folder import RunLock
from kl3m_nb.runs.status import read_status

PROFILE = "tiny"


_FIGURES = (
    (
        "Held-out loss against the cost in tokens and in operations, one run of each kind.",
        "growth",
        "growth.png",
    ),
    ("The grown model's training.", "grown", "training.png"),
    (
        "Condition of every matrix of the trained model; the clamp's ceilings are marked.",
        "spectra",
        "condition_trained.png",
    ),
    ("How far the copies of each source block have drifted apart.", "spectra", "divergence.png"),
)


def run_demo(fresh: bool = False) -> int:
    """Runs what is not finished, prints the result, and returns the exit code of the first notebook
    that failed, or 0.

    With `fresh` what an earlier demonstration has written is removed first, and no other run.
    Raises RunIsBusy, and removes nothing, while somebody trains in one of its folders.
    """
    notebooks = [find_notebook(name) for name in registry.NOTEBOOK_STAGES]
    if fresh:
        _remove_runs()
    report_dir = registry.run_path(PROFILE, "report")
    report_dir.mkdir(parents=True, exist_ok=True)
    finished = _read_json(report_dir / "finished.json")
    began, entries, rerun = time.monotonic(), [], False
    for number, notebook in enumerate(notebooks, start=1):
        name = notebook.stem
        output = (
            registry.run_path(PROFILE, registry.NOTEBOOK_STAGES[name]) / "notebooks" / notebook.name
        )
        status_path, page = output.with_suffix(".status.json"), output.with_suffix(".html")
        fingerprint = _fingerprint(notebook)
        if (
            not rerun
            and finished.get(name) == fingerprint
            and page.is_file()
            and read_status(status_path).get("state") == "completed"
        ):
            print(f"[{name}] {number}/{len(notebooks)} finished before, reused", flush=True)
        else:
            rerun = True
            print(f"[{name}] {number}/{len(notebooks)} starts", flush=True)
            exit_code = run_notebook(notebook, output, {})
            if exit_code != EXIT_OK:
                print(
                    "The demonstration stopped here; `make demo` continues, `make demo FRESH=1`"
                    " starts over.",
                    flush=True,
                )
                return exit_code
            finished[name] = fingerprint
            replace_text(report_dir / "finished.json", json.dumps(finished, indent=1) + "\n")
        entries.append(_entry(notebook, page, read_status(status_path), report_dir))
    comparison = speedups.compare_growth(
        **compare.curves(*(registry.run_path(PROFILE, stage) for stage in ("grown", "scratch")))
    )
    conditions = (
        f"{versions()} · {clock(sum(entry.seconds for entry in entries))} for all notebooks"
    )
    index = report_dir / "index.html"
    write_index(
        index,
        "Growing a small legal language model",
        "<p>A trained 3-layer model (source), stacked to 12 layers and trained on (grown), beside"
        f" 12 layers trained from random weights (scratch).</p><p>{conditions}</p>",
        entries,
        tables=[
            ("Loss on the same held-out text, nats per token", comparison.loss_table()),
            (f"Cost to reach {comparison.target}. {speedups.ONE_RUN}", comparison.speedup_table()),
        ],
        figures=[
            (text, registry.run_path(PROFILE, stage) / "figures" / name)
            for text, stage, name in _FIGURES
        ],
    )
    _print_summary(comparison, conditions, index, time.monotonic() - began)
    return EXIT_OK


def _remove_runs() -> None:
    folders = [
        registry.run_path(PROFILE, stage)
        for stage in (*registry.NOTEBOOK_STAGES.values(), "scratch", "report")
    ]
    with contextlib.ExitStack() as locks:
        present = [folder for folder in folders if folder.is_dir()]
        for folder in present:
            locks.enter_context(RunLock(folder)).acquire()
        for folder in present:
            shutil.rmtree(folder)


def _print_summary(
    comparison: speedups.GrowthComparison, conditions: str, index: Path, seconds: float
) -> None:
    print(f"\n{comparison.loss_table().to_string(index=False)}\n")
    print(f"{comparison.speedup_table().to_string(index=False)}\n")
    print(comparison.verdict())
    print(f"\n{conditions}\nThis call took {clock(seconds)}. The pages: {index}", flush=True)


def _entry(notebook: Path, page: Path, status: dict, report_dir: Path) -> IndexEntry:
    heading, _, purpose = load_notebook(notebook).cells[0].source.partition("\n")
    return IndexEntry(
        title=heading.lstrip("# "),
        description=" ".join(purpose.split()),
        link=str(Path("..") / page.relative_to(report_dir.parent)),
        state=status["state"],
        seconds=status["seconds"],
    )


def _fingerprint(notebook: Path) -> str:
    """Changes with the notebook or any module of the package."""
    digest = hashlib.sha256(notebook.read_bytes())
    for module in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()


def _read_json(path: Path) -> dict:
    return read_json(path, "remove it") if path.is_file() else {}
