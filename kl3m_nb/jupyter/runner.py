"""Runs one notebook without a browser: checked parameters, visible progress, an honest status file,
an orderly interrupt.

Papermill executes; what is ours is an engine that it calls back, because of two things papermill
leaves open: a status file that tells the truth about each cell, and signals. SIGINT, SIGTERM and
the other `STOP_SIGNALS` interrupt the cell in the kernel, once, and not the client: it goes on
listening until the cell has saved its checkpoint and printed so, whatever signals follow.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
from jupyter_client.kernelspec import KernelSpecManager
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbclient.util import ensure_async
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, NotebookExecutionManager, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.iorw import load_notebook_node
from papermill.log import logger
from papermill.parameterize import parameterize_notebook
from traitlets.config import Config

from kl3m_nb.common.files import naming, why
from kl3m_nb.common.stopping import EXIT_INTERRUPTED, catch_stop_signals
from kl3m_nb.jupyter.pages import export_html
from kl3m_nb.jupyter.parameters import check_parameters, load_notebook, read_parameters
from kl3m_nb.jupyter.progress import PROGRESS_VARIABLE, read_progress
from kl3m_nb.runs.status import TOUCH_SECONDS, RunStatus, attempt_at, code_cells

EXIT_OK, EXIT_CELL_ERROR, EXIT_DEAD_KERNEL = 0, 1, 138


SAVE_SECONDS = 300  # what an interrupted cell gets to save and end before its kernel is killed


QUIET_SECONDS = 15  # between two lines of progress where no terminal rewrites them


POLL_SECONDS = 1.0


START_SECONDS = 180  # for a kernel to answer


# how long the outputs of an ended cell may lag behind; a busy machine needs more than the 4 of
# nbclient
IOPUB_SECONDS = 120


ENGINE = "kl3m-nb"


def run_notebook(
    notebook: Path,
    output_path: Path,
    parameters: dict[str, object],
    *,
    html: bool = True,
    on_progress: Callable[[str], None] | None = None,
) -> int:
    """Run `notebook` with `parameters` into `output_path`, with its status and, if `html`, a page
    beside it.

    A folder that is there gets the executed notebook under its own name. While it runs, and
    afterwards if an earlier run got further, all three lie beside as NAME.attempt.ipynb and the
    like: what ends before it has done anything replaces nothing.

    To be called from the main thread, which receives the signals. The kernel works in the caller's
    folder.

    Args:
        on_progress: called about once a second, from a thread, with each new line of progress;
            without it the line is shown on standard output, rewritten in place on a terminal and
            every 15 s elsewhere.

    Returns:
        The exit code: 0, 1 after an error in a cell, 130 after a signal to stop, 138 when the
        kernel died. A signal that
        comes when the last cell has ended changes nothing in the status, yet gives 130, so that no
        next notebook is begun.

    Raises:
        ValueError: for parameters the notebook does not accept, a kernel that is not installed, or
            an output path that another process runs into; nothing is written.
    """
    notebook, output_path = Path(notebook), Path(output_path)
    checked = check_parameters(notebook, parameters)
    _check_kernel(notebook)
    if output_path.is_dir():
        output_path /= notebook.name
    if notebook.resolve() in (
        output_path.resolve(),
        attempt_at(output_path, output_path.suffix).resolve(),
    ):
        raise ValueError(
            f"The executed notebook would overwrite its source {notebook}; choose another output"
            " path."
        )
    output_path.parent.mkdir(parents=True, exist_ok=True)
    defaults = {
        parameter.name: parameter.default for parameter in read_parameters(notebook).values()
    }
    status = RunStatus(notebook, output_path, defaults | checked)
    page = attempt_at(output_path, ".html")
    page.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="kl3m-nb-") as folder, _Interruption() as interruption:
        run = _Run(status, interruption, Path(folder) / "progress")
        with _ProgressDisplay(run, notebook.stem, on_progress):
            exit_code = _execute(run, notebook, status.attempt_path, checked)
        try:
            if html:
                export_html(status.attempt_path, page)
        finally:
            status.keep()
        print(status.closing_sentence(), flush=True)
    return EXIT_INTERRUPTED if exit_code == EXIT_OK and interruption.requested else exit_code


def configuration(notebook: Path, parameters: dict[str, object]) -> dict[str, object]:
    """Runs the cells of `notebook` up to the one tagged `configuration`, in this process, and
    returns what they define; empty for a notebook without that tag.

    `parameters` are those that `check_parameters` returns. What these cells refuse is raised as it
    is, before a kernel starts and before anything is written.
    """
    code = [cell for cell in load_notebook(notebook).cells if cell.cell_type == "code"]
    if not any("configuration" in cell.metadata.get("tags", ()) for cell in code):
        return {}
    namespace: dict[str, object] = {"In": (seen := [""])}  # as IPython remembers its cells
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in parameterize_notebook(load_notebook_node(_literal(notebook)), parameters).cells:
            if cell.cell_type == "code":
                seen.append(cell.source)
                exec(compile(cell.source, str(notebook), "exec", dont_inherit=True), namespace)
                if "configuration" in cell.metadata.get("tags", ()):
                    break
    return namespace


class _Interruption:
    """The first signal to stop interrupts the cell in the kernel; further ones must not hit the
    code that saves.
    """

    def __init__(self):
        self.requested = False
        self.delivered = False
        self.killed = False
        self._deliver: Callable[[], None] | None = None

    def __enter__(self) -> _Interruption:
        self._previous = catch_stop_signals(self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, *_) -> None:
        self.requested = True
        self._deliver_once()

    def cell_entered_kernel(self, deliver: Callable[[], None]) -> None:
        """The kernel has begun a cell, which `deliver` would interrupt. A kernel ignores interrupts
        before that.
        """
        self._deliver = deliver
        if self.requested:
            self._deliver_once()

    def cell_left_kernel(self) -> None:
        """No cell is there to be interrupted."""
        self._deliver = None

    def _deliver_once(self) -> None:
        if self._deliver is not None and not self.delivered:
            self.delivered = True
            self._deliver()


@dataclass
class _Run:
    status: RunStatus
    interruption: _Interruption
    progress_path: Path


class _Client(PapermillNotebookClient):
    """Papermill's client with a cell loop that knows the difference between a cell that ended and
    one that was ended.
    """

    def __init__(self, nb_man: NotebookExecutionManager, run: _Run, **traits):
        super().__init__(nb_man, **traits)
        self.run = run
        self._interrupting = None

    def papermill_execute_cells(self) -> None:
        interruption, status = self.run.interruption, self.run.status
        statuses = iter(status.cells)
        for position, cell in enumerate(self.nb.cells):
            if interruption.requested:
                raise KeyboardInterrupt
            self.nb_man.cell_start(cell, position)
            if cell.cell_type != "code":
                self.nb_man.cell_complete(cell, cell_index=position)
                continue
            status.start_cell(next(statuses))
            self.run.progress_path.unlink(missing_ok=True)
            state, error = self._ended_as(cell, position)
            status.end_cell(state, error)
            if state in ("failed", "interrupted"):
                self.nb_man.cell_exception(cell, cell_index=position)
            self.nb_man.cell_complete(cell, cell_index=position)
            if state == "interrupted":
                raise KeyboardInterrupt
            if error is not None:
                break

    def _ended_as(self, cell: nbformat.NotebookNode, position: int) -> tuple[str, str | None]:
        """State and error of a cell after running it; a cell that calls `sys.exit(0)` completes and
        ends the notebook.
        """
        state, error = "completed", None
        try:
            self.execute_cell(cell, position)
        except CellExecutionError as failure:
            state = (
                "completed"
                if failure.ename == "SystemExit" and failure.evalue in ("", "0")
                else "failed"
            )
            error = _one_line(failure.ename, failure.evalue)
        except DeadKernelError:
            self.nb_man.cell_exception(cell, cell_index=position)
            raise
        finally:
            self.run.interruption.cell_left_kernel()
            if self._interrupting is not None:
                self._interrupting.cancel()
        if self.run.interruption.delivered:
            return "interrupted", error
        return ("not run" if cell.execution_count is None else state), error

    def process_message(self, msg: dict, cell: nbformat.NotebookNode, cell_index: int):
        if msg["msg_type"] == "execute_input":
            loop = asyncio.get_running_loop()
            self.run.interruption.cell_entered_kernel(
                lambda: self._interrupt_from_signal_handler(loop)
            )
        return super().process_message(msg, cell, cell_index)

    def _interrupt_from_signal_handler(self, loop: asyncio.AbstractEventLoop) -> None:
        self._interrupting = asyncio.run_coroutine_threadsafe(self._interrupt_then_kill(), loop)

    async def _interrupt_then_kill(self) -> None:
        await ensure_async(self.km.interrupt_kernel())
        await asyncio.sleep(SAVE_SECONDS)
        self.run.interruption.killed = True
        await ensure_async(self.km.signal_kernel(signal.SIGKILL))


class _RunnerEngine(Engine):
    """Papermill's engine for `run_notebook`, which hands it `run`."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: NotebookExecutionManager,
        kernel_name: str,
        *,
        run: _Run,
        start_timeout: int,
        **_of_other_engines,
    ) -> None:
        run.status.set_cells(code_cells(nb_man.nb))
        client = _Client(
            nb_man,
            run,
            kernel_name=kernel_name,
            startup_timeout=start_timeout,
            iopub_timeout=IOPUB_SECONDS,
            raise_on_iopub_timeout=False,
            coalesce_streams=True,
            log=logger,
            extra_arguments=[
                "--IPKernelApp.log_level=CRITICAL"
            ],  # ipykernel reports the interrupt of every shutdown as an error
            config=Config(
                {"KernelManager": {"transport_encryption": "auto"}}
            ),  # others on this machine cannot listen
        )
        client.execute(env=os.environ | {PROGRESS_VARIABLE: str(run.progress_path)})


papermill_engines.register(ENGINE, _RunnerEngine)


def _execute(run: _Run, notebook: Path, output_path: Path, parameters: dict[str, object]) -> int:
    """Run through papermill; the end of the run is in the status whatever happens."""
    state, exit_code, error = "failed", EXIT_CELL_ERROR, "the runner stopped"
    try:
        with naming(output_path):
            papermill.execute_notebook(
                _literal(notebook),
                _literal(output_path),
                parameters,
                engine_name=ENGINE,
                language="python",
                progress_bar=False,
                start_timeout=START_SECONDS,
                run=run,
            )
        state, exit_code, error = "completed", EXIT_OK, None
    except PapermillExecutionError as failure:
        error = _one_line(failure.ename, failure.evalue)
    except KeyboardInterrupt:
        state, exit_code, error = "interrupted", EXIT_INTERRUPTED, None
    except RuntimeError as failure:
        if run.interruption.delivered:
            state, exit_code = "interrupted", EXIT_INTERRUPTED
            killed = (
                f"the cell was still running {SAVE_SECONDS} s after the interrupt, so its kernel"
                " was killed"
            )
            error = (
                killed
                if run.interruption.killed
                else "the kernel died while the interrupted cell ended"
            )
        elif isinstance(failure, DeadKernelError):
            exit_code, error = EXIT_DEAD_KERNEL, "the kernel died, as it does when memory runs out"
        elif not any(cell.state != "pending" for cell in run.status.cells):
            exit_code, error = EXIT_DEAD_KERNEL, _one_line("the kernel did not start", str(failure))
        else:
            raise
    except OSError as failure:
        error = why(failure)
        raise
    finally:
        run.status.end_run(state, exit_code, error)
    return exit_code


class _ProgressDisplay:
    """A thread that looks at the progress file once a second and shows what has changed."""

    def __init__(self, run: _Run, notebook_name: str, on_progress: Callable[[str], None] | None):
        self.run, self.notebook_name, self.on_progress = run, notebook_name, on_progress
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._terminal = sys.stdout.isatty()
        self._label, self._line, self._shown, self._touched = "", "", 0.0, time.monotonic()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()
        if self._terminal and self.on_progress is None:
            print("\r\x1b[K", end="", flush=True)

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            if time.monotonic() - self._touched >= TOUCH_SECONDS:
                self.run.status.touch()
                self._touched = time.monotonic()
            cells, cell = self.run.status.cells, self.run.status.current
            if cell is None:
                continue
            label = f"[{self.notebook_name} {cell.index}/{len(cells)} {cell.title}]"
            if self.run.interruption.requested:
                label += f" interrupted, waits up to {SAVE_SECONDS} s for the cell to save;"
            self._show(label, f"{label} {read_progress(self.run.progress_path)}".rstrip())

    def _show(self, label: str, line: str) -> None:
        if line == self._line:
            return
        if self.on_progress is not None:
            self.on_progress(line)
        elif self._terminal:
            print(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K", end="", flush=True)
        elif label != self._label or time.monotonic() - self._shown >= QUIET_SECONDS:
            print(line, flush=True)
            self._shown = time.monotonic()
        else:
            return
        self._label, self._line = label, line


def _check_kernel(notebook: Path) -> None:
    name = load_notebook(notebook).metadata.get("kernelspec", {}).get("name")
    installed = KernelSpecManager().find_kernel_specs()
    if name not in installed:
        raise ValueError(
            f"{notebook} asks for the kernel {name!r}, which is not installed; there is"
            f" {', '.join(installed)}."
        )


def _literal(path: Path) -> str:
    """`path` for papermill, which would fill in what stands in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _one_line(name: str, message: str) -> str:
    """An error as the last line of a traceback has it, without colours and line breaks."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", f"{name}: {message}").split())[:500].rstrip(":")
