"""Training in processes of its own, under torchrun: for several GPUs, and for a run that outlives
the notebook that started it.

The processes belong to no kernel. `train_with_torchrun` only follows their metrics.jsonl: when the
kernel or the notebook server goes, the run goes on, and the same call finds it again: torchrun and
its processes inherit a lock on the log they write to.
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


POLL_SECONDS = 0.5


_SIGNALS = ",".join(
    number.name for number in STOP_SIGNALS
)  # torchrun passes them on to its processes


# what the processes get to save and end; torchrun's own 30 are too few for a large model
SAVE_SECONDS = "300"


def train_with_torchrun(
    profile: Profile,
    run_dir: str | Path,
    processes: int,
    init: str | Path | None = None,
    callbacks: Iterable[Callback] = (),
    max_restarts: int = 3,
) -> TrainResult:
    """`training.train` in `processes` processes of this machine, started by torchrun; follows a run
    that is under way already.

    Callbacks get the rows of metrics.jsonl as they come. An interrupt is passed on: the run saves
    and ends. What the processes print is in the run's torchrun.log. When one dies, all are ended
    and started again up to `max_restarts` times. Raises ValueError for input that does not fit,
    TrainingStopped with the last words of the log when the job has failed.
    """
    run_dir, init = paths.resolve(run_dir), paths.checkpoint_place(init).name if init else None
    check_processes(profile, processes)
    folder.check_run_folder(run_dir, profile, init)
    run_dir.mkdir(parents=True, exist_ok=True)
    callbacks = list(callbacks)
    max_steps = profile.schedule.max_steps
    runtime = f"torchrun, {processes} process{'es' * (processes > 1)}"
    logged = read_metrics(run_dir, "train")  # these rows come at once, at no pace to go by
    first_step = int(logged["step"].iloc[-1]) if len(logged) else 0
    start = {"step": first_step, "max_steps": max_steps, "run": run_dir.name, "runtime": runtime}
    tell(callbacks, {"kind": "start", **start})
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
    newest = latest_checkpoint(run_dir)
    if newest is None or checkpoint_step(newest) < max_steps:
        raise TrainingStopped(
            f"The processes of {run_dir} have ended before the last step: {_last_words(run_dir)}"
        )
    return train(profile, run_dir, init)  # complete: says where it stands


def check_processes(profile: Profile, processes: int) -> None:
    """Raises ValueError when this machine cannot train `profile` in so many processes."""
    if processes < 1:
        raise ValueError(f"processes is {processes}; at least 1 is needed.")
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ValueError(
            f"processes is {processes} and this machine has {torch.cuda.device_count()} GPUs; each"
            " needs its own."
        )
    check_shares(profile.data.micro_batch * profile.data.grad_accumulation, processes)


def is_running(run_dir: Path) -> bool:
    """Whether torchrun, or a process it has started, is at work in `run_dir`."""
    try:
        with open(run_dir / LOG_FILE, "rb") as log:
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _start(run_dir: Path, processes: int, max_restarts: int) -> None:
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
    with open(open_plain(run_dir / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as log:
        try:
            folder.lock_exclusively(log.fileno())
        except BlockingIOError:
            return  # somebody else has started it at this moment; it is followed
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
    replace_text(
        run_dir / JOB_FILE, json.dumps({"pid": job.pid, "host": socket.gethostname()}) + "\n"
    )
    threading.Thread(target=job.wait, daemon=True).start()  # or it stays a zombie


def _rows(run_dir: Path) -> Iterator[dict]:
    """The rows of metrics.jsonl as they are written, until the job has ended.

    A restart cuts the file back to the last checkpoint: some rows then come twice or are missed,
    and a line may come in pieces.
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
    """Asks torchrun to have the processes save and end, and waits for that."""
    try:
        job = read_json(run_dir / JOB_FILE, "stop torchrun by hand")
    except FileNotFoundError:
        raise ValueError(
            f"Nobody noted the number of the torchrun process that trains in {run_dir}; stop it by"
            " hand."
        ) from None
    if (
        not isinstance(job.get("pid"), int) or job["pid"] < 2
    ):  # the system gives these a meaning of their own
        raise ValueError(
            f"{run_dir / JOB_FILE} tells no process; stop the one that trains in {run_dir} by hand."
        )
    if job.get("host") != socket.gethostname():
        raise ValueError(
            f"{run_dir} is in use by torchrun, process {job['pid']} on {job.get('host')}; stop it"
            " there."
        )
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
    """The line of torchrun.log that names the reason, as far as there is one, and where the rest
    stands.
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
