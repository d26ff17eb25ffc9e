from __future__ import annotations

import json
import os

import pytest
from conftest import small_profile

from kl3m_nb import run_folder


def test_a_lock_keeps_others_out_and_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "a" / "run"
    with run_folder.RunLock(folder) as first:
        assert not folder.exists() and not first.held
        first.acquire()
        for _ in range(2):  # whoever was refused leaves the lock alone
            with run_folder.RunLock(folder) as other, pytest.raises(run_folder.RunIsBusy, match=f"in use by {_this_process()}"):
                other.acquire()
        assert first.held
    assert list(folder.iterdir()) == []
    with run_folder.RunLock(folder) as third:
        third.acquire()


def _this_process() -> str:
    return f"process {os.getpid()} on {os.uname().nodename}"


def test_a_request_is_taken_once(tmp_path):
    run_folder.write_run_file(tmp_path, small_profile(), None, "cpu")
    assert not run_folder.take_save_request(tmp_path)
    run_folder.request_checkpoint(tmp_path)
    assert run_folder.take_save_request(tmp_path) and not run_folder.take_save_request(tmp_path)


def test_the_run_file_keeps_its_identity_and_says_what_was_begun(tmp_path):
    assert run_folder.run_identity(tmp_path) is None
    identity = run_folder.write_run_file(tmp_path, small_profile(), "hub/model", "cpu")
    assert run_folder.write_run_file(tmp_path, small_profile(keep_checkpoints=1), "hub/model", "gpu") == identity
    assert run_folder.run_identity(tmp_path) == identity
    assert run_folder.read_run_init(tmp_path) == "hub/model"
    assert run_folder.read_run_profile(tmp_path) == small_profile(keep_checkpoints=1)
    run_folder.write_run_file(tmp_path, small_profile(), None, "cpu")
    assert run_folder.read_run_init(tmp_path) is None
    run_folder.check_run_folder(tmp_path, small_profile(hidden=64), "hub/model")  # nothing has been trained there
    (tmp_path / "metrics.jsonl").touch()
    run_folder.check_run_folder(tmp_path, small_profile(), None)
    with pytest.raises(ValueError, match="hidden = 32, now it is 64"):
        run_folder.check_run_folder(tmp_path, small_profile(hidden=64), None)
    with pytest.raises(ValueError, match="random weights, now from hub/model"):
        run_folder.check_run_folder(tmp_path, small_profile(), "hub/model")


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("data", "temperature", "temperature = 0.5, now it is not set"),
        (None, "temperature", "temperature = 0.5, now it is not set"),
        ("data", "-seed", "seed = not set, now it is 0"),
        (None, "-clamp", "= not set, now it is"),
    ],
)
def test_settings_of_another_version_are_named(tmp_path, section, key, message):
    """run.json may hold a setting that a profile has no more, or lack one that it had not yet."""
    run_folder.write_run_file(tmp_path, small_profile(seed=0), None, "cpu")
    record = json.loads((tmp_path / run_folder.RUN_FILE).read_text())
    settings = record["profile"][section] if section else record["profile"]
    if key.startswith("-"):
        del settings[key[1:]]
    else:
        settings[key] = 0.5
    (tmp_path / run_folder.RUN_FILE).write_text(json.dumps(record))
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=message):
        run_folder.check_run_folder(tmp_path, small_profile(seed=0), None)


def test_a_run_of_another_version_cannot_be_read_and_says_so(tmp_path):
    run_folder.write_run_file(tmp_path, small_profile(), None, "cpu")
    record = json.loads((tmp_path / run_folder.RUN_FILE).read_text())
    record["profile"]["data"]["temperature"] = 0.5
    (tmp_path / run_folder.RUN_FILE).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"settings of another version .*'temperature'"):
        run_folder.read_run_profile(tmp_path)


def test_a_disk_without_room_for_a_name_still_has_the_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with run_folder.RunLock(tmp_path) as lock:
        lock.acquire()
        with run_folder.RunLock(tmp_path) as other, pytest.raises(run_folder.RunIsBusy, match="in use by another process"):
            other.acquire()
        assert lock.held
    assert list(tmp_path.iterdir()) == []


def test_a_run_file_that_is_cut_off_is_named(tmp_path):
    run_folder.write_run_file(tmp_path, small_profile(), None, "cpu")
    (tmp_path / run_folder.RUN_FILE).write_text("")
    with pytest.raises(ValueError, match=r"run.json cannot be read"):
        run_folder.read_run_profile(tmp_path)
