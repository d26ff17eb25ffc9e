"""The real notebooks, run as a batch job runs them: stopped by a scheduler, started again, and
under plain papermill.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from kl3m_nb.runs import checkpoints
from kl3m_nb.runs.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"seq_len": 64, "micro_batch": 2}


def _command(max_steps: int) -> list[str]:
    parameters = {**SMALL, "max_steps": max_steps, "run": "stopped"}
    given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    return [sys.executable, "-m", "kl3m_nb", "run", "00_source_model", *given]


def _environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "KL3M_NB_RUNS": str(folder / "runs"),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }


def test_a_terminated_job_saves_and_the_same_command_continues(tmp_path):
    run_dir = tmp_path / "runs" / "stopped"
    job = subprocess.Popen(
        _command(400), cwd=tmp_path, env=_environment(tmp_path), stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 240
        while len(read_metrics(run_dir, "train")) < 5:
            assert job.poll() is None and time.monotonic() < deadline, (
                "the job ended or never trained"
            )
            time.sleep(0.2)
        job.send_signal(signal.SIGTERM)
        output, _ = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode == 130, output
    assert "interrupted" in output
    status = json.loads((run_dir / "notebooks" / "00_source_model.status.json").read_text())
    assert status["state"] == "interrupted" and status["exit_code"] == 130
    states = [cell["state"] for cell in status["cells"]]
    assert states.count("interrupted") == 1 and states[-1] == "not run"
    saved = checkpoints.latest_checkpoint(run_dir)
    last_step = int(read_metrics(run_dir, "train").step.iloc[-1])
    assert checkpoints.checkpoint_step(saved) == last_step < 400

    again = subprocess.Popen(
        _command(400), cwd=tmp_path, env=_environment(tmp_path), stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 240
        while int(read_metrics(run_dir, "train").step.iloc[-1]) < last_step + 3:
            assert again.poll() is None and time.monotonic() < deadline, (
                "the second job did not continue"
            )
            time.sleep(0.2)
        again.send_signal(signal.SIGINT)
        again.communicate(timeout=120)
    finally:
        again.kill()
    assert again.returncode == 130
    steps = list(read_metrics(run_dir, "train").step)
    assert steps == list(range(1, len(steps) + 1)), "a step is missing or stands twice"


@pytest.mark.filterwarnings("ignore")
def test_plain_papermill_runs_the_same_notebook(tmp_path):
    output = tmp_path / "out.ipynb"
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(ROOT / "notebooks" / "00_source_model.ipynb"),
        str(output),
    ]
    for name, value in {**SMALL, "max_steps": 4, "run": "plain"}.items():
        command += ["-p", name, str(value)]
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env=_environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert checkpoints.latest_checkpoint(tmp_path / "runs" / "plain").name == "step-000004"
    assert all(
        cell.execution_count
        for cell in nbformat.read(output, as_version=4).cells
        if cell.cell_type == "code"
    )
