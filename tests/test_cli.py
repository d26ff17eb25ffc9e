from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest

from kl3m_nb import cli
from kl3m_nb.runs import registry
from tests.conftest import small_profile

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def empty_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("KL3M_NB_RUNS", str(tmp_path / "runs"))


def _notebook(path: Path, code: str) -> Path:
    cells = [
        nbformat.v4.new_code_cell(
            "name: str = 'x'  # a name\nlr: float = 0.1  # a rate",
            metadata={"tags": ["parameters"]},
        ),
        nbformat.v4.new_code_cell(code),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "02_training", "-p", "max_step", "5"], "max_steps"),
        (["run", "02_training", "-p", "max_steps", "many"], "int"),
        (["run", "02_training", "-p", "profile", "kl3m-9"], "kl3m-007-500m"),
        (["run", "02_training", "-p", "seq_len", "4096"], "context of 256"),
        (
            ["run", "02_training", "-p", "profile", "kl3m-007-500m", "-p", "init", "random"],
            "--without-gpu",
        ),
        (["run", "02_training", "-p", "profile", "kl3m-002-520m"], "init random"),
        (["run", "01_stacking", "-p", "run", "a/b"], "'a/b'"),
        (["run", "04_generation_evaluation", "-p", "trained", "runs/nowhere"], "runs/nowhere"),
        (["run", "05_growth_comparison"], "demo-grown"),
        (["run", "00_source_model", "-p", "source", "files:nope/*"], "nope/*"),
        (["run", "06_unknown"], "02_training"),
        (["run", "02_training", "-f", "nowhere.yaml"], "no parameter file"),
        (["train", "kl3m-007-500m"], "--without-gpu"),
        (["train", "tiny", "--set", "base_lr", "high"], "float"),
        (["train", "tiny", "--set", "color", "red"], "no field 'color'"),
        (["train", "tiny", "--set", "micro_bach", "2"], "did you mean micro_batch"),
        (["train", "tiny", "--set", "max_steps", "{"], "'max_steps' is of type int; '{' is not"),
        (["train", "tiny", "--set", "max_steps", "[1"], "'max_steps' is of type int; '[1' is not"),
        (["train", "tiny", "--set", "name", "x"], "no field 'name'"),
        (["train", "tiny", "--set", "seed", "9" * 23], "below 2**63"),
        (["train", "tiny", "--run", "."], "no name of a folder right below"),
        (["train", "tiny", "--run", ".."], "no name of a folder right below"),
        (
            ["train", "tiny", "--init", "./nowhere"],
            f"no checkpoint folder {Path.cwd()}/nowhere; train",
        ),
        (["train", "tiny", "--init", "nowhere"], "no checkpoint folder"),
        (["train"], "neither a profile nor a run"),
        (["train", "--run", "runs/none"], "no run folder"),
        (["train", "runs/none", "--run", "other"], "keeps its folder"),
        (["train", "runs/none", "--set", "max_steps", "3"], "max_steps stays as it is"),
        (["stack", "nowhere", "target"], "no checkpoint folder"),
        (
            ["stack", "nowhere", "target", "--order", "spiral", "--noise", "0.2"],
            "for cyclic or interpolated",
        ),
        (["estimate", "huge"], "no profile"),
        (["estimate", "kl3m-007-500m", "--gpu", "h300"], "choose one of h200"),
        (["estimate", "kl3m-007-500m", "--micro-batch", "0"], "at least 1"),
        (["export", "nowhere", "models"], "holds no README.md"),
    ],
)
def test_bad_input_is_one_sentence_exit_code_2_and_nothing_on_disk(
    arguments, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_an_init_is_looked_for_in_the_shells_folder_and_then_below_the_root(
    tmp_path, monkeypatch, capsys
):
    started = []
    monkeypatch.setattr(
        cli,
        "train",
        lambda profile, folder, init, callbacks: (
            started.append(init) or SimpleNamespace(step=1, held_out_loss=0.0, checkpoint=folder)
        ),
    )
    (tmp_path / "st1").mkdir()
    monkeypatch.chdir(tmp_path)
    for init in ("st1", "./st1", "data/prompts", "OWNER/NAME"):
        assert cli.main(["train", "tiny", "--init", init]) == 0
    assert started == [
        str(tmp_path / "st1"),
        str(tmp_path / "st1"),
        str(ROOT / "data/prompts"),
        "OWNER/NAME",
    ]
    assert cli.main(["train", "tiny", "--init", "./st2"]) == 2
    assert (
        f"no checkpoint folder {tmp_path}/st2 or {ROOT}/st2; train one first"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"5: 5", "no parameter '5';"), ("name: café".encode("latin-1"), "p.yaml is not UTF-8 text")],
)
def test_a_parameter_file_of_another_kind_is_refused(content, words, tmp_path, capsys):
    (tmp_path / "p.yaml").write_bytes(content)
    assert cli.main(["run", "02_training", "-f", str(tmp_path / "p.yaml")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_warning_is_one_line(monkeypatch, capsys):
    show = warnings.showwarning
    monkeypatch.setattr(
        cli, "train", lambda *_, **__: warnings.warn("the disk\nis full", stacklevel=1) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError), warnings.catch_warnings():
        warnings.simplefilter("always")
        cli.main(["train", "tiny"])
    assert capsys.readouterr().err == "kl3m_nb: warning: the disk is full\n"
    assert warnings.showwarning is show


def test_an_interrupt_during_the_imports_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept"
        " KeyboardInterrupt:\n    pass"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ended = subprocess.run(
        [sys.executable, "-m", "kl3m_nb", "runs"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a job in the background has it ignored
    )
    assert (ended.returncode, ended.stderr) == (130, "Interrupted.\n")


def test_an_interrupted_command_ends_though_a_thread_still_waits_for_data():
    script = (
        "import runpy, sys, threading, types\ncli = sys.modules['kl3m_nb.cli'] ="
        " types.ModuleType('kl3m_nb.cli')\ncli.main = lambda:"
        " threading.Thread(target=threading.Event().wait).start() or print('saved') or"
        " 130\nrunpy.run_module('kl3m_nb', run_name='__main__')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "saved\n", "")


def test_parameters_come_from_a_file_and_the_command_line_wins(tmp_path):
    notebook = _notebook(tmp_path / "a.ipynb", "print(name, lr)")
    (tmp_path / "p.yaml").write_text("lr: 1e-4\nname: file\n")
    output = tmp_path / "out" / "a.ipynb"
    assert (
        cli.main(
            [
                "run",
                str(notebook),
                "-f",
                str(tmp_path / "p.yaml"),
                "-p",
                "name",
                "shell",
                "-o",
                str(output),
            ]
        )
        == 0
    )
    assert nbformat.read(output, as_version=4).cells[-1].outputs[0].text == "shell 0.0001\n"


def test_an_output_folder_that_is_there_gets_the_notebook_and_nothing_stands_beside_it(tmp_path):
    notebook = _notebook(tmp_path / "a.ipynb", "print(name)")
    (tmp_path / "out").mkdir()
    assert cli.main(["run", str(notebook), "-o", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.html",
        "a.ipynb",
        "a.status.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ipynb", "out"]
    assert cli.main(["run", str(notebook), "-o", str(tmp_path)]) == 2  # that is the notebook itself


@pytest.mark.parametrize("steps", [50, 100, 101])
def test_a_job_that_ends_before_its_warmup_is_told_of_once(steps, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(
        "kl3m_nb.jupyter.runner.run_notebook", lambda *arguments: started.append(arguments) or 0
    )
    given = {"profile": "kl3m-007-500m", "init": "random", "max_steps": steps}
    command = [
        "run",
        "02_training",
        "--without-gpu",
        *(word for key in given for word in ("-p", key, str(given[key]))),
    ]
    assert cli.main(command) == 0 and len(started) == 1
    warned = f"kl3m_nb: warning: warmup_steps 100 is not below max_steps {steps}: "
    assert capsys.readouterr().err.count(warned) == (steps <= 100)


def test_a_long_job_that_is_done_is_not_asked_about(trained_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "LONG_WITHOUT_GPU", 0.0)
    monkeypatch.setattr(cli.torch.cuda, "is_available", lambda: False)
    run_dir = shutil.copytree(trained_run[0], tmp_path / "run")
    assert cli.main(["train", str(run_dir)]) == 0
    assert "Finished at step 6" in capsys.readouterr().out
    shutil.rmtree(run_dir / "checkpoints" / "step-000006")
    assert cli.main(["train", str(run_dir)]) == 2
    assert "--without-gpu" in capsys.readouterr().err


def test_steps_that_are_done_are_not_asked_about(trained_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "LONG_WITHOUT_GPU", 0.0)
    monkeypatch.setattr(cli.torch.cuda, "is_available", lambda: False)
    run_dir = shutil.copytree(trained_run[0], tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints" / "step-000006")
    assert cli.main(["train", str(run_dir)]) == 2
    assert "for 3 steps" in capsys.readouterr().err
    monkeypatch.setattr(
        cli.decoder, "profile_of_start", lambda profile, init: profile
    )  # the model is smaller than the profile's
    published = shutil.copytree(trained_run[1].checkpoint, tmp_path / "model-step37000")
    assert (
        cli.main(
            [
                "train",
                "tiny",
                "--init",
                str(published),
                "--set",
                "max_steps",
                "37004",
                "--run",
                str(tmp_path / "on"),
            ]
        )
        == 2
    )
    assert "for 4 steps" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    given = {"init": "model-step37000", "max_steps": "37004"}
    assert (
        cli.main(
            ["run", "02_training", *(word for key in given for word in ("-p", key, given[key]))]
        )
        == 2
    )
    assert "for 4 steps" in capsys.readouterr().err, (
        "an init is looked for in the shell's folder, too"
    )


def test_a_failing_cell_is_exit_code_1(tmp_path, capsys):
    notebook = _notebook(tmp_path / "a.ipynb", "1 / 0")
    assert cli.main(["run", str(notebook), "-o", str(tmp_path / "out.ipynb")]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_train_stack_and_runs_work_from_the_shell(tmp_path):
    environment = {**os.environ, "KL3M_NB_RUNS": str(tmp_path / "runs"), "PYTHONPATH": str(ROOT)}
    settings = small_profile(max_steps=2)
    changes = []
    for section in ("model", "data", "schedule"):
        for key in (
            "layers",
            "hidden",
            "mlp",
            "head_size",
            "vocabulary",
            "context",
            "seq_len",
            "held_out_windows",
            "max_steps",
        ):
            if hasattr(getattr(settings, section), key):
                changes += ["--set", key, str(getattr(getattr(settings, section), key))]

    def call(*arguments):
        command = [sys.executable, "-m", "kl3m_nb", *arguments]
        ended = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert "Finished at step 2" in call(
        "train", "tiny", "--run", "a", "--set", "growth_factor", "1", *changes
    )
    assert "Finished at step 2" in call("train", "runs/a", "--set", "keep_checkpoints", "1")
    assert "verified" in call(
        "stack", "runs/a/checkpoints/step-000002", "grown", "--factor", "2", "--noise", "0.1"
    )
    assert '"noise": 0.1' in (tmp_path / "grown" / "stack.json").read_text()
    assert "tiny-2-layers-step2" in call("export", "runs/a/checkpoints/step-000002", "models")
    assert (tmp_path / "models" / "tiny-2-layers-step2" / "model.safetensors").is_file()
    assert "tiny" in call("runs")
    table = registry.load_runs(tmp_path / "runs")
    assert table.loc[0, ["run", "layers", "step", "max_steps", "tokens"]].tolist() == [
        "a",
        2,
        2,
        2,
        512,
    ]


def test_runs_are_listed_in_whole_seconds(monkeypatch, capsys):
    row = {
        "run": "a",
        "init": "random weights",
        "held_out_loss": 5.504636,
        "tokens": 491_520,
        "seconds": 656.96456,
        "checkpoint": "",
    }
    begun = row | {"run": "b", "held_out_loss": float("nan"), "tokens": 0, "seconds": 0.0}
    monkeypatch.setattr(registry, "load_runs", lambda: pd.DataFrame([row, begun]))
    assert cli.main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-3:] == ["5.505", "491,520", "657"] and lines[2].split()[-3:] == [
        "–",
        "0",
        "0",
    ]


def test_the_figures_of_an_estimate_stand_below_each_other(capsys):
    assert cli.main(["estimate", "tiny", "--gpu", "h200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ("profile", "weights + gradients + optimizer", "largest micro_batch that fits")
    [column] = {
        len(line) - len(line.removeprefix(name).lstrip())
        for name in names
        for line in lines
        if line.startswith(name)
    }
    assert all(line[column - 1] == " " != line[column] for line in lines)


def test_an_estimate_names_the_gpu_and_follows_the_micro_batch(capsys):
    printed = []
    for extra in ([], ["--micro-batch", "20"]):
        assert cli.main(["estimate", "kl3m-007-500m", "--gpu", "h200", *extra]) == 0
        printed.append(capsys.readouterr().out)
    assert all("NVIDIA H200" in text and "500,309,568" in text for text in printed)
    assert "655,360 tokens" in printed[0] and "2,621,440 tokens" in printed[1]
    steps = [
        next(line for line in text.splitlines() if line.startswith("a step")) for text in printed
    ]
    assert (
        "without gradient checkpointing" in steps[0] and "with gradient checkpointing" in steps[1]
    )


def test_no_runs_is_said(capsys):
    assert cli.main(["runs"]) == 0
    assert "no run to show" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("launcher", "arguments", "words"),
    [
        ({}, ["train", "tiny"], "WORLD_SIZE is 4, but torchrun has not started this process"),
        (
            {"TORCHELASTIC_RUN_ID": "job", "RANK": "0"},
            ["run", "02_training"],
            "torchrun has started run 4 times",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "job", "RANK": "0"},
            ["stack", "a", "b"],
            "torchrun has started stack 4 times",
        ),
    ],
)
def test_processes_that_would_not_share_the_work_are_refused(
    capsys, monkeypatch, launcher, arguments, words
):
    for name, value in {"WORLD_SIZE": "4", **launcher}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(arguments) == cli.EXIT_REFUSED
    assert words in capsys.readouterr().err and not registry.run_path("tiny", "train", "").exists()
