from __future__ import annotations

import shutil

import pytest
import torch

from kl3m_nb import checkpoints


@pytest.fixture
def run_dir(trained_run, tmp_path):
    shutil.copytree(trained_run[0], tmp_path / "run")
    return tmp_path / "run"


def test_the_newest_whole_checkpoint_counts(run_dir):
    older, newest = checkpoints.whole_checkpoints(run_dir)
    assert checkpoints.latest_checkpoint(run_dir) == newest
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert checkpoints.latest_checkpoint(run_dir) == older
    (older / "training_state" / "manifest.json").unlink()
    assert checkpoints.latest_checkpoint(run_dir) is None
    with pytest.raises(ValueError, match="no whole checkpoint"):
        checkpoints.require_checkpoint(run_dir)


def test_foreign_and_half_written_folders_are_passed_over(run_dir):
    newest = checkpoints.latest_checkpoint(run_dir)
    (run_dir / "checkpoints" / "step-999999").mkdir()
    (run_dir / "checkpoints" / "step-best").mkdir()
    (run_dir / "checkpoints" / ".saving-abc").mkdir()
    assert checkpoints.latest_checkpoint(run_dir) == newest


def test_a_flipped_bit_is_found_before_anything_is_loaded(run_dir):
    newest = checkpoints.latest_checkpoint(run_dir)
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        checkpoints.load_state(newest)


def test_the_state_is_plain_data(run_dir):
    state = checkpoints.load_state(checkpoints.latest_checkpoint(run_dir))

    def kinds(value):
        if isinstance(value, dict):
            return {type(key) for key in value} | set().union(*map(kinds, value.values()), set())
        if isinstance(value, (list, tuple)):
            return set().union(*map(kinds, value), set())
        return {type(value)}

    assert kinds(state) <= {str, int, float, bool, type(None), torch.Tensor}


def test_only_the_newest_are_kept(run_dir, monkeypatch, trained_run):
    class Saved:
        def save_pretrained(self, folder):
            (folder / "config.json").write_text("{}")

    for step in (7, 8, 9):
        checkpoints.save_checkpoint(run_dir, step, Saved(), Saved(), {}, keep=2, card="")
    assert [path.name for path in checkpoints.whole_checkpoints(run_dir)] == ["step-000008", "step-000009"]
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step-000008", "step-000009"}


def test_a_save_that_fails_leaves_the_earlier_ones(run_dir):
    class Full:
        def save_pretrained(self, folder):
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")

    before = sorted((run_dir / "checkpoints").iterdir())
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save_checkpoint(run_dir, 7, Full(), Full(), {}, keep=1, card="")
    assert sorted((run_dir / "checkpoints").iterdir()) == before
