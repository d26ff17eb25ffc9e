"""Training in processes of its own, under torchrun: for several GPUs, and for a run that outlives
the notebook that started it.

The processes belong to no kernel. `train_with_torchrun` only follows their metrics.jsonl. The run
goes on when the kernel or the notebook server ends, and the same call finds it again: torchrun and
its processes inherit a lock on the log that they write to.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from kl3m_nb.common import paths
from kl3m_nb.common.files import open_plain, read_json, replace_text
from kl3m_nb.common.stopping import STOP_SIGNALS, interrupted
from kl3m_nb.data.windows import check_shares
from kl3m_nb.profiles import Profile
from kl3m_nb.runs import folder
from kl3m_nb.runs.checkpoints import checkpoint_step, latest_checkpoint
from kl3m_nb.runs.metrics import FILE_NAME, Callback, parse_row, read_metrics, tell
from kl3m_nb.training.loop import TrainingStopped, train
from kl3m_nb.training.resume import TrainResult

LOG_FILE, JOB_FILE = "torchrun.log", "torchrun.json"

# Our choice: new rows are looked for twice a second, which costs one `stat` each time.
POLL_SECONDS = 0.5

# Our choice: the processes have so long to save and end. torchrun's default, 30, is too short for a
# large model.
SAVE_SECONDS = "300"

# torchrun passes these on to its processes.
_SIGNALS = ",".join(number.name for number in STOP_SIGNALS)


def train_with_torchrun(
    profile: Profile,
    run_dir: str | Path,
    processes: int,
    init: str | Path | None = None,
    callbacks: Iterable[Callback] = (),
    max_restarts: int = 3,
) -> TrainResult:
    """Runs `training.train` in `processes` processes of this machine, which torchrun starts. A run
    that is under way already is followed.

    Callbacks get the rows of metrics.jsonl as they come. An interrupt is passed on: the run saves
    and ends. The processes print to torchrun.log in the run folder. When one process dies, all are
    ended and started again, up to `max_restarts` times. Raises ValueError for input that does not
    fit, TrainingStopped with the reason from torchrun.log when the job has failed.
    """
    run_dir, init = paths.resolve(run_dir), paths.checkpoint_place(init).name if init else None
    check_processes(profile, processes)
    folder.check_run_folder(run_dir, profile, init)
    run_dir.mkdir(parents=True, exist_ok=True)
    callbacks = list(callbacks)
    max_steps = profile.schedule.max_steps
    runtime = f"torchrun, {processes} process{'es' * (processes > 1)}"
    # The rows logged before come at once, so a progress bar must not take its pace from them.
    logged = read_metrics(run_dir, "train")
    first_step = int(logged["step"].iloc[-1]) if len(logged) else 0
    start = {"step": first_step, "max_steps": max_steps, "run": run_dir.name, "runtime": runtime}
    tell(callbacks, {"kind": "start", **start})

    # Start the job, unless one is under way, and follow it.
    if not is_running(run_dir):
        folder.write_run_file(run_dir, profile, init, runtime)
        _start(run_dir, processes, max_restarts)
    step = 0
    try:
        for row in _rows(run_dir):
            step = max(step, row.get("step", 0))
            tell(callbacks, row)
    except KeyboardInterrupt:
        _stop(run_dir)
        saved = latest_checkpoint(run_dir)
        raise (
            interrupted(checkpoint_step(saved))
            if saved
            else KeyboardInterrupt("no step is saved yet")
        ) from None
    finally:
        tell(callbacks, {"kind": "end", "step": step, "max_steps": max_steps})

    # See how it has ended.
    newest = latest_checkpoint(run_dir)
    if newest is None or checkpoint_step(newest) < max_steps:
        raise TrainingStopped(
            f"The processes of {run_dir} have ended before the last step: {_last_words(run_dir)}"
        )
    return train(profile, run_dir, init)  # the run is complete: this reads its result


def check_processes(profile: Profile, processes: int) -> None:
    """Raises ValueError when this machine cannot train `profile` in `processes` processes."""
    if processes < 1:
        raise ValueError(f"processes is {processes}; at least 1 is needed.")
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ValueError(
            f"processes is {processes} and this machine has {torch.cuda.device_count()} GPUs; each"
            " needs its own."
        )
    check_shares(profile.data.micro_batch * profile.data.grad_accumulation, processes)


def is_running(run_dir: Path) -> bool:
    """Returns whether torchrun, or a process that it started, is at work in `run_dir`."""
    try:
        with open(run_dir / LOG_FILE, "rb") as log:
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _start(run_dir: Path, processes: int, max_restarts: int) -> None:
    """Starts torchrun in a session of its own, unless another process has just done so."""
    # The command, with this package on the path of the processes.
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        f"--max-restarts={max_restarts}",
        f"--signals-to-handle={_SIGNALS}",
        "-m",
        "kl3m_nb",
        "train",
        str(run_dir),
        "--without-gpu",
    ]
    python_path = os.pathsep.join([str(paths.project_root()), os.environ.get("PYTHONPATH", "")])
    environment = {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SAVE_SECONDS,
        **os.environ,
        "PYTHONPATH": python_path,
    }

    # The job inherits the lock on the log: the lock is held as long as one of its processes lives.
    with open(open_plain(run_dir / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as log:
        try:
            folder.lock_exclusively(log.fileno())
        except BlockingIOError:
            return  # another process has just started the job; the caller follows it
        (run_dir / JOB_FILE).unlink(missing_ok=True)
        job = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd=run_dir,
            start_new_session=True,
        )

    # The number of the process, for `_stop`, also from another kernel.
    replace_text(
        run_dir / JOB_FILE, json.dumps({"pid": job.pid, "host": socket.gethostname()}) + "\n"
    )
    threading.Thread(target=job.wait, daemon=True).start()  # else it stays a zombie


def _rows(run_dir: Path) -> Iterator[dict]:
    """Yields the rows of metrics.jsonl as they are written, until the job has ended.

    A restart cuts the file back to the last checkpoint; some rows then come twice or are missed. A
    line may come in pieces.
    """
    position, rest = 0, b""
    while True:
        ended = not is_running(run_dir)
        path = run_dir / FILE_NAME
        size = path.stat().st_size if path.is_file() else 0
        if size < position:
            position, rest = 0, b""
        if size > position:
            with open(path, "rb") as file:
                file.seek(position)
                lines = (rest + file.read(size - position)).split(b"\n")
            position, rest = size, lines.pop()
            for line in lines:
                with contextlib.suppress(ValueError):
                    yield parse_row(line)
        elif ended:
            return
        else:
            time.sleep(POLL_SECONDS)


def _stop(run_dir: Path) -> None:
    """Asks torchrun to let the processes save and end, and waits until they have. Raises ValueError
    when its process cannot be found.
    """
    # Which process, and whether it is one of this machine.
    try:
        job = read_json(run_dir / JOB_FILE, "stop torchrun by hand")
    except FileNotFoundError:
        raise ValueError(
            f"Nobody noted the number of the torchrun process that trains in {run_dir}; stop it by"
            " hand."
        ) from None
    # os.kill takes 0 and below for groups of processes; 1 is init.
    if not isinstance(job.get("pid"), int) or job["pid"] < 2:
        raise ValueError(
            f"{run_dir / JOB_FILE} names no process; stop the one that trains in {run_dir} by hand."
        )
    if job.get("host") != socket.gethostname():
        raise ValueError(
            f"{run_dir} is in use by torchrun, process {job['pid']} on {job.get('host')}; stop it"
            " there."
        )

    # Stop it and wait.
    try:
        os.kill(job["pid"], signal.SIGTERM)
    except ProcessLookupError:
        raise ValueError(
            f"The torchrun process {job['pid']} of {run_dir} is gone, but a process that it started"
            " still trains there; stop that one by hand."
        ) from None
    while is_running(run_dir):
        time.sleep(POLL_SECONDS)


def _last_words(run_dir: Path) -> str:
    """Returns the line of torchrun.log that names the reason, else its last line, and the place of
    the file.
    """
    lines = [
        line.strip()
        for line in (run_dir / LOG_FILE).read_text(errors="replace").splitlines()
        if line.strip()
    ]
    reasons = [
        line for line in lines if line.startswith(("kl3m_nb:", "traceback :")) or "Error: " in line
    ]
    return (
        f"{(reasons or lines or ['nothing was printed'])[-1]} (all of it in {run_dir / LOG_FILE})"
    )
