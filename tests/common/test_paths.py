"""A checkpoint's relative path means one place to the check, to what loads model and tokenizer, and
to the notebooks' cells.
"""

from __future__ import annotations

import contextlib
import shutil

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from kl3m_nb import cli, evaluation, figures, model
from kl3m_nb.common import paths
from kl3m_nb.data import tokenizer
from kl3m_nb.evaluation import generation
from kl3m_nb.growth import stacking
from kl3m_nb.model import decoder
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
    place = project / FROM_ROOT
    for name in (FROM_ROOT, FROM_NOTEBOOKS, str(place), f"./{FROM_NOTEBOOKS}"):
        assert paths.checkpoint_place(name) == paths.Place("folder", str(place), place)
    missing = project / "owner" / "name"
    assert paths.checkpoint_place("owner/name") == paths.Place("hub", "owner/name", missing)
    run, weights = paths.checkpoint_place("runs/demo-grown"), f"{FROM_ROOT}/model.safetensors"
    assert (run.kind, run.folder) == ("run", project / "runs" / "demo-grown")
    assert (paths.checkpoint_place(weights).kind, paths.checkpoint_place(weights).folder) == (
        "file",
        place,
    )
    (project / "notebooks" / "runs").mkdir()
    assert (
        paths.find("runs") == project / "notebooks" / "runs"
        and paths.resolve("runs") == project / "runs"
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("owner/name", "hub"),
        ("alea-institute/kl3m-006-170m", "hub"),
        ("runs/typo", "nothing"),
        ("runs/typo/checkpoints/step-000001", "nothing"),
        ("typo", "nothing"),
        ("./owner/name", "nothing"),
        ("../owner/name", "nothing"),
        ("-owner/name", "nothing"),
        ("owner/name-", "nothing"),
        ("owner/na..me", "nothing"),
        (f"owner/{'n' * 300}", "nothing"),
        ("/owner/name", "nothing"),
    ],
)
def test_a_name_is_a_hub_id_to_all_or_to_none(project, name, kind, monkeypatch):
    """Whatever reads a model, tokenizer, card or spectrum asks the hub for the same names."""
    asked = []

    def ask(*arguments, **_):
        asked.append(arguments[0])
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(matrices.huggingface_hub, "snapshot_download", ask)
    monkeypatch.setattr(decoder, "load_whole", ask)
    monkeypatch.setattr(tokenizer, "cached_file", ask)
    monkeypatch.setattr(lineage, "hf_hub_download", ask)
    assert paths.checkpoint_place(name).kind == kind
    readers = (
        matrices.find_matrices,
        decoder.load_model,
        lambda name: lineage.carried_stack(name, small_profile()),
        *([tokenizer.read_tokenizer] if "/" in name else []),  # gpt2 is a tokenizer of the hub
    )
    for reader in readers:
        asked.clear()
        with contextlib.suppress(ValueError):
            reader(name)
        assert {*asked} == ({name} if kind == "hub" else set()), reader
    if kind == "nothing":
        with pytest.raises(ValueError, match=r"^There is no checkpoint folder [^\n]*\.$"):
            decoder.load_model(name)
        with pytest.raises(cli.Refused):
            cli._start(name, project / "runs" / "new")
    else:
        assert cli._start(name, project / "runs" / "new") == name


def test_a_recorded_name_is_seen_from_the_root(project):
    (project / "notebooks" / STACK).mkdir(parents=True)
    assert paths.recorded_place(STACK).path == project / STACK
    assert paths.checkpoint_place(STACK).path == project / "notebooks" / STACK


def test_a_run_goes_on_from_a_start_that_was_spelled_in_a_roundabout_way(project, tmp_path):
    """The record has the spelling, and the command line goes on by the record."""
    start = f"{shutil.copytree(project / STACK, tmp_path / 'start')}/../start"
    settings = small_profile(layers=4, max_steps=1)
    loop.train(settings, "runs/next", init=start)
    recorded = folder.read_run_init("runs/next")
    assert recorded == start
    place = paths.recorded_place(recorded)
    assert place.path == tmp_path / "start" and loop.train(settings, "runs/next", place.name)


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
            generation, "pipeline", lambda task, **given: asked.append(given["model"]) or _stop()
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
            ("01_stacking", "source", (model, "held_out_loss")),
            ("03_spectral_analysis", "trained", (figures, "plot_condition_heatmap")),
            ("03_spectral_analysis", "stack", (figures, "plot_condition_heatmap")),
            ("04_generation_evaluation", "trained", (evaluation, "evaluate_documents")),
            ("04_generation_evaluation", "others", (evaluation, "evaluate_documents")),
        ],
    )
    def test_that_the_check_accepts_is_loaded_by_the_cells(
        self, project, name, notebook, parameter, last, monkeypatch
    ):
        # the model has too little context
        monkeypatch.setattr(evaluation, "check_room", lambda *_: None)
        monkeypatch.setattr(*last, _stop)
        with pytest.raises(Enough):
            short = {"seq_len": 64} if notebook == "01_stacking" else {}  # the model's context
            execute_notebook(notebook, {parameter: name, "run": "judged", **short})


def _stop(*_, **__):
    raise Enough
