from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from itertools import groupby

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kl3m_nb.data import corpus, loader
from kl3m_nb.data.windows import PackedStream, rank_share
from kl3m_nb.profiles import DataSpec
from tests.data.test_documents import Letters, saved_and_loaded
from tests.data.test_readers import write_rows

KINDS = ("parquet", "jsonl", "jsonl.gz", "jsonl.zst", "mirror", "hub", "package", "mixture")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same documents in every format; their tokens are distinct, so that a window tells where
    it comes from.
    """
    folder = tmp_path_factory.mktemp("rows")
    rows = [
        {"identifier": f"d{i}", "tokens": [1 + (37 * i + k * k) % 997 for k in range(1 + i % 23)]}
        for i in range(400)
    ]
    for suffix in ("parquet", "jsonl", "jsonl.gz", "jsonl.zst"):
        for number, part in enumerate((rows[:150], rows[150:])):
            write_rows(folder / suffix / f"train-{number}.{suffix}", part)
    return folder


@pytest.fixture(params=KINDS)
def spec(request, folder, monkeypatch):
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, **options: load_dataset(str(folder / "parquet"), **options),
    )
    source = {
        "mirror": f"hub:{folder}/parquet",
        "hub": "hub:owner/name",
        "package": "package:licensedcode-data",
        "mixture": f"0.6*files:{folder}/parquet/* + 0.4*files:{folder}/jsonl.gz/*",
    }.get(request.param, f"files:{folder}/{request.param}/*")
    return DataSpec(source=source, seq_len=15, shuffle_buffer=32, held_out_windows=1)


def _open(spec, workers=0):
    return loader.PrefetchedStream(loader.open_stream(spec, Letters()), batches=2 * workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_thousand_windows_after_a_resume_are_those_of_an_uninterrupted_stream(spec, workers):
    if spec.source.startswith(
        "package"
    ):  # a token a character: nothing of a text is left after a thousand short windows
        spec = dataclasses.replace(spec, seq_len=255)
    whole = _open(spec)
    for _ in range(37):
        whole.take(3)
    expected = torch.cat([whole.take(3).input_ids for _ in range(334)])
    interrupted = _open(spec, workers)
    for _ in range(37):
        interrupted.take(3)
    state = saved_and_loaded(interrupted.state_dict())
    resumed = _open(spec, workers)
    resumed.take(1)
    resumed.load_state_dict(state)
    assert torch.equal(torch.cat([resumed.take(3).input_ids for _ in range(334)]), expected)


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.booleans(), st.integers(1, 4)), min_size=1, max_size=6
    ),
    st.integers(1, 40),
)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_ranks_workers_and_batch_sizes_share_out_the_whole_stream(folder, changes, buffer):
    """A run that is stopped and goes on with another number of processes, thread and batch size,
    again and again.
    """
    spec = DataSpec(
        source=f"files:{folder}/parquet/*", seq_len=15, shuffle_buffer=buffer, held_out_windows=1
    )
    state, delivered = None, []
    for ranks_now, worker, windows in changes:
        ranks = [_open(spec, worker) for _ in range(ranks_now)]
        for stream in ranks:
            if state:
                stream.load_state_dict(state)
        for _ in range(3):
            steps = [stream.take(windows * ranks_now) for stream in ranks]
            shares = [rank_share(step, windows, rank, ranks_now) for rank, step in enumerate(steps)]
            delivered += [micro_batch.input_ids for share in shares for micro_batch in share]
        states = [_plain(saved_and_loaded(stream.state_dict())) for stream in ranks]
        assert all(other == states[0] for other in states)
        state = saved_and_loaded(ranks[-1].state_dict())
    found = torch.cat(delivered)
    assert torch.equal(found, _open(spec).take(len(found)).input_ids)
    once = _open(spec)
    once.take(len(found))
    assert _plain(state) == _plain(once.state_dict())


def _plain(state):
    """`state` with its tensors turned into lists, to be compared."""
    if isinstance(state, torch.Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return [_plain(value) for value in state] if isinstance(state, list | tuple) else state


@given(
    st.lists(st.integers(1, 40), min_size=30, max_size=60),
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(1, 150),
)
@settings(max_examples=25, deadline=None)
def test_every_document_read_is_in_a_window_or_still_in_the_state(
    tmp_path_factory, lengths, buffer, seq_len, windows
):
    """What was given, laid end to end, and what the state holds: each document of the source once a
    pass, closed by its end.
    """
    path = tmp_path_factory.mktemp("pass") / "a.jsonl"
    write_rows(
        path,
        [{"identifier": f"d{i}", "tokens": [1 + i] * length} for i, length in enumerate(lengths)],
    )
    spec = DataSpec(
        source=f"files:{path}", seq_len=seq_len, shuffle_buffer=buffer, held_out_windows=1
    )
    training = [
        tuple(document.tokens.tolist())
        for document in corpus.iterate_documents(spec.source, held_out=False)
    ]
    stream = PackedStream(spec, Letters())
    given = stream.next_batch(windows).flatten().tolist()
    state = stream.state_dict()
    laid_out = [*given, *state["rest"].tolist()]
    assert laid_out[-1] == 0
    found = Counter(
        tuple(tokens) for end, tokens in groupby(laid_out, key=lambda token: token == 0) if not end
    )
    found.update(tuple(tokens.tolist()) for tokens in state["documents"]["buffer"])
    (part,) = state["documents"]["parts"]
    assert found == Counter(training * part["epoch"] + training[: part["given"]])


def test_an_error_in_the_thread_is_raised_where_the_batch_is_asked_for(folder, monkeypatch):
    spec = DataSpec(source=f"files:{folder}/parquet/*", seq_len=15, held_out_windows=1)
    stream, plain = _open(spec, workers=1), _open(spec)
    assert torch.equal(stream.take(2).input_ids, plain.take(2).input_ids)
    original = PackedStream.take

    def broken(*_):
        raise OSError("the disk is gone")

    stream.load_state_dict(stream.state_dict())
    monkeypatch.setattr(PackedStream, "take", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        stream.take(2)
    monkeypatch.setattr(PackedStream, "take", original)
    assert torch.equal(stream.take(2).input_ids, plain.take(2).input_ids)
    assert stream.epoch == plain.epoch and stream.report == plain.report


def test_a_closed_stream_has_no_open_file(tmp_path):
    write_rows(
        tmp_path / "rows.jsonl",
        [{"identifier": f"d{i}", "tokens": [1 + i % 900, 2, 3]} for i in range(400)],
    )

    def opened() -> list[str]:
        names = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return [path for path in map(os.path.realpath, names) if path.startswith(str(tmp_path))]

    for workers in (0, 1):
        stream = _open(
            DataSpec(
                source=f"files:{tmp_path}/rows.jsonl",
                seq_len=15,
                shuffle_buffer=32,
                held_out_windows=1,
            ),
            workers,
        )
        stream.take(3)
        assert opened()
        stream.close()
        deadline = time.monotonic() + 20  # the thread ends by itself
        while opened() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not opened()
