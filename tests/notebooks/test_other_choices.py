"""What notebook 01 offers beyond its defaults goes through the notebooks behind it, and counts as
what it is.

A named source, with a tokenizer of its own and fewer steps; noise and other orders; growing that
does not win.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pandas as pd
import pytest

from kl3m_nb import cli, figures, jupyter
from kl3m_nb.growth import stacking
from kl3m_nb.jupyter import runner
from kl3m_nb.profiles import source_profile
from kl3m_nb.runs import registry
from kl3m_nb.runs.folder import write_run_file
from kl3m_nb.runs.metrics import read_metrics
from kl3m_nb.training import loop
from tests.conftest import execute_notebook, small_profile

GROWN = {"layers": 8, "growth_factor": 4, "eval_every": 1, "tokenizer": "corpus-001"}
WINDOWS = {"seq_len": 32, "held_out_windows": 8}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A source of two steps, with the tokenizer of the first generation."""
    run_dir = tmp_path_factory.mktemp("named") / "short"
    settings = source_profile(small_profile(**GROWN, source_steps=2))
    return loop.train(settings, run_dir).checkpoint


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    """An empty `runs/`, no live view, and figures that are drawn and not saved."""
    monkeypatch.setenv("KL3M_NB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(jupyter, "LiveView", lambda run_dir: lambda row: None)
    monkeypatch.setattr(figures, "save_figure", lambda *_: None)


def _stack(source: Path, order: str = "cyclic", noise: float = 0.0) -> Path:
    """What notebook 01 makes."""
    stack = registry.run_path("tiny", "stack") / "checkpoint"
    stacking.stack_checkpoint(source, stack, 4, order, noise)
    return stack


def _train(stack: Path, steps: int) -> None:
    """What notebook 02 does."""
    loop.train(small_profile(**GROWN, max_steps=steps), registry.run_path("tiny", "grown"), stack)


def test_a_named_source_is_judged_on_its_own_text_with_its_own_tokenizer(short):
    told = execute_notebook("01_stacking", {"source": str(short), **WINDOWS})
    logged = read_metrics(short.parent.parent, "held_out").held_out_loss.iloc[-1]
    assert told["losses"]["source"] == pytest.approx(logged, rel=1e-5) and told[
        "unknowing"
    ] == math.log(512)
    with pytest.raises(
        ValueError,
        match=f"trained with another tokenizer than this run names; use tokenizer = {short}",
    ):
        execute_notebook(
            "01_stacking",
            {"source": str(short), "tokenizer": "corpus", "run": "other", **WINDOWS},
        )
    assert not (registry.run_path("tiny", "stack", "other") / "checkpoint").exists()


@pytest.mark.parametrize(("order", "noise"), [("cyclic", 0.2), ("zero_initialised", 0.0)])
def test_a_stack_with_noise_or_of_another_order_can_be_looked_into(short, order, noise):
    _train(_stack(short, order, noise), steps=2)
    told = execute_notebook("03_spectral_analysis", {"windows": 2})
    assert (told["subject"].order, told["subject"].noise) == (order, noise)
    assert ("divergence" in told) == ("swaps" in told) == (order == "cyclic")
    assert "inherited" in told  # from the stack where no place tells the source's block
    assert len(told["subject"].left_out()) == (order != "cyclic")
    table = pd.read_csv(told["run_dir"] / "spectra.csv")
    assert table.groupby("model").layer.nunique().to_dict() == {
        "source": 3,
        "stack, step 0": 9,
        "trained": 9,
    }  # with the head


def test_growing_that_does_not_win_is_a_result_with_the_cost_of_what_was_stacked(short, capsys):
    loop.train(
        source_profile(small_profile(source_steps=1)), registry.run_path("tiny", "source")
    )  # and this was not
    source = (
        shutil.copytree(short.parent.parent, registry.run_path("tiny", "source", "short"))
        / "checkpoints"
        / short.name
    )
    _train(_stack(source), steps=1)
    told = execute_notebook("05_growth_comparison", {"scratch_steps": 6})
    saved = pd.read_csv(told["run_dir"] / "losses.csv").set_index("run")
    assert saved.steps.to_dict() == {"source": 2, "grown": 1, "scratch": 6}
    assert pd.read_csv(told["run_dir"] / "speedups.csv").reached.tolist() == ["scratch only"] * 2
    assert (
        "grown had not reached it at its end, step 1, from scratch reached it"
        in capsys.readouterr().out
    )


def test_a_long_comparison_asks_before_it_trains_and_names_the_run_that_is_missing(
    short, monkeypatch, capsys
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    started = []
    monkeypatch.setattr(runner, "run_notebook", lambda *arguments: started.append(arguments) or 0)
    command = [
        "run",
        "05_growth_comparison",
        "-p",
        "scratch_run",
        "long",
        "-p",
        "scratch_steps",
        "1000000000",
    ]
    assert cli.main(command) == 2 and "demo-grown is no run folder" in capsys.readouterr().err
    source = (
        shutil.copytree(short.parent.parent, registry.run_path("tiny", "source"))
        / "checkpoints"
        / short.name
    )
    grown = registry.run_path("tiny", "grown")
    grown.mkdir()
    write_run_file(grown, small_profile(**GROWN), _stack(source), "")
    assert (
        cli.main(command) == 2
        and "lower scratch_steps, or add --without-gpu" in capsys.readouterr().err
    )
    assert not started and not registry.run_path("tiny", "scratch", "long").exists()
    for words in (
        ["--without-gpu"],
        ["-p", "train_scratch", "false"],
        ["-p", "scratch_steps", "3"],
    ):
        assert cli.main([*command, *words]) == 0
    assert len(started) == 3
    shutil.rmtree(registry.run_path("tiny", "source"))
    assert cli.main([*command, "--without-gpu"]) == 2
    assert f"{grown} was grown from" in capsys.readouterr().err and len(started) == 3
