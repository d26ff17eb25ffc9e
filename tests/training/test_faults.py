"""What goes wrong around a long run, tried: see docs/faults.md, which names the test of every
fault.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from kl3m_nb.common import stopping
from kl3m_nb.data import corpus, tokenizer
from kl3m_nb.data.documents import DocumentStream
from kl3m_nb.data.windows import PackedStream
from kl3m_nb.growth import stacking
from kl3m_nb.model import scoring
from kl3m_nb.optim import loss, objective, schedule
from kl3m_nb.optim.model_clamp import SpectralClamp
from kl3m_nb.optim.muon import Muon
from kl3m_nb.runs import checkpoints, metrics, saver
from kl3m_nb.runs.folder import (
    LOCK_FILE,
    RUN_FILE,
    SAVE_REQUEST,
    RunIsBusy,
    RunLock,
    has_checkpoints,
    read_run_profile,
    request_checkpoint,
)
from kl3m_nb.runs.metrics import read_metrics
from kl3m_nb.training import loop
from tests.conftest import at_step, files_up_to, small_profile

MIXTURE = {"experts": 4, "active_experts": 2, "router_aux_loss": 0.05}


def _weights(run_dir) -> dict[str, torch.Tensor]:
    return load_file(checkpoints.require_checkpoint(run_dir) / "model.safetensors")


def _assert_same_run(run_dir, other, but=()):
    """Bit for bit the same losses, of every step once, and the same weights; no row of the steps
    `but`.
    """
    ours, theirs = read_metrics(run_dir, "train"), read_metrics(other, "train")
    theirs = theirs[~theirs.step.isin(but)]
    assert list(ours.step) == list(theirs.step) and list(ours.loss) == list(theirs.loss)
    ours, theirs = _weights(run_dir), _weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def run_dir(trained_run, tmp_path):
    """A copy of a run of six steps with checkpoints at 3 and 6."""
    shutil.copytree(trained_run[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(("name", "model"), [("llama", {}), ("mixtral", MIXTURE)])
def test_twenty_kills_at_random_moments_change_nothing(warm_processes, tmp_path, name, model):
    profile = dict(
        max_steps=150,
        checkpoint_every=3,
        eval_every=50,
        clamp_every=7,
        grad_accumulation=2,
        micro_batch=2,
        **model,
    )
    answer = warm_processes.call(
        "kill_at_random", kills=20, seed=len(name), run_dir=str(tmp_path / "run"), profile=profile
    )
    assert answer["code"] == 0, (tmp_path / "run.log").read_text()
    assert len(answer["reached"]) == 20 and answer["reached"][-1] >= 30, answer
    assert warm_processes.train(1, tmp_path / "whole", profile) == [0]
    _assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("model", [{}, MIXTURE])
def test_a_stop_inside_an_accumulation_changes_nothing(tmp_path, monkeypatch, model):
    profile = small_profile(micro_batch=1, grad_accumulation=4, max_steps=4, **model)
    loop.train(profile, tmp_path / "whole")
    original, calls = objective.activation_penalty, []

    def stop_in_the_third_step(*arguments):
        calls.append(1)
        if len(calls) == 10:  # the second micro-batch of step 3
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(loss, "activation_penalty", stop_in_the_third_step)
    with pytest.raises(KeyboardInterrupt):
        loop.train(profile, tmp_path / "run")
    assert (
        len(calls) == 10 and checkpoints.latest_checkpoint(tmp_path / "run").name == "step-000002"
    )
    loop.train(profile, tmp_path / "run")
    _assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_checkpoint_on_demand(tmp_path):
    run_dir = tmp_path / "run"
    loop.train(
        small_profile(), run_dir, callbacks=[at_step(4, lambda: request_checkpoint(run_dir))]
    )
    assert [path.name for path in checkpoints.whole_checkpoints(run_dir)] == [
        "step-000003",
        "step-000004",
        "step-000006",
    ]
    assert not (run_dir / SAVE_REQUEST).exists()
    with pytest.raises(ValueError, match="no run folder"):
        request_checkpoint(tmp_path)


def _damage(checkpoint: Path, how: str) -> None:
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    if how == "cut off":
        weights.write_bytes(content[:-1])
    elif how == "a flipped bit":
        weights.write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
    elif how == "no manifest":
        (checkpoint / "training_state" / "manifest.json").unlink()
    else:
        manifest = checkpoint / "training_state" / "manifest.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "run": "another"}))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut off", "bytes instead of"),
        ("a flipped bit", "damaged"),
        ("no manifest", "no whole"),
        ("foreign", "another run"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    run_dir, trained_run, how, words
):
    _damage(run_dir / "checkpoints" / "step-000006", how)
    (run_dir / "checkpoints" / ".saving-step-000009-1").mkdir()
    with pytest.warns(UserWarning, match=f"step-000006.*{words}.*step-000006.damaged"):
        loop.train(small_profile(), run_dir)
    _assert_same_run(run_dir, trained_run[0])
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {"step-000003", "step-000006", "step-000006.damaged"}


@pytest.mark.parametrize("unread", ["model.safetensors", "manifest.json"])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_just_now_is_neither_set_aside_nor_passed_over(
    run_dir, monkeypatch, unread, number
):
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    metrics_before = (run_dir / "metrics.jsonl").read_bytes()
    opened = io.open

    def failing(file, *args, **kwargs):
        if str(file).endswith(f"step-000006/{unread}") or str(file).endswith(
            f"step-000006/training_state/{unread}"
        ):
            raise OSError(number, os.strerror(number), str(file))
        return opened(file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", failing)
        patch.setattr("io.open", failing)
        with pytest.raises(
            OSError,
            match=rf"step-000006.*{unread} could not be read \({os.strerror(number)}\).*try again",
        ):
            loop.train(small_profile(), run_dir)
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == names
    assert (run_dir / "metrics.jsonl").read_bytes() == metrics_before
    assert loop.train(small_profile(), run_dir).step == 6


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(run_dir):
    for name in ("step-000003", "step-000006"):
        _damage(run_dir / "checkpoints" / name, "a flipped bit")
    before = sorted((run_dir / "checkpoints").rglob("*"))
    with pytest.raises(ValueError, match=r"No checkpoint of .*step-000006.*damaged.*step-000003"):
        loop.train(small_profile(), run_dir)
    assert sorted((run_dir / "checkpoints").rglob("*")) == before


def _bytes(checkpoint: Path, name: str) -> int:
    return next(checkpoint.rglob(name)).stat().st_size


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
def test_a_disk_that_is_full_for_a_while_costs_no_step(tmp_path, trained_run, file, monkeypatch):
    weights, state = (
        _bytes(trained_run[1].checkpoint, name) for name in ("model.safetensors", "state.pt")
    )
    assert weights < state
    largest = weights - 1000 if file == "model.safetensors" else (weights + state) // 2
    limits = contextlib.ExitStack()

    failed, write = threading.Event(), checkpoints.write_checkpoint

    def noting(*arguments):
        try:
            return write(*arguments)
        finally:
            failed.set()

    def make_room():
        assert failed.wait(30), "the checkpoint of step 3 was not tried"
        limits.close()

    monkeypatch.setattr(checkpoints, "write_checkpoint", noting)
    full = [at_step(1, lambda: limits.enter_context(files_up_to(largest))), at_step(4, make_room)]
    with (
        limits,
        pytest.warns(UserWarning, match=r"step-000003 could not be written.*next try is at step"),
    ):
        loop.train(small_profile(), tmp_path / "run", callbacks=full)
    _assert_same_run(tmp_path / "run", trained_run[0])
    assert checkpoints.whole_checkpoints(tmp_path / "run")[0].name in ("step-000004", "step-000005")


def test_a_disk_that_stays_full_ends_the_run_with_a_word_and_whole_checkpoints(
    tmp_path, trained_run
):
    limits = contextlib.ExitStack()

    def fill():
        deadline = time.monotonic() + 30
        while not (
            tmp_path / "run" / "checkpoints" / "step-000003"
        ).exists():  # it is written in the background
            assert time.monotonic() < deadline, "the checkpoint of step 3 was not written"
            time.sleep(0.01)
        limits.enter_context(files_up_to(60_000))

    with (
        limits,
        pytest.raises(checkpoints.CheckpointFailed, match="step-000006 could not be written"),
    ):
        loop.train(small_profile(), tmp_path / "run", callbacks=[at_step(4, fill)])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    loop.train(small_profile(), tmp_path / "run")
    _assert_same_run(tmp_path / "run", trained_run[0])


def test_too_little_room_is_seen_before_the_disk_is_full(run_dir, monkeypatch):
    (run_dir / "checkpoints" / "step-000006").rename(run_dir / "gone")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    )
    with pytest.raises(checkpoints.CheckpointFailed, match=r"needs 0.00 GB and 0.00 GB are free"):
        loop.train(small_profile(), run_dir)


def test_a_disk_that_is_full_while_logging_costs_no_row(tmp_path, trained_run):
    path = tmp_path / "run" / "metrics.jsonl"
    saved = []

    def the_log() -> int:
        return next(
            int(fd)
            for fd in os.listdir("/proc/self/fd")
            if os.path.realpath(f"/proc/self/fd/{fd}") == str(path.resolve())
        )

    def fill():
        number = the_log()
        saved.extend([number, os.dup(number)])
        with open("/dev/full", "ab") as full:
            os.dup2(full.fileno(), number)

    with pytest.warns(
        UserWarning, match=r"metrics.jsonl cannot be written: No space left on device; rows wait"
    ):
        loop.train(
            small_profile(),
            tmp_path / "run",
            callbacks=[at_step(2, fill), at_step(5, lambda: os.dup2(saved[1], saved[0]))],
        )
    os.close(saved[1])
    _assert_same_run(tmp_path / "run", trained_run[0])


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for folder in (
        tmp_path / "file" / "run",
        Path("/proc/kl3m-nb/run"),
    ):  # permissions do not stop root, these do
        with pytest.raises(ValueError, match="cannot be written to"):
            loop.train(small_profile(), folder)


def test_a_folder_that_becomes_read_only_is_a_failed_checkpoint_with_its_reason(
    tmp_path, monkeypatch
):
    """A remount cannot be tried without rights; the system's refusal to make the folder is put in
    its place.
    """
    original = Path.mkdir

    def refused(self, *arguments, **options):
        if self.name.startswith(".saving-"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refused)
    with (
        pytest.warns(UserWarning, match="Read-only file system"),
        pytest.raises(checkpoints.CheckpointFailed, match="Read-only"),
    ):
        loop.train(small_profile(), tmp_path / "run")
    assert len(read_metrics(tmp_path / "run", "train")) == 6


def _cut_within_row(path: Path, step: int) -> None:
    """Leaves of a metrics.jsonl what stands before the row of `step`, and the beginning of that
    row.
    """
    lines = path.read_bytes().split(b"\n")
    kept = next(
        number
        for number, line in enumerate(lines)
        if b'"step": %d' % step in line and b'"train"' in line
    )
    path.write_bytes(b"\n".join(lines[:kept]) + b"\n" + lines[kept][:40])


def test_a_metrics_file_cut_in_the_middle_of_a_line(run_dir, trained_run):
    """The rows since the checkpoint before travel in a checkpoint and are put back."""
    shutil.rmtree(run_dir / "checkpoints" / "step-000006")
    _cut_within_row(run_dir / "metrics.jsonl", 2)
    assert list(read_metrics(run_dir, "train").step) == [1]
    loop.train(small_profile(), run_dir)
    _assert_same_run(run_dir, trained_run[0])
    assert list(read_metrics(run_dir, "held_out").step) == [0, 3, 6]


def test_a_metrics_file_that_has_lost_more_than_a_checkpoint_holds_says_so(tmp_path, trained_run):
    profile = small_profile(max_steps=9)
    loop.train(profile, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000009")
    _cut_within_row(tmp_path / "run" / "metrics.jsonl", 2)
    with pytest.warns(UserWarning, match="has lost its end"):
        loop.train(profile, tmp_path / "run")
    assert list(read_metrics(tmp_path / "run", "train").step) == [1, 4, 5, 6, 7, 8, 9]


def test_a_kill_while_the_disk_of_the_log_is_full_costs_no_row_of_a_saved_step(
    tmp_path, trained_run, monkeypatch
):
    """The checkpoints lie on another disk, behind a link."""

    def full(log, *_):
        if log._waiting.count(b"\n") > 0 and log.position > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        log._waiting = log._waiting[log._file.write(log._waiting) :]

    def killed():
        raise SystemExit(9)  # as far as the files go: nothing more is written

    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsLog, "_write", full)
        with pytest.warns(UserWarning, match="rows wait in memory"), pytest.raises(SystemExit):
            loop.train(
                small_profile(checkpoint_every=2), tmp_path / "run", callbacks=[at_step(5, killed)]
            )
    assert (
        len(read_metrics(tmp_path / "run", "train")) < 4
        and checkpoints.latest_checkpoint(tmp_path / "run").name == "step-000004"
    )
    loop.train(small_profile(checkpoint_every=2), tmp_path / "run")
    _assert_same_run(tmp_path / "run", trained_run[0])
    assert list(read_metrics(tmp_path / "run", "held_out").step) == [0, 3, 6]


def test_a_lock_that_is_removed_is_made_anew_and_keeps_the_others_out(tmp_path, trained_run):
    path, refused = tmp_path / "run" / LOCK_FILE, []

    def second():
        with pytest.raises(RunIsBusy), RunLock(tmp_path / "run") as lock:
            lock.acquire()
        refused.append(True)

    with pytest.warns(UserWarning, match=r"run\.lock was removed while this process held it"):
        loop.train(
            small_profile(),
            tmp_path / "run",
            callbacks=[at_step(3, path.unlink), at_step(5, second)],
        )
    assert refused
    _assert_same_run(tmp_path / "run", trained_run[0])


def test_a_process_whose_lock_another_one_has_writes_no_more(tmp_path):
    run_dir, other = tmp_path / "run", RunLock(tmp_path / "run")

    def taken():
        other.path.unlink()
        other.acquire()
        seen.update(_contents(run_dir))

    seen: dict[str, bytes] = {}
    with (
        other,
        pytest.raises(
            loop.TrainingStopped,
            match=r"after step 4, and this process writes no more.*in use by process",
        ),
    ):
        loop.train(small_profile(checkpoint_every=100), run_dir, callbacks=[at_step(4, taken)])
    assert (
        _contents(run_dir).items()
        >= {name: seen[name] for name in seen if name != LOCK_FILE}.items()
    )
    assert _contents(run_dir).keys() <= seen.keys()


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_second_process_on_the_same_folder_is_refused(warm_processes, tmp_path):
    codes, folder = [], tmp_path / "run"

    def second():
        codes.extend(warm_processes.train(1, folder, {}))

    loop.train(small_profile(), folder, callbacks=[at_step(2, second)])
    assert (
        codes == [1] and f"in use by process {os.getpid()} on" in (tmp_path / "run.log").read_text()
    )
    assert len(read_metrics(folder, "train")) == 6
    assert not (folder / LOCK_FILE).exists()


def test_the_lock_of_a_killed_process_is_recognised(warm_processes, tmp_path, trained_run):
    assert warm_processes.train(
        1, tmp_path / "run", {}, {"rank": 0, "call": 5, "kind": "kill"}
    ) == [-signal.SIGKILL]
    assert (tmp_path / "run" / LOCK_FILE).exists()
    with pytest.warns(UserWarning, match=r"process \d+ on .* was killed; its lock is taken over"):
        loop.train(small_profile(), tmp_path / "run")
    _assert_same_run(tmp_path / "run", trained_run[0])


def test_a_gradient_that_is_not_a_number_is_skipped(tmp_path, monkeypatch):
    """Only the gradient is poisoned, the loss is finite: the step changes neither weights nor
    optimizers.
    """
    original, calls = objective.activation_penalty, []

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.nan

    def poisoned(residual, *rest):
        calls.append(1)
        penalty = original(residual, *rest)
        return Poison.apply(penalty) if len(calls) == 3 else penalty

    monkeypatch.setattr(loss, "activation_penalty", poisoned)
    loop.train(small_profile(max_steps=4, clamp_every=0), tmp_path / "run")
    train = read_metrics(tmp_path / "run", "train")
    assert list(train.skipped) == [False, False, True, False] and train.loss.notna().all()
    assert all(torch.isfinite(weight).all() for weight in _weights(tmp_path / "run").values())


class _HubGone:
    """Documents until the connection breaks, as a stream from the hub does when its retries are
    used up.
    """

    def __init__(self, after: int):
        self.left = after
        self.original = DocumentStream._read

    def __call__(self, stream):
        if self.left == 0:
            raise ConnectionError("Server Disconnected")
        self.left -= 1
        return self.original(stream)


def test_a_hub_that_is_gone_in_mid_stream_ends_the_run_with_nothing_lost(tmp_path, monkeypatch):
    profile = small_profile(seq_len=64, micro_batch=8, max_steps=20)
    loop.train(profile, tmp_path / "whole")
    with monkeypatch.context() as patch:
        gone = _HubGone(after=35)  # 32 fill the shuffle buffer
        patch.setattr(DocumentStream, "_read", lambda stream: gone(stream))
        with pytest.raises(
            loop.TrainingStopped, match=r"data of step \d+ .*ConnectionError: Server Disconnected"
        ):
            loop.train(profile, tmp_path / "run")
    reached = int(read_metrics(tmp_path / "run", "train").step.max())
    assert 0 < reached < 20
    assert checkpoints.checkpoint_step(checkpoints.require_checkpoint(tmp_path / "run")) == reached
    loop.train(profile, tmp_path / "run")
    _assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("batches", [0, 2])
def test_a_stop_while_the_data_do_not_come_saves_the_last_whole_step(
    tmp_path, monkeypatch, batches
):
    profile = small_profile(max_steps=8, prefetch_batches=batches)
    loop.train(profile, tmp_path / "whole")
    take, taken, came, hanging = PackedStream.take, [], [], threading.Event()

    def hang_at_the_sixth(stream, windows):
        taken.append(windows)
        if len(taken) == 6:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            hanging.wait(60)
            came.append(len(taken))
        return take(stream, windows)

    with monkeypatch.context() as patch:
        patch.setattr(PackedStream, "take", hang_at_the_sixth)
        with pytest.raises(KeyboardInterrupt):
            loop.train(profile, tmp_path / "run")
        assert not came, "the stop waited for the data"
        hanging.set()
    assert checkpoints.latest_checkpoint(tmp_path / "run").name == "step-000005"
    loop.train(profile, tmp_path / "run")
    _assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_corrupt_parquet_file_ends_the_run_with_nothing_lost(tmp_path):
    texts = [
        document.text
        for document in corpus.preview("package:licensedcode-data", held_out=False, most=200)
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(2):
        half = [text[:200] for text in texts[number * 100 : number * 100 + 100]]
        table = pa.table({"identifier": [f"{number}{i}-x" for i in range(len(half))], "text": half})
        pq.write_table(table, folder / f"{number}.parquet")
    whole = (folder / "1.parquet").read_bytes()
    (folder / "1.parquet").write_bytes(whole[:300] + b"\0" * 4000 + whole[4300:])
    profile = small_profile(
        source=f"files:{folder}/*.parquet",
        tokenizer=str(_saved_tokenizer(tmp_path)),
        max_steps=60,
        held_out_windows=1,
    )
    with pytest.raises(loop.TrainingStopped, match=r"data of step \d+ could not be read"):
        loop.train(profile, tmp_path / "run")
    reached = int(read_metrics(tmp_path / "run", "train").step.max())
    assert (
        checkpoints.checkpoint_step(checkpoints.require_checkpoint(tmp_path / "run")) == reached > 0
    )
    (folder / "1.parquet").write_bytes(whole)
    loop.train(profile, tmp_path / "run")
    loop.train(profile, tmp_path / "whole")
    _assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_goes_on_without_a_damaged_file_and_each_way_to_leave_it_out_gives_the_same(
    tmp_path, caplog
):
    texts = [
        document.text[:200]
        for document in corpus.preview("package:licensedcode-data", held_out=False, most=180)
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        rows = pa.table(
            {
                "identifier": [f"{number}{i}-x" for i in range(60)],
                "text": texts[number * 60 : number * 60 + 60],
            }
        )
        pq.write_table(rows, folder / f"{number}.parquet", row_group_size=20, use_dictionary=False)
    damaged = folder / "1.parquet"
    chunk, content = (
        pq.ParquetFile(damaged).metadata.row_group(1).column(1),
        bytearray(damaged.read_bytes()),
    )
    at = chunk.data_page_offset + chunk.total_compressed_size // 2
    content[at : at + 64] = bytes(byte ^ 255 for byte in content[at : at + 64])
    damaged.write_bytes(bytes(content))

    def profile(names: str):
        return small_profile(
            source=f"files:{folder}/{names}",
            tokenizer=str(_saved_tokenizer(tmp_path)),
            max_steps=60,
            held_out_windows=1,
        )

    with pytest.raises(loop.TrainingStopped, match=r"1\.parquet is .*damaged.*skip=1\.parquet"):
        loop.train(profile("*.parquet"), tmp_path / "run")
    reached = int(read_metrics(tmp_path / "run", "train").step.max())
    assert 0 < reached < 60
    runs = [("skip", "*.parquet(skip=1.parquet)"), ("glob", "[02].parquet"), ("moved", "*.parquet")]
    for name, source in runs:
        shutil.copytree(tmp_path / "run", tmp_path / name)
        if name == "moved":
            damaged.unlink()
        caplog.clear()
        assert loop.train(profile(source), tmp_path / name).step == 60
        assert "1.parquet is gone since the run stopped" in caplog.text
        assert read_run_profile(tmp_path / name).data.source == f"files:{folder}/{source}"
    _assert_same_run(tmp_path / "skip", tmp_path / "glob")
    _assert_same_run(tmp_path / "skip", tmp_path / "moved")
    other = profile("*.parquet(min_tokens=2)")
    with pytest.raises(ValueError, match="from which files may be left out"):
        loop.train(other, tmp_path / "moved")


def _saved_tokenizer(folder: Path) -> Path:
    from kl3m_nb.data.tokenizer import load_tokenizer

    load_tokenizer("corpus", "package:licensedcode-data", 512).save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def test_a_second_sigterm_at_once_is_the_same_request_a_later_one_interrupts(
    tmp_path, monkeypatch, trained_run
):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        loop.train(small_profile(), tmp_path / "run", callbacks=[at_step(4, twice)])
    assert checkpoints.latest_checkpoint(tmp_path / "run").name == "step-000004"
    monkeypatch.setattr(stopping.StopRequest, "SAME_REQUEST_SECONDS", 0.0)

    def later():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        loop.train(small_profile(), tmp_path / "run", callbacks=[at_step(5, later)])
    assert checkpoints.latest_checkpoint(tmp_path / "run").name == "step-000004", (
        "nothing is saved after the second, nothing lost"
    )
    loop.train(small_profile(), tmp_path / "run")
    _assert_same_run(tmp_path / "run", trained_run[0])


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU])
def test_other_signals_to_stop_save_and_may_come_again(tmp_path, monkeypatch, trained_run, number):
    """A batch system sends SIGXCPU every second from then on."""
    monkeypatch.setattr(stopping.StopRequest, "SAME_REQUEST_SECONDS", 0.0)
    before = signal.signal(number, signal.SIG_DFL)  # a hangup is ignored below nohup
    try:
        _stop_again_and_again(tmp_path, number)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    loop.train(small_profile(), tmp_path / "run")
    _assert_same_run(tmp_path / "run", trained_run[0])


def _stop_again_and_again(tmp_path, number):
    def again_and_again():
        for _ in range(3):
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt, match="step 4 is saved"):
        loop.train(small_profile(), tmp_path / "run", callbacks=[at_step(4, again_and_again)])


def test_a_system_that_gives_no_more_threads_costs_no_checkpoint(tmp_path, monkeypatch):
    def none_left(*_):
        raise RuntimeError("can't start new thread")

    def stop():
        monkeypatch.setattr(threading.Thread, "start", none_left)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt, match="step 2 is saved"):
        loop.train(
            small_profile(clamp_every=0), tmp_path / "run", callbacks=[at_step(2, stop)]
        )  # a clamp asks for some
    assert checkpoints.latest_checkpoint(tmp_path / "run").name == "step-000002"


def test_a_run_that_is_to_outlive_its_terminal_is_not_stopped_by_its_end(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        result = loop.train(
            small_profile(),
            tmp_path / "run",
            callbacks=[at_step(2, lambda: os.kill(os.getpid(), signal.SIGHUP))],
        )
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result.step == 6


def test_a_clock_that_is_set_back_changes_nothing(run_dir, trained_run, monkeypatch):
    """Newer checkpoints look older, and every look at the clock shows an earlier time."""
    shutil.rmtree(run_dir / "checkpoints" / "step-000006")
    now = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    os.utime(run_dir / "checkpoints" / "step-000003", (1, 1))

    def stop_with_an_old_checkpoint():
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        loop.train(small_profile(), run_dir, callbacks=[at_step(5, stop_with_an_old_checkpoint)])
    for path in (run_dir / "checkpoints" / "step-000005").rglob("*"):
        os.utime(path, (0, 0))
    loop.train(small_profile(), run_dir)
    _assert_same_run(run_dir, trained_run[0])
    assert (read_metrics(run_dir, "train").tokens_per_second > 0).all()


def test_memory_files_and_threads_do_not_grow_with_checkpoints_clamps_and_resumes(tmp_path):
    """The short form of benchmarks/soak.py."""

    def counts() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    seen = []
    for resume in range(5):
        stop = at_step(4 * (resume + 1), lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            loop.train(
                small_profile(max_steps=60, checkpoint_every=1, eval_every=50),
                tmp_path / "run",
                callbacks=[stop],
            )
        seen.append(counts())
    deadline = time.monotonic() + 20
    while (counts()[0] > seen[1][0] or counts()[1] > seen[1][1]) and time.monotonic() < deadline:
        time.sleep(0.01)  # threads that nobody waits for end by themselves
    assert counts()[0] <= seen[1][0] and counts()[1] <= seen[1][1]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3


def _lose(run_dir: Path, how: str) -> None:
    if how == "moved away":
        (run_dir / "checkpoints").rename(run_dir.parent / "moved")
    else:
        (run_dir / "checkpoints").rename(run_dir.parent / "disk")
        (run_dir / "checkpoints").symlink_to(run_dir.parent / "not mounted")


@pytest.mark.parametrize("how", ["moved away", "behind a link to a disk that is not mounted"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_whose_checkpoints_are_out_of_sight_is_not_begun_anew(
    run_dir, tmp_path, how, resumed
):
    if resumed:  # from step 3, of which the log knew only behind the place it is cut back to
        shutil.rmtree(run_dir / "checkpoints" / "step-000006")
        with pytest.raises(KeyboardInterrupt):
            loop.train(
                small_profile(),
                run_dir,
                callbacks=[at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))],
            )
        shutil.rmtree(run_dir / "checkpoints" / "step-000004")
    saved = 4 if resumed else 6
    before = (run_dir / "metrics.jsonl").read_bytes()
    _lose(run_dir, how)
    with pytest.raises(
        ValueError,
        match=(
            f"has saved step {saved} and no checkpoint is there.*put its checkpoints back, or move"
        ),
    ):
        loop.train(small_profile(), run_dir)
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_a_lost_run_file_is_asked_for_and_each_checkpoint_has_a_copy(run_dir, trained_run):
    shutil.rmtree(run_dir / "checkpoints" / "step-000006")
    for lose in (lambda path: path.unlink(), lambda path: path.write_text("")):
        lose(run_dir / RUN_FILE)
        copy = run_dir / "checkpoints" / "step-000003" / "training_state" / "run.json"
        with pytest.raises(
            ValueError, match=rf"run\.json.*put back a copy of it, such as {copy}\.$"
        ):
            loop.train(small_profile(base_lr=0.05), run_dir)
        shutil.copy(copy, run_dir)
    loop.train(small_profile(), run_dir)
    _assert_same_run(run_dir, trained_run[0])


def test_the_copy_that_is_offered_is_that_of_a_checkpoint_which_counts(run_dir):
    (run_dir / "checkpoints" / "step-000006").rename(
        run_dir / "checkpoints" / "step-000006.damaged"
    )
    (run_dir / RUN_FILE).unlink()
    with pytest.raises(ValueError, match=r"such as \S+/step-000003/training_state/run\.json"):
        loop.train(small_profile(), run_dir)


def test_a_disk_that_is_full_when_the_tokenizer_comes_is_a_failed_checkpoint(
    tmp_path, trained_run, monkeypatch
):
    """The tokenizers library then raises an `Exception` without a class of its own."""
    original, tries = (
        type(tokenizer.read_tokenizer(str(trained_run[1].checkpoint))).save_pretrained,
        [],
    )

    def full_at_first(self, folder, *arguments, **options):
        tries.append(folder)
        if len(tries) == 1:
            raise Exception("No space left on device (os error 28)")
        return original(self, folder, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full_at_first)
    with pytest.warns(
        UserWarning,
        match=r"step-000003 could not be written.*No space left on device.*next try is at step",
    ):
        loop.train(small_profile(), tmp_path / "run")
    _assert_same_run(tmp_path / "run", trained_run[0])


def test_a_source_that_has_grown_does_not_change_the_tokenizer_of_a_run(tmp_path):
    texts = [
        f"{document.text}\n"
        for document in corpus.iterate_documents("package:licensedcode-data", held_out=False)
    ][:60]
    source = tmp_path / "texts"
    source.mkdir()
    (source / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    profile = small_profile(source=f"files:{source}/*.jsonl", held_out_windows=2)
    with pytest.raises(KeyboardInterrupt):
        loop.train(
            profile,
            tmp_path / "run",
            callbacks=[at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))],
        )
    entries = tokenizer.read_tokenizer(
        str(checkpoints.latest_checkpoint(tmp_path / "run"))
    ).get_vocab()
    (source / "b.jsonl").write_text(
        "".join(json.dumps({"text": text[::-1]}) + "\n" for text in texts)
    )
    assert tokenizer.load_tokenizer("corpus", profile.data.source, 512).get_vocab() != entries
    result = loop.train(profile, tmp_path / "run")
    assert (
        result.step == 6 and tokenizer.read_tokenizer(str(result.checkpoint)).get_vocab() == entries
    )


def test_data_that_are_not_there_at_the_first_step_leave_no_checkpoint(tmp_path, monkeypatch):
    def broken(self, windows):
        raise ValueError("no document is long enough")

    monkeypatch.setattr(PackedStream, "take", broken)
    with pytest.raises(
        loop.TrainingStopped,
        match=r"has not begun: the data of step 1 .*long enough.*another run folder",
    ):
        loop.train(small_profile(), tmp_path / "run")
    assert not has_checkpoints(tmp_path / "run")
    monkeypatch.undo()
    assert loop.train(small_profile(), tmp_path / "run").step == 6


def test_a_stack_that_was_made_anew_is_not_taken_for_the_one_a_run_began_with(
    trained_run, tmp_path
):
    stack, profile = tmp_path / "stack", small_profile(layers=4, growth_factor=2)
    stacking.stack_checkpoint(trained_run[1].checkpoint, stack, 2)
    loop.train(profile, tmp_path / "run", init=stack)
    shutil.rmtree(stack)
    assert (
        loop.train(profile, tmp_path / "run", init=stack).step == 6
    )  # what a run began with may be gone
    stacking.stack_checkpoint(trained_run[1].checkpoint, stack, 2, order="interpolated")
    with pytest.raises(
        ValueError,
        match=(
            r"another stack than .* its order was 'cyclic' and is 'interpolated'; use another run"
        ),
    ):
        loop.train(profile, tmp_path / "run", init=stack)
    (stack / "stack.json").write_text("")  # a run that has begun does not need it
    assert loop.train(profile, tmp_path / "run", init=stack).step == 6
    shutil.rmtree(stack)
    stacking.stack_checkpoint(trained_run[1].checkpoint, stack, 2)
    assert loop.train(profile, tmp_path / "run", init=stack).step == 6


def _fail(monkeypatch, owner, name: str, step: int, changed_before=None) -> None:
    """Has a part of the run fail once behind `step`, and when `changed_before` after it has changed
    what it changes.
    """
    original, run, failed = getattr(owner, name), [], []
    began = loop.Trainer.__init__
    monkeypatch.setattr(
        loop.Trainer,
        "__init__",
        lambda self, *arguments: (run.append(self), began(self, *arguments))[1],
    )

    def failing(*arguments):
        if run[-1].state.counters.step != step or failed:
            return original(*arguments)
        failed.append(step)
        if changed_before:
            original(*arguments)
        raise LookupError("nobody expected this")

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize(
    ("owner", "name", "step"),
    [
        (saver.CheckpointSaver, "is_due", 4),
        (saver.CheckpointSaver, "save", 3),
        (loop.Trainer, "_forward_backward", 5),
        (loop, "take_share", 4),
        (loop, "lr_factor", 4),
        (loop, "global_norm", 4),
        (metrics.MetricsLog, "append", 4),
        (metrics.MetricsLog, "append", 5),
        (loop.Trainer, "_clamp", 4),
        (scoring, "held_out_loss", 3),
        (scoring, "held_out_loss", 6),
        (loop, "tell", 4),
    ],
)
def test_an_unexpected_error_between_two_steps_saves_the_last_whole_one(
    tmp_path, trained_run, monkeypatch, owner, name, step
):
    with monkeypatch.context() as patch:
        _fail(patch, owner, name, step)
        with pytest.raises(
            loop.TrainingStopped,
            match=r"LookupError: nobody expected this \(test_faults.py, line \d+\)",
        ) as told:
            loop.train(small_profile(), tmp_path / "run")
    assert isinstance(told.value.__cause__, LookupError)
    assert checkpoints.latest_checkpoint(tmp_path / "run").name == f"step-{step:06d}"
    assert loop.train(small_profile(), tmp_path / "run").step == 6
    _assert_same_run(tmp_path / "run", trained_run[0], but=[step] if name == "append" else [])
    assert list(read_metrics(tmp_path / "run", "held_out").step) == [0, 3, 6]


@pytest.mark.parametrize(
    ("owner", "name"), [(Muon, "step"), (SpectralClamp, "clamp"), (schedule.AdaptiveClip, "clip_")]
)
def test_an_unexpected_error_while_the_weights_change_saves_nothing(
    tmp_path, trained_run, monkeypatch, owner, name
):
    with monkeypatch.context() as patch:
        _fail(patch, owner, name, 4, changed_before=True)
        with pytest.raises(LookupError):
            loop.train(small_profile(), tmp_path / "run")
    assert checkpoints.latest_checkpoint(tmp_path / "run").name == "step-000003"
    loop.train(small_profile(), tmp_path / "run")
    _assert_same_run(tmp_path / "run", trained_run[0])
