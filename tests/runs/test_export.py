from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer

from kl3m_nb import cli
from kl3m_nb.growth import stacking
from kl3m_nb.runs import export, lineage
from kl3m_nb.spectra.singular_values import SpectrumCache
from kl3m_nb.spectra.subject import find_subject
from kl3m_nb.training import loop
from tests.conftest import files_up_to, small_profile

NAME = "tiny-2-layers-step6"  # of the trained run's last checkpoint


class Hub:
    """The hub's repositories, {id: {file: content}}, as huggingface_hub's API shows them."""

    def __init__(self, repositories: dict):
        self.repositories, self.calls = repositories, []

    def repo_exists(self, repository):
        return repository in self.repositories

    def list_repo_files(self, repository):
        return list(self.repositories[repository])

    def create_repo(self, repository, **settings):
        self.calls.append(("create", repository, settings))
        self.repositories.setdefault(repository, {".gitattributes": b""})

    def create_commit(self, repository, operations, commit_message):
        self.calls.append(("commit", repository, commit_message))
        for addition in operations:
            content = addition.path_or_fileobj
            self.repositories[repository][addition.path_in_repo] = (
                content if isinstance(content, bytes) else Path(content).read_bytes()
            )


@pytest.fixture
def hub(monkeypatch):
    made = Hub({})
    monkeypatch.setattr(export, "HfApi", lambda: made)
    return made


def _contents(folder) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_an_exported_model_is_whole_and_has_no_training_state(trained_run, tmp_path):
    checkpoint = trained_run[1].checkpoint
    folder = export.export_model(checkpoint, tmp_path)
    assert folder == tmp_path / NAME and not (folder / "training_state").exists()
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
    assert len(AutoTokenizer.from_pretrained(folder)) == 512
    with pytest.raises(ValueError, match="exists"):
        export.export_model(checkpoint, tmp_path)
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("README.md", "training_state"))
    with pytest.raises(ValueError, match=r"no README\.md"):
        export.export_model(bare, tmp_path)


@pytest.mark.parametrize("name", [None, "my.model-step6"])
def test_what_is_exported_or_pushed_is_the_model_without_state_and_spectra(
    trained_run, tmp_path, hub, name
):
    checkpoint = shutil.copytree(
        trained_run[1].checkpoint,
        tmp_path / "checkpoint",
        ignore=shutil.ignore_patterns(".spectra"),
    )
    whole = set(_contents(checkpoint))
    SpectrumCache.beside(checkpoint).path.parent.mkdir()
    SpectrumCache.beside(checkpoint).path.write_bytes(b"spectra")
    exported = _contents(export.export_model(checkpoint, tmp_path, name))
    pushed = hub.repositories[export.push_to_hub(checkpoint, "someone", name=name)]
    assert pushed == exported | {".gitattributes": b""}
    model = {file for file in whole if not file.startswith("training_state/")}
    assert set(exported) == model and len(model) < len(whole)


def test_pushing_uploads_the_model_privately(trained_run, hub):
    assert export.push_to_hub(trained_run[1].checkpoint, "someone") == f"someone/{NAME}"
    (_, name, created), (_, committed, _) = hub.calls
    assert name == committed == f"someone/{NAME}" and created["private"] is True


@pytest.mark.parametrize(
    "weights", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
)
def test_a_repository_that_holds_a_model_is_not_written_over(
    trained_run, tmp_path, hub, capsys, weights
):
    hub.repositories[f"someone/{NAME}"] = {".gitattributes": b"", weights: b"another"}
    with pytest.raises(
        ValueError,
        match=rf"someone/{NAME} on the hub holds a model already \({weights}\).*another name",
    ):
        export.push_to_hub(trained_run[1].checkpoint, "someone")
    assert (
        cli.main(
            ["export", str(trained_run[1].checkpoint), str(tmp_path), "--push-to-hub", "someone"]
        )
        == 2
    )
    assert capsys.readouterr().err.count("\n") == 1
    assert not hub.calls and not list(tmp_path.iterdir()), "refused before anything is written"


def test_the_same_push_again_is_refused_and_another_name_is_taken(trained_run, hub):
    export.push_to_hub(trained_run[1].checkpoint, "someone")
    first = dict(hub.repositories[f"someone/{NAME}"])
    with pytest.raises(ValueError, match="holds a model already"):
        export.push_to_hub(trained_run[1].checkpoint, "someone")
    assert (
        export.push_to_hub(trained_run[1].checkpoint, "someone", name="scratch-step6")
        == "someone/scratch-step6"
    )
    assert hub.repositories[f"someone/{NAME}"] == first


def test_a_repository_without_weights_can_be_pushed_to(trained_run, hub):
    """One that an upload which failed has left, or that was made by hand."""
    hub.repositories[f"someone/{NAME}"] = {".gitattributes": b"", "README.md": b"soon"}
    export.push_to_hub(trained_run[1].checkpoint, "someone")
    assert f"# {NAME}".encode() in hub.repositories[f"someone/{NAME}"]["README.md"]


def test_a_model_bears_the_name_it_is_given(trained_run, tmp_path, hub, capsys):
    checkpoint = trained_run[1].checkpoint
    arguments = [
        "export",
        str(checkpoint),
        str(tmp_path),
        "--name",
        "a-b-step6",
        "--push-to-hub",
        "someone",
    ]
    assert cli.main(arguments) == 0
    assert "a-b-step6" in capsys.readouterr().out
    card, before = (
        (tmp_path / "a-b-step6" / "README.md").read_text(),
        (checkpoint / "README.md").read_text(),
    )
    assert NAME in before and card == before.replace(NAME, "a-b-step6")
    assert hub.repositories["someone/a-b-step6"]["README.md"].decode() == card
    assert export.card_name(tmp_path / "a-b-step6") == "a-b-step6"
    assert lineage.carried_counts(tmp_path / "a-b-step6").step == 6
    export.export_model(tmp_path / "a-b-step6", tmp_path, "again-step6")
    assert (tmp_path / "again-step6" / "README.md").read_text() == before.replace(
        NAME, "again-step6"
    )


def test_a_start_of_the_same_name_keeps_its_name_in_the_card(trained_run, tmp_path):
    checkpoint = shutil.copytree(
        trained_run[1].checkpoint,
        tmp_path / "checkpoint",
        ignore=shutil.ignore_patterns("training_state"),
    )
    text = (checkpoint / "README.md").read_text().replace("random weights", NAME)
    (checkpoint / "README.md").write_text(text)
    card = (export.export_model(checkpoint, tmp_path, "other-step6") / "README.md").read_text()
    assert re.findall(rf".*{NAME}.*", card) == [f"- **Started from**: {NAME}"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a/b-step6", "letters and digits"),
        ("../b-step6", "letters and digits"),
        (".b-step6", "letters and digits"),
        ("a--b-step6", "letters and digits"),
        ("a b-step6", "letters and digits"),
        ("", "letters and digits"),
        ("model", "ends in -step6"),
        ("model-step66", "ends in -step6"),
        ("model-step16", "ends in -step6"),
        ("step6", "ends in -step6"),
    ],
)
def test_a_name_is_one_of_a_folder_and_says_the_models_steps(
    trained_run, tmp_path, hub, name, words
):
    with pytest.raises(ValueError, match=f"cannot be named '{name}'; .*{words}"):
        export.export_model(trained_run[1].checkpoint, tmp_path, name)
    with pytest.raises(ValueError, match=words):
        export.push_to_hub(trained_run[1].checkpoint, "someone", name=name)
    assert not list(tmp_path.iterdir()) and not hub.calls


def test_a_model_from_random_weights_is_not_called_grown_where_training_continues_from_it(
    trained_run, tmp_path
):
    """Its name ends in -stepN, as that of the family's grown model does, and the profile says how
    such a model is grown.
    """
    start = export.export_model(trained_run[1].checkpoint, tmp_path)
    assert not (start / "stack.json").exists()
    result = loop.train(small_profile(growth_factor=2, max_steps=8), tmp_path / "run", init=start)
    card = (result.checkpoint / "README.md").read_text()
    assert result.step == 8 and start.name in card
    for word in ("grown", "stack", "2405.15319"):
        assert word not in card.lower()


def _grown_profile(**overrides):
    return small_profile(layers=4, growth_factor=2, **overrides)


@pytest.fixture(scope="module")
def grown(trained_run, tmp_path_factory):
    """(stack with random blocks, checkpoint after two steps from there, that
    checkpoint exported).
    """
    folder = tmp_path_factory.mktemp("grown")
    stacking.stack_checkpoint(trained_run[1].checkpoint, folder / "stack", factor=2, order="random")
    trained = loop.train(
        _grown_profile(max_steps=2), folder / "run", init=folder / "stack"
    ).checkpoint
    return folder / "stack", trained, export.export_model(trained, folder)


class TestStacked:
    def test_an_export_says_what_its_stack_was_made_of_and_how_long_it_was_trained(
        self, grown, hub
    ):
        stack, trained, exported = grown
        made, record = (
            json.loads((folder / "stack.json").read_text()) for folder in (stack, exported)
        )
        assert Path(made["source"]).is_absolute() and record.pop("trained_steps") == 2
        assert record == made | {
            "source": "run/checkpoints/step-000006",
            "target": "stack",
        }, "paths of this machine stay here"
        for checkpoint, name in ((trained, None), (exported, "again-step2")):
            pushed = hub.repositories[export.push_to_hub(checkpoint, "someone", name=name)]
            assert pushed["stack.json"] == (exported / "stack.json").read_bytes()

    def test_training_that_continues_from_it_tells_of_the_stack_as_before(self, grown, tmp_path):
        _, trained, exported = grown
        result = loop.train(_grown_profile(max_steps=4), tmp_path / "run", init=exported)
        before, after = (
            (folder / "README.md").read_text() for folder in (trained, result.checkpoint)
        )
        section = re.search(r"## G_stack\n.*?\n## ", before, re.DOTALL)[0]
        assert (
            section in after
            and "the others were drawn at random" in section
            and "SHA-256 of" in section
        )
        assert "grown from 2 layers by random blocks, after 4 training steps" in after
        again = export.export_model(result.checkpoint, tmp_path)
        assert json.loads((again / "stack.json").read_text())["trained_steps"] == 4

    def test_it_is_not_taken_for_the_stack(self, grown, trained_run):
        stack, _, exported = grown
        source = trained_run[1].checkpoint
        assert lineage.model_step(stack) == 0 and lineage.model_step(exported) == 2
        assert stacking.verify_stack(source, stack) > 0
        with pytest.raises(ValueError, match="was trained for 2 steps since it was stacked"):
            stacking.verify_stack(source, exported)
        with pytest.raises(ValueError, match="already holds something else than this stack"):
            stacking.stack_checkpoint(source, exported, factor=2, order="random")
        assert find_subject(stack).start == str(stack) and find_subject(exported).start == ""

    def test_what_only_a_card_told_is_told_by_the_card_of_the_next(self, grown, tmp_path):
        start = shutil.copytree(grown[2], tmp_path / "start-step2")
        (start / "stack.json").unlink()
        trained = loop.train(_grown_profile(max_steps=4), tmp_path / "run", init=start).checkpoint
        exported = export.export_model(trained, tmp_path)
        card = (exported / "README.md").read_text()
        assert not (exported / "stack.json").exists()
        assert (
            "grown from 2 layers by random blocks" in card and "continues the grown model" in card
        )


SHAPE = (
    "layers 2 hidden 32 mlp 64 heads 4 kv_heads 2 head_size 8 growth_factor 1 vocabulary 512"
    " context 64 seq_len 32".split()
)
SET_SHAPE = [
    part for pair in zip(SHAPE[::2], SHAPE[1::2], strict=True) for part in ("--set", *pair)
]  # that of `small_profile`


@pytest.mark.parametrize("harm", ["cut off", "a flipped bit", "missing"])
@pytest.mark.parametrize("command", ["export", "stack", "train", "spectra"])
def test_a_damaged_checkpoint_is_taken_for_a_model_by_no_command(
    trained_run, tmp_path, monkeypatch, capsys, harm, command
):
    checkpoint = shutil.copytree(trained_run[1].checkpoint, tmp_path / "step-000006")
    weights = checkpoint / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-100] ^= 1
    weights.write_bytes(whole[:-1000] if harm == "cut off" else whole)
    if harm == "missing":
        weights.unlink()
    arguments = {
        "export": [str(checkpoint), str(tmp_path / "models")],
        "stack": [str(checkpoint), str(tmp_path / "stack")],
        "train": ["tiny", "--init", str(checkpoint), "--run", f"{tmp_path}/run", *SET_SHAPE],
        "spectra": [str(checkpoint), "-o", str(tmp_path / "spectra")],
    }[command]
    assert cli.main([command, *arguments]) == 2
    assert "name another checkpoint of its run" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"step-000006"}


def test_a_hub_that_does_not_answer_is_one_sentence_and_nothing_is_copied(
    trained_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(export, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:1"))
    assert (
        cli.main(
            [
                "export",
                str(trained_run[1].checkpoint),
                str(tmp_path / "models"),
                "--push-to-hub",
                "someone",
            ]
        )
        == 2
    )
    words = capsys.readouterr().err
    assert (
        "The hub could not be asked for someone/tiny-2-layers-step6 (" in words
        and words.count("\n") == 1
    )
    assert not (tmp_path / "models").exists()


def test_a_full_disk_leaves_no_half_model(trained_run, tmp_path, capsys):
    with files_up_to(20_000):
        assert cli.main(["export", str(trained_run[1].checkpoint), str(tmp_path / "models")]) == 1
    words = capsys.readouterr().err
    assert "File too large" in words and words.count("\n") == 1 and "[(" not in words
    assert list((tmp_path / "models").iterdir()) == []
