"""The mixture of the laptop goes through the notebooks of the dense models: source, stack,
training, spectra, judgement.
"""

from __future__ import annotations

import pytest

from kl3m_nb import figures
from kl3m_nb.jupyter import live
from kl3m_nb.runs.metrics import read_metrics
from tests.conftest import execute_notebook

SMALL = {"profile": "tiny-moe", "seq_len": 64}
STEPS = {"max_steps": 4, "micro_batch": 2}


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """An empty `runs/`, no live view, and figures that are drawn and not saved."""
    monkeypatch.setenv("KL3M_NB_RUNS", str(tmp_path))
    monkeypatch.setattr(live, "LiveView", lambda run_dir: lambda row: None)
    monkeypatch.setattr(
        figures,
        "save_figure",
        lambda figure, folder, *_: folder.mkdir(parents=True, exist_ok=True),
    )


def test_a_mixture_is_grown_trained_and_looked_into(quiet):
    execute_notebook("00_source_model", {**SMALL, **STEPS})
    stacked = execute_notebook("01_stacking", {**SMALL, "held_out_windows": 2})
    trained = execute_notebook("02_training", {**SMALL, **STEPS, "held_out_windows": 2})
    layers = trained["settings"].model.layers
    assert stacked["summary"].block_sources == (*range(layers // 4),) * 4
    history = read_metrics(trained["run_dir"], "train")
    assert list(history.step) == [1, 2, 3, 4] and (history.router_loss > 0).all()
    experts = read_metrics(trained["run_dir"], "experts")
    assert (
        len(experts) % (4 * layers) == 0
        and (experts.groupby(["step", "layer"]).share.sum() - 1).abs().max() < 1e-3
    )
    spectra = execute_notebook(
        "03_spectral_analysis", {"profile": "tiny-moe", "role": "gate_proj[0]", "windows": 0}
    )
    assert (
        spectra["tables"]["trained"].expert.max() == 3
        and (spectra["divergence"].distance > 0).all()
    )
    judged = execute_notebook(
        "04_generation_evaluation",
        {"profile": "tiny-moe", "document_count": 2, "prompt_count": 2, "max_new_tokens": 4},
    )
    assert set(judged["summary"].index) == {"source", "stack, step 0", "trained"}
