from __future__ import annotations

import shutil

import pytest
from conftest import files_up_to
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM, AutoTokenizer

from kl3m_nb import cli, publishing
from kl3m_nb.spectral_cache import SpectrumCache


def test_an_exported_model_is_whole_and_has_no_training_state(trained_run, tmp_path):
    checkpoint = trained_run[1].checkpoint
    folder = publishing.export_model(checkpoint, tmp_path)
    assert folder == tmp_path / "tiny-step6" and not (folder / "training_state").exists()
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
    assert len(AutoTokenizer.from_pretrained(folder)) == 512
    with pytest.raises(ValueError, match="exists"):
        publishing.export_model(checkpoint, tmp_path)
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("README.md", "training_state"))
    with pytest.raises(ValueError, match=r"no README\.md"):
        publishing.export_model(bare, tmp_path)


def test_what_is_exported_or_pushed_is_the_model_without_state_and_spectra(trained_run, tmp_path, monkeypatch):
    checkpoint = shutil.copytree(trained_run[1].checkpoint, tmp_path / "checkpoint")
    whole = _files(checkpoint)
    SpectrumCache.beside(checkpoint).path.parent.mkdir()
    SpectrumCache.beside(checkpoint).path.write_bytes(b"spectra")
    pushed = []

    class Hub:
        def create_repo(self, name, **settings):
            pass

        def upload_folder(self, folder_path, ignore_patterns, **settings):
            pushed.extend(filter_repo_objects(_files(folder_path), ignore_patterns=ignore_patterns))

    monkeypatch.setattr(publishing, "HfApi", Hub)
    publishing.push_to_hub(checkpoint, "someone")
    model = {name for name in whole if not name.startswith("training_state/")}
    assert set(pushed) == model == _files(publishing.export_model(checkpoint, tmp_path)) and len(model) < len(whole)


def _files(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_pushing_uploads_the_model_privately(trained_run, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, **settings):
            calls.append(("create", name, settings))

        def upload_folder(self, **settings):
            calls.append(("upload", settings))

    monkeypatch.setattr(publishing, "HfApi", Hub)
    assert publishing.push_to_hub(trained_run[1].checkpoint, "someone") == "someone/tiny-step6"
    (_, name, created), (_, uploaded) = calls
    assert name == uploaded["repo_id"] == "someone/tiny-step6" and created["private"] is True
    assert uploaded["folder_path"] == trained_run[1].checkpoint


@pytest.mark.parametrize("harm", ["cut off", "a flipped bit", "missing"])
@pytest.mark.parametrize("command", ["export", "stack", "train", "spectra"])
def test_a_damaged_checkpoint_is_taken_for_a_model_by_no_command(trained_run, tmp_path, monkeypatch, capsys, harm, command):
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
        "train": ["tiny", "--init", str(checkpoint), "--run", f"{tmp_path}/run"],
        "spectra": [str(checkpoint), "-o", str(tmp_path / "spectra")],
    }[command]
    assert cli.main([command, *arguments]) == 2
    assert "name another checkpoint of its run" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"step-000006"}


def test_a_full_disk_leaves_no_half_model(trained_run, tmp_path, capsys):
    with files_up_to(20_000):
        assert cli.main(["export", str(trained_run[1].checkpoint), str(tmp_path / "models")]) == 1
    words = capsys.readouterr().err
    assert "File too large" in words and words.count("\n") == 1 and "[(" not in words
    assert list((tmp_path / "models").iterdir()) == []
