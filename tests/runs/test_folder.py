from __future__ import annotations

import json
import os

import pytest

from kl3m_nb.runs.folder import (
    RUN_FILE,
    SAVE_REQUEST,
    RunIsBusy,
    RunLock,
    check_run_folder,
    read_run_init,
    read_run_profile,
    request_checkpoint,
    run_identity,
    take_save_request,
    write_run_file,
)
from tests.conftest import small_profile


def test_a_lock_keeps_others_out_and_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "a" / "run"
    with RunLock(folder) as first:
        assert not folder.exists() and not first.held
        first.acquire()
        for _ in range(2):  # whoever was refused leaves the lock alone
            with (
                RunLock(folder) as other,
                pytest.raises(RunIsBusy, match=f"in use by {_this_process()}"),
            ):
                other.acquire()
        assert first.held
    assert list(folder.iterdir()) == []
    with RunLock(folder) as third:
        third.acquire()


def _this_process() -> str:
    return f"process {os.getpid()} on {os.uname().nodename}"


def test_a_request_is_taken_once(tmp_path):
    write_run_file(tmp_path, small_profile(), None, "cpu")
    assert not take_save_request(tmp_path)
    request_checkpoint(tmp_path)
    assert take_save_request(tmp_path) and not take_save_request(tmp_path)


def test_a_request_that_cannot_be_taken_ends_no_run(tmp_path):
    (tmp_path / SAVE_REQUEST).mkdir()
    assert not take_save_request(tmp_path)
    assert not take_save_request(tmp_path / "a file system that is gone")


def test_tasks_of_srun_that_meet_in_a_folder_are_sent_to_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with RunLock(tmp_path) as first, RunLock(tmp_path) as other:
        first.acquire()
        with pytest.raises(
            RunIsBusy, match="srun has started 4 such processes; have it start torchrun"
        ):
            other.acquire()
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
        with pytest.raises(RunIsBusy, match="wait for it, stop it"):
            other.acquire()


def test_the_run_file_keeps_its_identity_and_says_what_was_begun(tmp_path):
    assert run_identity(tmp_path) is None
    identity = write_run_file(tmp_path, small_profile(), "hub/model", "cpu")
    assert (
        write_run_file(tmp_path, small_profile(keep_checkpoints=1), "hub/model", "gpu") == identity
    )
    assert run_identity(tmp_path) == identity
    assert read_run_init(tmp_path) == "hub/model"
    assert read_run_profile(tmp_path) == small_profile(keep_checkpoints=1)
    write_run_file(tmp_path, small_profile(), None, "cpu")
    assert read_run_init(tmp_path) is None
    check_run_folder(
        tmp_path, small_profile(hidden=64), "hub/model"
    )  # nothing has been trained there
    (tmp_path / "metrics.jsonl").touch()
    check_run_folder(tmp_path, small_profile(), None)
    with pytest.raises(ValueError, match="hidden = 32, now it is 64"):
        check_run_folder(tmp_path, small_profile(hidden=64), None)
    with pytest.raises(ValueError, match="random weights, now from hub/model"):
        check_run_folder(tmp_path, small_profile(), "hub/model")


def test_a_setting_that_an_earlier_version_did_not_have_is_at_its_default(tmp_path):
    write_run_file(tmp_path, small_profile(), None, "cpu")
    record = json.loads((tmp_path / RUN_FILE).read_text())
    del record["profile"]["data"]["seed"]
    (tmp_path / RUN_FILE).write_text(json.dumps(record))
    (tmp_path / "metrics.jsonl").touch()
    assert read_run_profile(tmp_path) == small_profile()
    check_run_folder(tmp_path, small_profile(), None)
    with pytest.raises(ValueError, match="seed = 7, now it is 0"):
        check_run_folder(tmp_path, small_profile(seed=0), None)


def test_a_run_with_a_value_that_is_gone_can_be_read_and_not_continued(tmp_path):
    write_run_file(tmp_path, small_profile(), None, "cpu")
    record = json.loads((tmp_path / RUN_FILE).read_text())
    record["profile"]["data"]["document_borders"] = "positions"
    (tmp_path / RUN_FILE).write_text(json.dumps(record))
    (tmp_path / "metrics.jsonl").touch()
    assert read_run_profile(tmp_path).data.document_borders == "positions"
    with pytest.raises(
        ValueError, match=r"cannot be continued: document_borders 'positions' .* another run folder"
    ):
        check_run_folder(tmp_path, small_profile(), None)


def test_a_disk_without_room_for_a_name_still_has_the_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with RunLock(tmp_path) as lock:
        lock.acquire()
        with (
            RunLock(tmp_path) as other,
            pytest.raises(RunIsBusy, match="in use by another process"),
        ):
            other.acquire()
        assert lock.held
    assert list(tmp_path.iterdir()) == []


def _without(section):
    record = {
        "profile": small_profile().to_dict(),
        "init": "random weights",
        "runtime": "cpu",
        "identity": "a",
    }
    del record["profile"][section]
    return record


def _with(**fields):
    record = {
        "profile": small_profile().to_dict(),
        "init": "random weights",
        "runtime": "cpu",
        "identity": "a",
    }
    record["profile"]["model"] |= fields
    return record


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "Expecting value"),
        ("[]", "it holds no JSON object"),
        ("[" * 100_000, "it is nested too deep"),
        ("{}", "no text for 'init'"),
        (
            json.dumps({"init": "random weights", "runtime": "", "identity": "a"}),
            "mapping of fields; None is not",
        ),
        (json.dumps(_without("name")), "a profile needs the field 'name'"),
        (json.dumps(_without("clamp")), "a profile needs the field 'clamp'"),
        (json.dumps(_with(colour=1)), "a profile's model has no field 'colour'"),
        (json.dumps(_with(layers="2")), "field 'layers' is of type int; '2' is not"),
    ],
)
def test_a_run_file_that_is_cut_off_or_foreign_is_named_and_says_what_is_wrong(
    tmp_path, content, words
):
    (tmp_path / RUN_FILE).write_text(content)
    for read in (read_run_profile, read_run_init, run_identity):
        with pytest.raises(
            ValueError, match=rf"run\.json cannot be read \(.*{words}.*\); put back"
        ) as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_change_of_threads_or_micro_batches_is_noted_and_said_once(tmp_path, recwarn):
    def go_on(step, runtime, **changes):
        write_run_file(tmp_path, small_profile(**changes), None, runtime, step)
        return [str(recwarn.pop().message) for _ in range(len(recwarn))]

    assert go_on(0, "CPU, 4 threads · float32") == []
    assert go_on(0, "CPU, 2 threads · float32") == [], "nothing has been trained with the others"
    assert go_on(5, "CPU, 2 threads · float32") == []
    (said,) = go_on(5, "CPU, 1 thread · float32")
    assert (
        "from step 5 with CPU, 1 thread instead of CPU, 2 threads" in said and "float32" not in said
    )
    assert go_on(7, "CPU, 1 thread · float32") == []
    (said,) = go_on(9, "CPU, 1 thread · float32", micro_batch=2, grad_accumulation=2)
    assert "with 2 micro-batches of 2 windows instead of 1 micro-batches of 4 windows" in said
    record = json.loads((tmp_path / RUN_FILE).read_text())
    assert [
        (entry["step"], entry["runtime"][5], entry["micro_batch"])
        for entry in record["carried_out"]
    ] == [
        (0, "2", 4),
        (5, "1", 4),
        (9, "1", 2),
    ]
    write_run_file(
        tmp_path, small_profile(), None, "torchrun, 2 processes"
    )  # by who only starts others
    assert json.loads((tmp_path / RUN_FILE).read_text())["carried_out"] == record["carried_out"]
    go_on(6, "CPU, 1 thread · float32")  # from an earlier checkpoint
    assert [
        entry["step"] for entry in json.loads((tmp_path / RUN_FILE).read_text())["carried_out"]
    ] == [0, 5]


def test_micro_batches_may_change_while_a_step_stays(tmp_path):
    write_run_file(tmp_path, small_profile(), None, "cpu")
    (tmp_path / "metrics.jsonl").touch()
    check_run_folder(tmp_path, small_profile(micro_batch=1, grad_accumulation=4), None)
    for wrong in ({"micro_batch": 2}, {"grad_accumulation": 2}):
        with pytest.raises(
            ValueError, match=r"micro_batch × grad_accumulation = 4, now it is [28];"
        ):
            check_run_folder(tmp_path, small_profile(**wrong), None)


@pytest.mark.parametrize(
    "entries",
    [3, [3], [{}], [{"step": "1", "runtime": "", "micro_batch": 1, "grad_accumulation": 1}]],
)
def test_a_record_of_what_a_run_was_carried_out_on_that_is_none_is_named(tmp_path, entries):
    write_run_file(tmp_path, small_profile(), None, "cpu")
    record = json.loads((tmp_path / RUN_FILE).read_text())
    (tmp_path / RUN_FILE).write_text(json.dumps(record | {"carried_out": entries}))
    with pytest.raises(ValueError, match=r"run\.json cannot be read .*'carried_out'"):
        read_run_profile(tmp_path)
