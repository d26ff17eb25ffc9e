from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from kl3m_nb.runs import checkpoints
from kl3m_nb.training import loop
from tests.conftest import small_profile


@pytest.fixture
def run_dir(trained_run, tmp_path):
    shutil.copytree(trained_run[0], tmp_path / "run", ignore=shutil.ignore_patterns(".spectra"))
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
    older, newest = checkpoints.whole_checkpoints(run_dir)
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    assert (
        "model.safetensors is damaged" in checkpoints.flaw_of(newest)
        and checkpoints.flaw_of(older) is None
    )
    assert checkpoints.newest_sound_checkpoint(run_dir) == (
        older,
        {newest: checkpoints.flaw_of(newest)},
    )
    with pytest.warns(UserWarning, match="model.safetensors is damaged.*passed over"):
        assert checkpoints.require_checkpoint(run_dir) == older


def test_every_file_is_in_the_manifest_and_none_can_run_code(run_dir):
    newest = checkpoints.latest_checkpoint(run_dir)
    manifest = json.loads((newest / "training_state" / "manifest.json").read_text())
    files = {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == files - {"training_state/manifest.json"}
    for name, entry in manifest["files"].items():
        content = (newest / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert {Path(name).suffix for name in files} == {".safetensors", ".json", ".pt", ".md"}
    torch.load(newest / "training_state" / "state.pt", weights_only=True)


def test_who_may_read_a_checkpoint_may_read_its_weights(run_dir):
    newest = checkpoints.latest_checkpoint(run_dir)
    assert (newest / "model.safetensors").stat().st_mode == (newest / "README.md").stat().st_mode


def test_the_state_is_plain_data(run_dir):
    state = checkpoints.load_state(checkpoints.latest_checkpoint(run_dir))

    def kinds(value):
        if isinstance(value, dict):
            return {type(key) for key in value} | set().union(*map(kinds, value.values()), set())
        if isinstance(value, (list, tuple)):
            return set().union(*map(kinds, value), set())
        return {type(value)}

    assert kinds(state) <= {str, int, float, bool, type(None), torch.Tensor}


class _Model(torch.nn.Module):
    """A model that saves a file, or fails to."""

    def __init__(self, error: Exception | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.error = error

    def save_pretrained(self, folder, state_dict=None):
        torch.save(state_dict, folder / "weights")
        if self.error:
            raise self.error


class _Tokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def _write(run_dir, step, model=None, **kept):
    model = model or _Model()
    snapshot = checkpoints.take_snapshot(step, model, {})
    return checkpoints.write_checkpoint(
        run_dir, snapshot, model, _Tokenizer(), "# card", "me", **kept
    )


def test_the_newest_are_kept_and_every_nth(tmp_path):
    for step in range(2, 19, 2):
        assert _write(tmp_path, step, keep=2, keep_every=6).name == f"step-{step:06d}"
    kept = ["step-000006", "step-000012", "step-000016", "step-000018"]
    assert [path.name for path in checkpoints.whole_checkpoints(tmp_path)] == kept
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == kept
    _write(tmp_path, 20, keep=1)
    assert [path.name for path in checkpoints.whole_checkpoints(tmp_path)] == ["step-000020"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("failed writing"), SafetensorError("io")],
)
def test_a_save_that_fails_leaves_the_earlier_ones(run_dir, error):
    before = sorted((run_dir / "checkpoints").rglob("*"))
    with pytest.raises(
        checkpoints.CheckpointFailed, match=f"step-000007 could not be written: .*{error.args[-1]}"
    ):
        _write(run_dir, 7, _Model(error), keep=1)
    assert sorted((run_dir / "checkpoints").rglob("*")) == before


def test_a_snapshot_is_not_reached_by_what_training_does_meanwhile():
    model = _Model()
    moments = torch.zeros(2)
    snapshot = checkpoints.take_snapshot(
        1, model, {"moments": [moments], "alias": moments, "step": 1}
    )
    with torch.no_grad():
        model.weight.zero_()
        moments.fill_(9)
    assert snapshot.weights["weight"].tolist() == [1, 1, 1] and snapshot.state["moments"][
        0
    ].tolist() == [0, 0]
    assert snapshot.state["alias"] is snapshot.state["moments"][0] and snapshot.bytes == 20


def test_the_writer_works_in_the_background_and_hands_over_result_and_error():
    writer, begun, go_on = checkpoints.BackgroundWriter(), threading.Event(), threading.Event()

    def write(result):
        begun.set()
        go_on.wait()
        if isinstance(result, Exception):
            raise result
        return result

    writer.start(write, Path("a"))
    assert begun.wait(10) and writer.collect(waiting=False) is None
    with pytest.raises(RuntimeError, match="still being written"):
        writer.start(write, Path("b"))
    go_on.set()
    assert writer.collect(waiting=True) == Path("a") and writer.collect(waiting=True) is None
    writer.start(write, checkpoints.CheckpointFailed("full"))
    with pytest.raises(checkpoints.CheckpointFailed, match="full"):
        writer.collect(waiting=True)
    writer.close()


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(run_dir):
    before = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    for name in (".saving-step-000009-1", ".removing-step-000001-1"):
        (run_dir / "checkpoints" / name).mkdir()
    (run_dir / "checkpoints" / ".saving-mine").mkdir()
    checkpoints.remove_leftovers(run_dir)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        ".saving-mine",
        *before,
    ]


def test_a_checkpoint_that_cannot_be_removed_is_no_failure(tmp_path, monkeypatch):
    def refused(folder, ignore_errors=False):
        if not ignore_errors:
            raise OSError(39, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", refused)
    with pytest.warns(
        UserWarning, match="step-000001 is no longer needed and could not be removed: .*not empty"
    ):
        result = loop.train(
            small_profile(checkpoint_every=1, keep_checkpoints=1, max_steps=2), tmp_path / "run"
        )
    assert result.step == 2 and checkpoints.flaw_of(result.checkpoint) is None


def test_what_a_checkpoint_counts_on_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name) or sync(fd),
    )
    monkeypatch.setattr(os, "rename", lambda old, new: done.append("renamed") or rename(old, new))
    loop.train(small_profile(max_steps=1), tmp_path / "run")
    before = done[: done.index("renamed")]
    assert {"run.json", "metrics.jsonl", "model.safetensors", "state.pt", "manifest.json"} <= set(
        before
    )


def test_leftovers_of_any_process_are_removed_whatever_its_number(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for name in (
        f".saving-step-000003-{os.getpid()}",
        f".removing-step-000002-{os.getpid()}",
        ".saving-step-000003-0a1b2c3d4e5f",
    ):
        (folder / name).mkdir(parents=True)
    checkpoints.remove_leftovers(tmp_path / "run")
    assert list(folder.iterdir()) == []
