"""The stream a profile asks for, batches made ahead of time in a thread, and a rank's share of a
step.

Making batches ahead changes neither what is delivered nor the state: the state is the one behind
the batch that was given last.
"""

from __future__ import annotations

import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from kl3m_nb.common import distributed
from kl3m_nb.common.stopping import StopRequest
from kl3m_nb.data.segments import SegmentedStream
from kl3m_nb.data.sources import SourceReport
from kl3m_nb.data.windows import Batch, BatchStream, PackedStream, rank_share
from kl3m_nb.profiles import DataSpec

_LOOK_FOR_STOP_SECONDS = 0.2


class SourceBroke(RuntimeError):
    """A rank could not read the data of the next step, or read other data; the message says why,
    the cause is its own error.
    """


class Reading(NamedTuple):
    """What one run had read of its stream at a checkpoint."""

    data: DataSpec
    windows: int
    stream: dict  # the state of the stream behind these windows


class PrefetchedStream:
    """`stream` with up to `batches` batches made ahead by one thread, in pinned memory where there
    is a GPU.

    With 0 a batch is made when it is asked for. `stream` belongs to the thread from then on; ask
    this object for its state.
    """

    def __init__(self, stream: BatchStream, batches: int):
        self._stream, self._batches = stream, batches
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: deque[Future] = deque()
        self._windows = 0  # size of the batches being made
        self._delivered = stream.state_dict()
        self._epoch = stream.epoch

    @property
    def epoch(self) -> int:
        """Passes over the source that are complete, as of the batch given last."""
        return self._epoch

    @property
    def report(self) -> SourceReport:
        """What was read and what was left out, as of the batch given last."""
        report = SourceReport()
        report.load_state_dict(self._delivered["documents"]["report"])
        return report

    def take(self, windows: int, stop: StopRequest | None = None) -> Batch | None:
        """The next batch. Whatever goes wrong while it is made is raised here; the stream then
        stands behind the last one.

        None when `stop` is requested while the batch is waited for: a disk or a hub may not answer
        for hours.
        """
        if windows != self._windows:
            self.load_state_dict(self._delivered)
            self._windows = windows
        while len(self._ahead) < max(1, self._batches):
            self._ahead.append(self._thread.submit(self._make, windows))
        while not wait([self._ahead[0]], _LOOK_FOR_STOP_SECONDS).done:
            if stop is not None and stop.requested:
                return None
        if error := self._ahead[0].exception():
            self.load_state_dict(self._delivered)
            raise error
        batch, self._delivered, self._epoch = self._ahead.popleft().result()
        if self._batches:
            self._ahead.append(self._thread.submit(self._make, windows))
        return batch

    def state_dict(self) -> dict:
        """The state behind the batch given last."""
        return self._delivered

    def load_state_dict(self, state: dict) -> None:
        """Continues where `state` was taken; what was made ahead is forgotten."""
        self._forget_ahead()
        self._thread.submit(self._stream.load_state_dict, state).result()
        self._delivered, self._epoch, self._windows = state, self._stream.epoch, 0

    def close(self) -> None:
        """Ends the thread, which closes the files after the batch it is at; nothing
        waits for it.
        """
        self._forget_ahead()
        self._thread.submit(self._stream.close)
        self._thread.shutdown(wait=False)

    def _forget_ahead(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _make(self, windows: int) -> tuple[Batch, dict, int]:
        batch = self._stream.take(windows)
        if torch.cuda.is_available():
            batch = batch.pin_memory()
        return batch, self._stream.state_dict(), self._stream.epoch


def open_stream(spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> BatchStream:
    """The training stream of `spec`: dense windows or segments.

    Raises ValueError or FileNotFoundError for a source that cannot be opened.
    """
    return (PackedStream if spec.packing == "dense" else SegmentedStream)(spec, tokenizer)


class Share(NamedTuple):
    """One rank's part of a step."""

    micro_batches: list[Batch]
    valid_tokens: int  # labels of the whole step, all ranks
    routed_tokens: int  # positions of the whole step that are no padding, all ranks


def take_share(stream: PrefetchedStream, spec: DataSpec, stop: StopRequest) -> Share | None:
    """This rank's micro-batches of the next step, and what all ranks have together.

    None, on all ranks, when one is asked to stop before it has its batch. Raises SourceBroke, on
    all ranks, when one cannot read the step or has read another one than rank 0: of shares of
    different steps some windows would come twice and others never.
    """
    world, failure, batch = distributed.world(), None, None
    try:
        batch = stream.take(spec.micro_batch * spec.grad_accumulation, stop)
    except (OSError, ValueError, RuntimeError) as error:
        failure = error
    share = rank_share(batch, spec.micro_batch, world.rank, world.size) if batch else []
    counted = [
        sum(getattr(each, what) for each in share) for what in ("valid_tokens", "routed_tokens")
    ]
    digest = zlib.crc32(batch.input_ids.numpy()) if batch and world.size > 1 else 0
    mine = [*counted, failure is not None, batch is None, digest]
    valid, routed, broken, missing, digests = zip(*distributed.gather_numbers(mine), strict=True)
    if any(broken):
        reasons = distributed.gather(f"{type(failure).__name__}: {failure}")
        rank = broken.index(True)
        raise SourceBroke(
            f"process {rank}: {reasons[rank]}" if world.size > 1 else reasons[rank]
        ) from failure
    if any(missing):
        return None
    if other := [rank for rank in range(world.size) if digests[rank] != digests[0]]:
        raise SourceBroke(
            f"process {other[0]} has read other documents than process 0; give both the same files"
        )
    return Share(share, int(sum(valid)), int(sum(routed)))
