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


def test_a_request_that_cannot_be_taken_ends_no_run(tmp_path):
    (tmp_path / run_folder.SAVE_REQUEST).mkdir()
    assert not run_folder.take_save_request(tmp_path)
    assert not run_folder.take_save_request(tmp_path / "a file system that is gone")


def test_tasks_of_srun_that_meet_in_a_folder_are_sent_to_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with run_folder.RunLock(tmp_path) as first, run_folder.RunLock(tmp_path) as other:
        first.acquire()
        with pytest.raises(run_folder.RunIsBusy, match="srun has started 4 such processes; have it start torchrun"):
            other.acquire()
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
        with pytest.raises(run_folder.RunIsBusy, match="wait for it, stop it"):
            other.acquire()


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


def test_a_setting_that_an_earlier_version_did_not_have_is_at_its_default(tmp_path):
    run_folder.write_run_file(tmp_path, small_profile(), None, "cpu")
    record = json.loads((tmp_path / run_folder.RUN_FILE).read_text())
    del record["profile"]["data"]["seed"]
    (tmp_path / run_folder.RUN_FILE).write_text(json.dumps(record))
    (tmp_path / "metrics.jsonl").touch()
    assert run_folder.read_run_profile(tmp_path) == small_profile()
    run_folder.check_run_folder(tmp_path, small_profile(), None)
    with pytest.raises(ValueError, match="seed = 7, now it is 0"):
        run_folder.check_run_folder(tmp_path, small_profile(seed=0), None)


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


def _without(section):
    record = {"profile": small_profile().to_dict(), "init": "random weights", "runtime": "cpu", "identity": "a"}
    del record["profile"][section]
    return record


def _with(**fields):
    record = {"profile": small_profile().to_dict(), "init": "random weights", "runtime": "cpu", "identity": "a"}
    record["profile"]["model"] |= fields
    return record


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "Expecting value"),
        ("[]", "it holds no JSON object"),
        ("[" * 100_000, "it is nested too deep"),
        ("{}", "no text for 'init'"),
        (json.dumps({"init": "random weights", "runtime": "", "identity": "a"}), "mapping of fields; None is not"),
        (json.dumps(_without("name")), "a profile needs the field 'name'"),
        (json.dumps(_without("clamp")), "a profile needs the field 'clamp'"),
        (json.dumps(_with(colour=1)), "a profile's model has no field 'colour'"),
        (json.dumps(_with(layers="2")), "field 'layers' is of type int; '2' is not"),
    ],
)
def test_a_run_file_that_is_cut_off_or_foreign_is_named_and_says_what_is_wrong(tmp_path, content, words):
    (tmp_path / run_folder.RUN_FILE).write_text(content)
    for read in (run_folder.read_run_profile, run_folder.read_run_init, run_folder.run_identity):
        with pytest.raises(ValueError, match=rf"run\.json cannot be read \(.*{words}.*\); put back") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)
