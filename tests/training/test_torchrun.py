from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from kl3m_nb.runs.folder import LOCK_FILE
from kl3m_nb.runs.metrics import read_metrics
from kl3m_nb.training import loop, torchrun
from tests.conftest import small_profile

ROOT = Path(__file__).resolve().parents[2]
PROFILE = dict(max_steps=400, checkpoint_every=10, eval_every=100, clamp_every=20)


def _process_of_rank(rank: int, run_dir: Path) -> int:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = (
                (folder / "cmdline").read_bytes(),
                (folder / "environ").read_bytes(),
            )
        except OSError:  # it has ended meanwhile
            continue
        if str(run_dir).encode() in words and f"\0RANK={rank}\0".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"there is no process of rank {rank}")


@pytest.mark.slow
def test_a_run_outlives_its_notebook_and_a_rank_that_is_killed(tmp_path):
    """The notebook's process is killed; the same call elsewhere follows the run; a rank is killed;
    torchrun goes on.
    """
    run_dir = tmp_path / "run"
    code = f"""
        from tests.conftest import small_profile
        from kl3m_nb.training import torchrun
        torchrun.train_with_torchrun(small_profile(**{PROFILE!r}), {str(run_dir)!r}, processes=2)
    """
    notebook = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not torchrun.is_running(run_dir):
        assert notebook.poll() is None and time.monotonic() < deadline, "torchrun was not started"
        time.sleep(0.1)
    time.sleep(0.2)
    notebook.kill()
    notebook.wait()
    killed = []

    def kill_rank_1(row):
        if row["kind"] == "train" and row["step"] >= 12 and not killed:
            killed.append(_process_of_rank(1, run_dir))
            os.kill(killed[0], signal.SIGKILL)

    result = torchrun.train_with_torchrun(
        small_profile(**PROFILE), run_dir, processes=2, callbacks=[kill_rank_1]
    )
    log = (run_dir / "torchrun.log").read_text()
    # Which rank torchrun names as the first to fail, when both end within a second, is a matter of
    # chance.
    assert killed and "failed (exitcode: -" in log
    assert (
        result.step == 400
        and not (run_dir / LOCK_FILE).exists()
        and not torchrun.is_running(run_dir)
    )
    loop.train(small_profile(**PROFILE), tmp_path / "alone")
    alone, together = read_metrics(tmp_path / "alone", "train"), read_metrics(run_dir, "train")
    assert list(together.step) == list(range(1, 401))
    assert list(together.loss[:60]) == pytest.approx(list(alone.loss[:60]), rel=2e-4)


def test_an_interrupt_says_which_step_the_processes_have_saved(trained_run, monkeypatch):
    stopped, rows = [], []
    monkeypatch.setattr(torchrun, "is_running", lambda run_dir: not stopped)
    monkeypatch.setattr(torchrun, "_stop", stopped.append)

    def interrupt_at_once(row):
        rows.append(row)
        if row["kind"] == "train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="step 6 is saved"):
        torchrun.train_with_torchrun(
            small_profile(), trained_run[0], processes=1, callbacks=[interrupt_at_once]
        )
    assert (
        stopped == [trained_run[0]]
        and rows[0]["runtime"] == "torchrun, 1 process"
        and rows[-1]["kind"] == "end"
    )


def test_what_cannot_be_started_is_refused(tmp_path, trained_run, monkeypatch):
    with pytest.raises(ValueError, match="at least 1"):
        torchrun.train_with_torchrun(small_profile(), tmp_path / "run", processes=0)
    with pytest.raises(ValueError, match="4 windows cannot be shared evenly by 3 processes"):
        torchrun.train_with_torchrun(small_profile(), tmp_path / "run", processes=3)
    with pytest.raises(ValueError, match="max_steps = 6, now it is 9"):
        torchrun.train_with_torchrun(small_profile(max_steps=9), trained_run[0], processes=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="processes is 2 and this machine has 1 GPUs"):
        torchrun.train_with_torchrun(small_profile(), tmp_path / "run", processes=2)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_followed_begins_where_its_log_stands(trained_run, monkeypatch):
    monkeypatch.setattr(torchrun, "_start", lambda *_: None)
    told = []
    torchrun.train_with_torchrun(
        small_profile(), trained_run[0], processes=2, callbacks=[told.append]
    )
    assert (told[0]["kind"], told[0]["step"]) == ("start", 6)
    assert [row["step"] for row in told if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_torchrun_passes_on_what_the_documents_write():
    from torch.distributed.run import parse_args

    assert parse_args([f"--signals-to-handle={torchrun._SIGNALS}", "x"]).signals_to_handle.split(
        ","
    ) == ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"]
    words = ["train", "kl3m-007-500m", "--run-dir", "my-run"]
    parsed = parse_args(["--nproc-per-node", "8", "-m", "kl3m_nb", *words])
    assert parsed.training_script_args == words


def test_a_torchrun_that_is_gone_is_named(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / torchrun.JOB_FILE).write_text(
        json.dumps({"pid": ended.pid, "host": socket.gethostname()})
    )
    with pytest.raises(ValueError, match=rf"process {ended.pid} .* is gone"):
        torchrun._stop(tmp_path)
