"""A checkpoint's relative path means one place to the check, to what loads model and tokenizer, and
to the notebooks' cells.
"""

from __future__ import annotations

import shutil

import pytest

from kl3m_nb.common import paths
from kl3m_nb.data import tokenizer
from kl3m_nb.evaluation import documents, generation
from kl3m_nb.figures import spectra
from kl3m_nb.growth import stacking
from kl3m_nb.model import decoder, scoring
from kl3m_nb.runs import folder, lineage, registry
from kl3m_nb.spectra import matrices, subject
from kl3m_nb.training import loop
from tests.conftest import execute_notebook, small_profile

FROM_ROOT, FROM_NOTEBOOKS = (
    "runs/demo-grown/checkpoints/step-000001",
    "../runs/demo-grown/checkpoints/step-000001",
)
STACK = "runs/demo-stack/checkpoint"


class Enough(Exception):
    """The cells that are asked about have run."""


@pytest.fixture
def project(trained_run, tmp_path, monkeypatch):
    """A project of its own with a source, its stack and a grown run; the shell stands in its
    notebooks/, as JupyterLab does.
    """
    root, checkout = tmp_path / "project", paths.project_root()
    shutil.copytree(checkout / "notebooks", root / "notebooks")
    (root / "data").symlink_to(checkout / "data")
    source = (
        shutil.copytree(trained_run[0], root / "runs" / "demo-source")
        / "checkpoints"
        / trained_run[1].checkpoint.name
    )
    monkeypatch.setattr(paths, "project_root", lambda: root)
    monkeypatch.setenv("KL3M_NB_RUNS", str(root / "runs"))
    monkeypatch.chdir(root / "notebooks")
    stacking.stack_checkpoint(source, STACK, 2)
    loop.train(small_profile(layers=4, max_steps=1), "runs/demo-grown", init=STACK)
    return root


def test_what_lies_here_comes_first_and_what_lies_nowhere_is_a_name(project):
    for name in (FROM_ROOT, FROM_NOTEBOOKS, str(project / FROM_ROOT), f"./{FROM_NOTEBOOKS}"):
        assert paths.find(name) == project / FROM_ROOT and paths.located(name) == str(
            project / FROM_ROOT
        )
    assert (
        paths.find("owner/name") == project / "owner" / "name"
        and paths.located("owner/name") == "owner/name"
    )
    (project / "notebooks" / "runs").mkdir()
    assert (
        paths.find("runs") == project / "notebooks" / "runs"
        and paths.resolve("runs") == project / "runs"
    )


@pytest.mark.parametrize("name", [FROM_ROOT, FROM_NOTEBOOKS])
class TestEachSpelling:
    def test_names_one_checkpoint_to_all_that_read_one(self, project, name, monkeypatch):
        place = project / FROM_ROOT
        assert (
            decoder.check_checkpoint(name)["hidden_size"]
            == decoder.load_model(name).config.hidden_size
            == 32
        )
        assert tokenizer.read_tokenizer(name) is tokenizer.read_tokenizer(str(place))
        tokenizer.check_same_entries(tokenizer.read_tokenizer(name), name)
        assert matrices.local_checkpoint(name) == place and lineage.model_step(name) == 1
        assert subject.find_subject(name).checkpoint == place
        assert registry.trained_on(name) == registry.trained_on(place) is not None
        asked = []
        monkeypatch.setattr(
            generation, "pipeline", lambda task, model, tokenizer: asked.append(model) or _stop()
        )
        with pytest.raises(Enough):
            generation.run_card(name, "kl3m-007-500m", 0)
        assert asked == [str(place)]

    def test_begins_a_run_whose_record_says_the_same(self, project, name):
        settings = small_profile(layers=4, max_steps=1)
        loop.train(settings, "runs/next", init=name)
        assert folder.read_run_init("runs/next") == FROM_ROOT
        assert loop.train(settings, "runs/next", init=FROM_ROOT).step == 1

    @pytest.mark.parametrize(
        ("notebook", "parameter", "last"),
        [
            ("01_stacking", "source", (scoring, "held_out_loss")),
            ("03_spectral_analysis", "trained", (spectra, "plot_condition_heatmap")),
            ("03_spectral_analysis", "stack", (spectra, "plot_condition_heatmap")),
            ("04_generation_evaluation", "trained", (documents, "evaluate_documents")),
            ("04_generation_evaluation", "others", (documents, "evaluate_documents")),
        ],
    )
    def test_that_the_check_accepts_is_loaded_by_the_cells(
        self, project, name, notebook, parameter, last, monkeypatch
    ):
        # the model has too little context
        monkeypatch.setattr(generation, "check_room", lambda *_: None)
        monkeypatch.setattr(*last, _stop)
        with pytest.raises(Enough):
            windows = {"seq_len": 64} if notebook == "01_stacking" else {}
            execute_notebook(notebook, {parameter: name, "run": "judged", **windows})


def _stop(*_, **__):
    raise Enough
