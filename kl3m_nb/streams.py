"""The stream a profile asks for, batches made ahead of time in a thread, and a rank's share of a step.

Making batches ahead changes neither what is delivered nor the state: the state is the one behind the batch that was given last.
"""

from __future__ import annotations

import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from transformers import PreTrainedTokenizerBase

from kl3m_nb import distributed
from kl3m_nb.packing import Batch, BatchStream, PackedStream, rank_share
from kl3m_nb.profiles import DataSpec
from kl3m_nb.segmentation import SegmentedStream
from kl3m_nb.sources import SourceReport


class SourceBroke(RuntimeError):
    """A rank could not read the data of the next step, or read other data; the message says why, the cause is its own error."""


class PrefetchedStream:
    """`stream` with up to `batches` batches made ahead by one thread, in pinned memory where there is a GPU.

    From then on `stream` belongs to the thread; ask this object for its state.
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

    def take(self, windows: int) -> Batch:
        """The next batch. Whatever goes wrong while it is made is raised here; the stream then stands behind the last one."""
        if windows != self._windows:
            self.load_state_dict(self._delivered)
            self._windows = windows
        while len(self._ahead) < self._batches:
            self._ahead.append(self._thread.submit(self._make, windows))
        if error := self._ahead[0].exception():
            self.load_state_dict(self._delivered)
            raise error
        batch, self._delivered, self._epoch = self._ahead.popleft().result()
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
        """Ends the thread, which closes the files after the batch it is at; nothing waits for it."""
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


def open_stream(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, prefetch_batches: int = 0) -> BatchStream | PrefetchedStream:
    """The training stream of `spec`: dense windows or segments, with `prefetch_batches` made ahead (0: none).

    Raises ValueError or FileNotFoundError for a source that cannot be opened.
    """
    stream = (PackedStream if spec.packing == "dense" else SegmentedStream)(spec, tokenizer)
    return PrefetchedStream(stream, prefetch_batches) if prefetch_batches else stream


def take_share(stream: BatchStream | PrefetchedStream, spec: DataSpec) -> tuple[list[Batch], int]:
    """This rank's micro-batches of the next step, and the valid labels of all ranks.

    Raises SourceBroke, on all ranks, when one cannot read the step or has read another one than rank 0: of shares of different
    steps some windows would come twice and others never.
    """
    world, failure, share, digest = distributed.world(), None, [], 0
    try:
        step = stream.take(spec.micro_batch * spec.grad_accumulation)
        share = rank_share(step, spec.micro_batch, world.rank, world.size)
        digest = zlib.crc32(step.input_ids.numpy()) if world.size > 1 else 0
    except (OSError, ValueError, RuntimeError) as error:
        failure = error
    valid_tokens = sum(micro_batch.valid_tokens for micro_batch in share)
    valid, broken, digests = zip(*distributed.gather_numbers([valid_tokens, failure is not None, digest]), strict=True)
    if any(broken):
        reasons = distributed.gather(f"{type(failure).__name__}: {failure}")
        rank = broken.index(True)
        raise SourceBroke(f"process {rank}: {reasons[rank]}" if world.size > 1 else reasons[rank]) from failure
    if other := [rank for rank in range(world.size) if digests[rank] != digests[0]]:
        raise SourceBroke(f"process {other[0]} has read other documents than process 0; give both the same files")
    return share, int(sum(valid))
