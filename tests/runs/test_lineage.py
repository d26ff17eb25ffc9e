"""What a run takes over of how its start was grown: by record, state or card, never by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from kl3m_nb.growth import stacking
from kl3m_nb.profiles import get_profile
from kl3m_nb.runs import lineage
from kl3m_nb.runs.card import CardFacts
from kl3m_nb.runs.lineage import carried_stack
from kl3m_nb.training import loop
from tests.conftest import model_card, small_profile

PUBLISHED = """KL3M 500M, 7th Gen Model, Step 37000 (4x Stacked Architecture)

{}Model Details

  • Layers: 120 (4x stacked from 30)

{}G_stack Methodology

Based on "Stacking Your Transformers" (NeurIPS 2024, arXiv:2405.15319):
"""
RECORD = {
    "source": "a/source",
    "factor": 4,
    "order": "random",
    "noise": 0.0,
    "source_layers": 3,
    "source_sha256": {},
}
GROWN = get_profile("kl3m-007-500m")


def _folder(path: Path, card: str = "", record: dict | None = None) -> Path:
    path.mkdir()
    if card:
        (path / "README.md").write_text(card)
    if record is not None:
        (path / "stack.json").write_text(json.dumps(record))
    return path


@pytest.mark.parametrize(
    ("card", "told"),
    [
        (PUBLISHED.format("## ", "## "), {"source_layers": 30, "factor": 4}),
        (PUBLISHED.format("", ""), {"source_layers": 30, "factor": 4}),
        (
            "---\ntags:\n- kl3m\n- g_stack\n---\n# a model, grown from 60 layers by stacking\n",
            {"source_layers": 60, "factor": 2},
        ),
        (
            "---\ntags: [legal, g_stack]\n---\n",
            {"source_layers": 30, "factor": 4},
        ),  # from how many, the profile says
        (
            "## G_stack\n\ngrown from 7 layers",
            {"source_layers": 30, "factor": 4},
        ),  # seven cannot be
        ("", {}),
        ("# kl3m-007-500m-step37000\n\nNot by G_stack: 120 layers from random weights.\n", {}),
    ],
)
def test_a_card_says_whether_its_model_was_grown(tmp_path, card, told):
    assert carried_stack(_folder(tmp_path / "kl3m-007-500m-step37000", card), GROWN) == told


@pytest.mark.parametrize("order", [{}, {"order": "random"}])
def test_what_a_card_of_ours_says_of_growth_is_read_from_it(tmp_path, order):
    told = {"source_layers": 30, "factor": 4, **order}
    for number, stack in enumerate(
        (
            told,
            told | {"source": "x", "order": "cyclic", "noise": 0.0, "source_sha256": {}, **order},
        )
    ):
        text = model_card(GROWN, CardFacts(lineage.Counts(9, 9, 9), "a", "CPU", stack=stack))
        assert carried_stack(_folder(tmp_path / f"card{number}", text), GROWN) == told
    scratch = model_card(GROWN, CardFacts(lineage.Counts(9, 9, 9), "random weights", "CPU"))
    assert carried_stack(_folder(tmp_path / "kl3m-007-500m-step9", scratch), GROWN) == {}


def test_the_record_of_a_stack_goes_before_its_card(tmp_path):
    folder = _folder(tmp_path / "start", PUBLISHED.format("## ", "## "), RECORD)
    assert carried_stack(folder, GROWN) == RECORD
    assert carried_stack(None, GROWN) == {}


@pytest.mark.parametrize(
    "record", [{"color": "red"}, {key: value for key, value in RECORD.items() if key != "order"}]
)
def test_a_record_of_another_kind_is_refused_before_the_run_begins(tmp_path, record):
    with pytest.raises(
        ValueError, match=r"The stack\.json of .*start has no '(source_layers|order)'; put back"
    ):
        carried_stack(_folder(tmp_path / "start", record=record), GROWN)


def test_a_run_from_a_checkpoint_of_another_run_knows_what_that_was_stacked_from(
    trained_run, tmp_path
):
    stacking.stack_checkpoint(
        trained_run[1].checkpoint, tmp_path / "stack", factor=2, order="random"
    )
    profile = small_profile(layers=4, growth_factor=2, max_steps=2)
    checkpoint = loop.train(profile, tmp_path / "first", tmp_path / "stack").checkpoint
    record = json.loads((tmp_path / "stack" / "stack.json").read_text())
    assert carried_stack(checkpoint, profile) == record | {"trained_steps": 2}
    (checkpoint / "README.md").unlink()
    shutil.rmtree(tmp_path / "stack")
    assert carried_stack(checkpoint, profile) == record | {"trained_steps": 2}
    assert carried_stack(trained_run[1].checkpoint, small_profile()) == {}


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch):
        """{file name: content, or the error that asking for it gives}; other files
        are not there.
        """
        files = {}

        def download(hub_id, name):
            assert hub_id == "owner/model-step9"
            if isinstance(answer := files.get(name, EntryNotFoundError("no such file")), Exception):
                raise answer
            return str(answer)

        monkeypatch.setattr(lineage, "hf_hub_download", download)
        return files

    def test_record_and_card_of_a_hub_id_are_asked_for(self, hub, tmp_path):
        folder = _folder(tmp_path / "snapshot", PUBLISHED.format("## ", "## "))
        hub["README.md"] = folder / "README.md"
        assert carried_stack("owner/model-step9", GROWN) == {"source_layers": 30, "factor": 4}
        (folder / "stack.json").write_text(json.dumps(RECORD))
        hub["stack.json"] = folder / "stack.json"
        assert carried_stack("owner/model-step9", GROWN) == RECORD

    def test_a_hub_that_is_out_of_reach_keeps_nothing_from_starting(self, hub, tmp_path):
        hub["stack.json"] = hub["README.md"] = LocalEntryNotFoundError(
            "offline, and nothing is kept"
        )
        assert carried_stack("owner/model-step9", GROWN) == {}
        hub["README.md"] = (
            _folder(tmp_path / "snapshot", PUBLISHED.format("## ", "## ")) / "README.md"
        )
        assert carried_stack("owner/model-step9", GROWN) == {"source_layers": 30, "factor": 4}
