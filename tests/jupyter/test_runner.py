"""Tests of the runner on small real notebooks: what is refused, what is reported, what an interrupt
leaves behind.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from kl3m_nb import cli
from kl3m_nb.common import paths
from kl3m_nb.common.text import clock
from kl3m_nb.jupyter import runner
from kl3m_nb.jupyter.parameters import Parameter, check_parameters, find_notebook, read_parameters
from kl3m_nb.jupyter.progress import PROGRESS_VARIABLE, read_progress, write_progress
from kl3m_nb.jupyter.runner import run_notebook
from kl3m_nb.runs.status import SILENT_SECONDS, read_status

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = (
    'lr: float = 1e-3  # peak learning rate\nsteps: int = 3\nname: str = "a # b"  # of the'
    " run\nfast: bool = False\n"
)


@pytest.fixture
def write_notebook(tmp_path):
    def write(*sources: str, parameters: str = PARAMETERS) -> Path:
        cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]})]
        cells += [
            new_markdown_cell(source) if source.startswith("#") else new_code_cell(source)
            for source in sources
        ]
        path = tmp_path / "work.ipynb"
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
        return path

    return write


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out" / "work.ipynb"


def status_of(output: Path) -> dict:
    return json.loads(output.with_suffix(".status.json").read_text())


def states_of(output: Path) -> list[str]:
    return [cell["state"] for cell in status_of(output)["cells"]]


def text_of(output: Path) -> str:
    cells = nbformat.read(output, as_version=4).cells
    return "".join(out.get("text", "") for cell in cells for out in cell.get("outputs", []))


def test_parameters_are_read_with_type_default_and_help(write_notebook):
    assert list(read_parameters(write_notebook()).values()) == [
        Parameter("lr", "float", 1e-3, "peak learning rate"),
        Parameter("steps", "int", 3, ""),
        Parameter("name", "str", "a # b", "of the run"),
        Parameter("fast", "bool", False, ""),
    ]


@pytest.mark.parametrize(
    "line",
    ["x = 1", "x: int = 1.5", "x: list = [1]", "x: int", "x: int = 2 * y", "print(1)", "x: int ="],
)
def test_a_parameters_cell_of_anything_but_annotated_literals_is_refused(write_notebook, line):
    with pytest.raises(ValueError, match="parameters cell"):
        read_parameters(write_notebook(parameters=line))


def test_a_notebook_that_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no notebook"):
        read_parameters(tmp_path / "absent.ipynb")
    path = tmp_path / "untagged.ipynb"
    path.write_text("not JSON")
    with pytest.raises(ValueError, match="not a Jupyter notebook"):
        read_parameters(path)
    nbformat.write(new_notebook(cells=[new_code_cell("x: int = 1")]), path)
    with pytest.raises(ValueError, match="no cell tagged 'parameters'"):
        read_parameters(path)
    with pytest.raises(ValueError, match="There is no notebook 'nonsense'"):
        find_notebook("nonsense")


def test_outside_of_a_clone_the_demonstration_says_where_to_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "project_root", lambda: tmp_path)
    monkeypatch.setenv("KL3M_NB_RUNS", str(tmp_path / "runs"))
    assert cli.main(["demo"]) == 2
    assert (
        f"start in a clone of the project ({tmp_path}/notebooks has none)"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "runs").exists()


def test_a_notebook_of_the_workbook_is_found_by_name(tmp_path, monkeypatch, write_notebook):
    path = write_notebook()
    monkeypatch.setattr("kl3m_nb.jupyter.parameters.notebooks_dir", lambda: tmp_path)
    monkeypatch.chdir("/")
    assert find_notebook("work") == find_notebook("work.ipynb") == find_notebook(path) == path


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("lr", yaml.safe_load("1e-4"), 1e-4),
        ("lr", 1, 1.0),
        ("steps", "40", 40),
        ("steps", "1e3", 1000),
        ("steps", 9007199254740993, 9007199254740993),
        ("fast", "True", True),
        ("fast", "false", False),
        ("fast", True, True),
        ("name", "7", "7"),
    ],
)
def test_values_are_cast_to_the_type_of_their_parameter(write_notebook, name, given, expected):
    checked = check_parameters(write_notebook(), {name: given})
    assert checked == {name: expected} and type(checked[name]) is type(expected)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *[("steps", value) for value in (1.5, "1.5", True, "many", None, [1])],
        *[("lr", value) for value in ("high", True, None, "nan", float("inf"), {"a": 1}, 10**400)],
        *[("fast", value) for value in (1, "yes", "1", None)],
        *[("name", value) for value in (7, False, None)],
    ],
    ids=lambda value: str(value)[:12],
)
def test_values_of_another_type_are_refused_in_one_sentence(write_notebook, name, given):
    with pytest.raises(ValueError, match=f"'{name}'.* is of type ") as refusal:
        check_parameters(write_notebook(), {name: given})
    assert "\n" not in str(refusal.value)


def test_a_refused_parameter_runs_and_writes_nothing(write_notebook, output):
    notebook = write_notebook("1")
    with pytest.raises(
        ValueError,
        match=r"no parameter 'stepz' \(did you mean steps\?\); it accepts lr, steps, name, fast",
    ):
        run_notebook(notebook, output, {"stepz": 3})
    with pytest.raises(ValueError, match="overwrite its source"):
        run_notebook(notebook, notebook, {})
    nb = nbformat.read(notebook, as_version=4)
    nb.metadata.kernelspec.name = "cobol"
    nbformat.write(nb, notebook)
    with pytest.raises(ValueError, match="asks for the kernel 'cobol', which is not installed"):
        run_notebook(notebook, output, {})
    assert not output.parent.exists()


def test_a_run_reports_progress_and_an_honest_status_while_it_runs(write_notebook, output):
    notebook = write_notebook(
        "# Title",
        "## The work\n```\n# no heading\n```",
        "import json, os, pathlib, time\nstatus ="
        f" json.loads(pathlib.Path({str(output.with_suffix('.attempt.status.json'))!r}).read_text())\nprint(status['state'],"
        " [cell['state'] for cell in status['cells']])",
        "for step in range(steps):\n"
        "    print('step', step, flush=True)\n"
        "    pathlib.Path(os.environ['KL3M_NB_PROGRESS']).write_text(f'step {step + 1}/{steps}')\n"
        "    time.sleep(0.8)\n"
        "print(type(lr).__name__, lr)",
    )
    lines = []
    assert run_notebook(notebook, output, {"lr": "1e-4"}, on_progress=lines.append) == 0
    status = status_of(output)
    assert (status["state"], status["exit_code"], status["error"]) == ("completed", 0, None)
    assert status["parameters"] == {"lr": 1e-4, "steps": 3, "name": "a # b", "fast": False}
    first_line = PARAMETERS.splitlines()[0]
    assert [cell["title"] for cell in status["cells"]] == [
        first_line,
        "# Parameters",
        "The work",
        "The work",
    ]
    assert states_of(output) == ["completed"] * 4
    assert status["cells"][3]["seconds"] >= 2.4
    assert "running ['completed', 'completed', 'running', 'pending']" in text_of(output)
    assert "step 0\nstep 1\nstep 2\nfloat 0.0001\n" in text_of(output), (
        "the streams of a cell are one output"
    )
    assert any(line.startswith("[work 4/4 The work] step ") for line in lines)
    assert "step 2" in output.with_suffix(".html").read_text()


def test_an_error_names_cell_and_reason_and_leaves_the_rest_unrun(write_notebook, output, capsys):
    notebook = write_notebook("# Fine", "1", "# Division", "steps / 0", "2")
    assert run_notebook(notebook, output, {}, html=False) == 1
    status = status_of(output)
    assert states_of(output) == ["completed", "completed", "failed", "not run"]
    assert (
        status["state"] == "failed"
        and status["cells"][2]["error"] == "ZeroDivisionError: division by zero"
    )
    assert status["cells"][3]["seconds"] is None
    printed = capsys.readouterr().out
    assert (
        "failed in cell 3/4 “Division”" in printed
        and "ZeroDivisionError: division by zero" in printed
    )
    assert str(output) in printed
    assert not output.with_suffix(".html").exists()


def test_a_dead_kernel_is_told_from_an_error(write_notebook, output):
    notebook = write_notebook("print('before', flush=True)", "import os\nos._exit(9)", "2")
    assert run_notebook(notebook, output, {}) == 138
    assert states_of(output) == ["completed", "completed", "failed", "not run"]
    assert "kernel died" in status_of(output)["error"]
    assert "before" in text_of(output)


def test_on_a_terminal_one_line_is_rewritten_and_a_clean_exit_is_no_error(
    write_notebook, output, monkeypatch
):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    notebook = write_notebook(
        "# Waiting", "import time\ntime.sleep(2.5)", "import sys\nsys.exit(0)", "2"
    )
    assert run_notebook(notebook, output, {}, html=False) == 0
    assert states_of(output) == ["completed"] * 3 + ["not run"]
    progress, closing = terminal.getvalue().rsplit("\r", 1)
    assert "\r[work 2/4 Waiting]" in progress and "\n" not in progress
    assert closing.startswith("\x1b[K[work] completed after 0:0")


def files_of(output: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in output.parent.iterdir()
        if ".attempt." not in path.name
    }


def test_a_run_that_gets_less_far_than_an_earlier_one_replaces_nothing_of_it(
    write_notebook, output, capsys
):
    notebook = write_notebook("1 / (steps > 1)", "1 / (steps > 2)", "print(steps)")
    attempt = output.with_name("work.attempt.ipynb")
    assert run_notebook(notebook, output, {"steps": 2}) == 1, "there is no earlier one"
    assert states_of(output) == ["completed"] * 3 + ["failed", "not run"] and not attempt.exists()
    before = files_of(output)
    assert run_notebook(notebook, output, {"steps": 1}) == 1
    assert files_of(output) == before
    assert (
        status_of(attempt)["state"] == "failed"
        and "ZeroDivisionError" in attempt.with_suffix(".html").read_text()
    )
    assert str(attempt) in (said := capsys.readouterr().out) and f"stays: {output}" in said
    assert run_notebook(notebook, output, {"steps": 3}) == 0
    assert text_of(output) == "3\n" and status_of(output)["output"] == str(output)
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "work.html",
        "work.ipynb",
        "work.status.json",
    ]
    before = files_of(output)
    assert run_notebook(notebook, output, {"steps": 2}, html=False) == 1
    assert files_of(output) == before, "one that completed is replaced by none that did not"
    assert not attempt.with_suffix(".html").exists()


def test_a_notebook_that_somebody_made_otherwise_is_replaced_by_a_complete_run_alone(
    write_notebook, output
):
    notebook = write_notebook("1 / steps")
    output.parent.mkdir()
    output.write_text("mine")
    assert run_notebook(notebook, output, {"steps": 0}, html=False) == 1
    assert output.read_text() == "mine"
    assert run_notebook(notebook, output, {}, html=False) == 0
    assert states_of(output) == ["completed"] * 2


def test_an_executed_notebook_that_is_run_again_has_one_set_of_values(
    write_notebook, output, tmp_path
):
    notebook = write_notebook("print(lr, steps, name, fast)")
    assert run_notebook(notebook, output, {"steps": 7, "name": "it's\n"}, html=False) == 0
    again = tmp_path / "again" / "work.ipynb"
    for given, steps in (({}, 7), ({"lr": "0.5"}, 7), ({"steps": 9}, 9)):
        expected = {
            "lr": float(given.get("lr", 1e-3)),
            "steps": steps,
            "name": "it's\n",
            "fast": False,
        }
        assert {"lr": 1e-3, "fast": False} | check_parameters(output, given) == expected
        assert run_notebook(output, again, given, html=False) == 0
        assert text_of(again) == " ".join(map(str, expected.values())) + "\n"
        assert status_of(again)["parameters"] == expected


def test_a_disk_that_is_full_when_the_notebook_is_written_costs_the_earlier_one_nothing(
    write_notebook, output, monkeypatch
):
    notebook = write_notebook("1")
    assert run_notebook(notebook, output, {}, html=False) == 0
    before = files_of(output)

    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("papermill.iorw.LocalHandler.write", full)
    with pytest.raises(OSError, match=r"work\.attempt\.ipynb"):
        run_notebook(notebook, output, {}, html=False)
    assert files_of(output) == before
    attempt = read_status(output.with_name("work.attempt.status.json"))
    assert (
        attempt["state"] == "failed"
        and "work.attempt.ipynb: No space left on device" in attempt["error"]
    )


@pytest.mark.parametrize("cell", ["stepz = 3", "steps = 1 + 1", "steps = 'many'", "steps ="])
def test_an_injected_cell_that_is_none_of_ours_is_refused(write_notebook, output, cell):
    notebook = write_notebook("1")
    nb = nbformat.read(notebook, as_version=4)
    nb.cells.insert(
        1, new_code_cell(f"# Parameters\n{cell}", metadata={"tags": ["injected-parameters"]})
    )
    nbformat.write(nb, notebook)
    with pytest.raises(
        ValueError,
        match=(
            r"^The injected parameters of .*; run |no parameter 'stepz'|'steps' .* is of type int"
        ),
    ):
        run_notebook(notebook, output, {})
    assert not output.parent.exists()


@pytest.mark.parametrize("tag", ["parameters", "injected-parameters"])
def test_a_tag_that_two_cells_have_is_refused(write_notebook, tag):
    notebook = write_notebook()
    nb = nbformat.read(notebook, as_version=4)
    nb.cells += [new_code_cell("steps: int = 9", metadata={"tags": [tag]}) for _ in range(2)]
    nbformat.write(nb, notebook)
    with pytest.raises(ValueError, match=f"cells tagged '{tag}'"):
        check_parameters(notebook, {})


def test_a_killed_run_is_told_from_a_running_one(write_notebook, output, tmp_path):
    notebook = write_notebook("import pathlib, time\npathlib.Path('ready').touch()\ntime.sleep(60)")
    script = (
        "import sys; from kl3m_nb.jupyter.runner import run_notebook;"
        " sys.exit(run_notebook(*sys.argv[1:3], {}))"
    )
    command = [sys.executable, "-c", script, str(notebook), str(output)]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while (
        not (tmp_path / "ready").exists() and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    path = output.with_name("work.attempt.status.json")
    assert read_status(path)["state"] == "running"
    with pytest.raises(
        ValueError, match=f"^Process {process.pid} on .* runs a notebook into {output}; "
    ):
        run_notebook(notebook, output, {})
    process.kill()
    deadline = time.monotonic() + 10
    while (
        read_status(path)["state"] == "running" and time.monotonic() < deadline
    ):  # a zombie too is none that runs
        time.sleep(0.05)
    assert read_status(path)["state"] == "killed"
    process.wait()
    assert (
        read_status(path)["state"] == "killed"
        and json.loads(path.read_text())["state"] == "running"
    )
    quick = write_notebook("2")
    assert run_notebook(quick, output, {}, html=False) == 0
    assert states_of(output) == ["completed"] * 2 and not path.exists()


def test_who_runs_elsewhere_is_judged_by_the_age_of_the_file(write_notebook, output):
    path = output.with_suffix(".status.json")
    assert run_notebook(write_notebook("1"), output, {}, html=False) == 0
    status = status_of(output)
    path.write_text(json.dumps(status | {"state": "running", "host": "elsewhere"}))
    assert read_status(path)["state"] == "running"
    os.utime(path, (time.time() - SILENT_SECONDS - 1,) * 2)
    assert read_status(path)["state"] == "killed"
    path.write_text(
        json.dumps(
            status | {"state": "running", "process_started": status["process_started"] - 3600}
        )
    )
    assert read_status(path)["state"] == "killed", "another process has its number"
    for content in (
        "",
        "[]",
        "{",
        '{"state": 3}',
        '{"state": "running", "cells": 3}',
        "[" * 100_000,
    ):
        path.write_text(content)
        assert read_status(path) == {}


WAITING_CELL = """
import pathlib, time
try:
    pathlib.Path("ready").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(3)  # longer than Jupyter waits before it kills
    pathlib.Path("saved").write_text("checkpoint")
    print("saved a checkpoint")
"""


@pytest.mark.parametrize(
    ("number", "after"),
    [
        (signal.SIGTERM, ["raise AssertionError('not to be run')"]),
        (signal.SIGINT, []),
        (signal.SIGHUP, []),
    ],
    ids=["TERM", "INT", "HUP"],
)
def test_a_signal_lets_the_cell_save_and_a_second_one_does_not_disturb_it(
    write_notebook, output, tmp_path, number, after
):
    notebook = write_notebook(WAITING_CELL, *after)
    script = (
        "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL);"  # ignored below nohup
        " from kl3m_nb.jupyter.runner import run_notebook;"
        " sys.exit(run_notebook(*sys.argv[1:3], {}))"
    )
    command = [sys.executable, "-c", script, str(notebook), str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while (
        not (tmp_path / "ready").exists() and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    process.send_signal(number)
    time.sleep(1)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (tmp_path / "saved").read_text() == "checkpoint"
    assert "saved a checkpoint" in text_of(output)
    assert (status_of(output)["state"], status_of(output)["exit_code"]) == ("interrupted", 130)
    assert states_of(output) == ["completed", "interrupted"] + ["not run"] * len(after)
    assert "interrupted in cell 2" in printed


def test_a_cell_that_ignores_the_interrupt_is_ended(write_notebook, output, monkeypatch):
    monkeypatch.setattr(runner, "SAVE_SECONDS", 1)
    notebook = write_notebook(
        "import time",
        "# Deaf",
        "while True:\n    try:\n        time.sleep(60)\n    except KeyboardInterrupt:\n       "
        " print('no', flush=True)",
    )
    interrupt = threading.Event()

    def interrupt_the_deaf_cell(line: str) -> None:
        if "Deaf" in line and not interrupt.is_set():
            interrupt.set()
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    assert (
        run_notebook(notebook, output, {}, html=False, on_progress=interrupt_the_deaf_cell) == 130
    )
    assert signal.getsignal(signal.SIGTERM) is before
    assert states_of(output) == ["completed", "completed", "interrupted"]
    assert "still running 1 s after the interrupt" in status_of(output)["error"]


def test_plain_papermill_runs_the_same_notebook(write_notebook, tmp_path):
    notebook = write_notebook("print(steps + 1)")
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(notebook),
        "out.ipynb",
        "-p",
        "steps",
        "41",
        "--no-progress-bar",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert text_of(tmp_path / "out.ipynb") == "42\n"


def test_progress_is_one_line_and_never_in_the_way(tmp_path, monkeypatch):
    monkeypatch.delenv(PROGRESS_VARIABLE, raising=False)
    write_progress("nobody reads this")
    path = tmp_path / "progress"
    monkeypatch.setenv(PROGRESS_VARIABLE, str(path))
    assert read_progress(path) == ""
    write_progress("step 1/2\n loss 4.3")
    assert read_progress(path) == "step 1/2 loss 4.3"
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays"
    monkeypatch.setenv(PROGRESS_VARIABLE, str(tmp_path / "vanished" / "progress"))
    write_progress("step 2/2")
    assert not (tmp_path / "vanished").exists()


def test_the_clock_reads_like_a_clock():
    assert [clock(seconds) for seconds in (0, 42.4, 725, 3600 * 3 + 59.6)] == [
        "0:00",
        "0:42",
        "12:05",
        "3:01:00",
    ]
