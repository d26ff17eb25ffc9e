"""When a run's checkpoints are written: while training goes on, again before long after a failure,
at once when the run ends.

Rank 0 writes; the other ranks take part where shards are gathered, and where an error has to reach
all of them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kl3m_nb.common import distributed
from kl3m_nb.profiles import RuntimeSpec
from kl3m_nb.runs import checkpoints, folder
from kl3m_nb.runs.checkpoints import CheckpointFailed


class CheckpointSaver:
    """Saves the checkpoints of one run.

    `newest` is the one the run goes on from, if any. `on_written(counters, waited_seconds)` is
    called once for each that is on the disk, with the counters in it and the time that training
    waited for it. Where a step's state is asked for, `contents()` gives it and the card.
    """

    def __init__(
        self,
        run_dir: Path,
        identity: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        runtime: RuntimeSpec,
        newest: Path | None,
        on_written: Callable[[dict, float], None],
    ):
        self._run_dir, self._identity, self._model, self._tokenizer = (
            run_dir,
            identity,
            model,
            tokenizer,
        )
        self._runtime, self._newest, self._on_written = runtime, newest, on_written
        self._saved_step = checkpoints.checkpoint_step(newest) if newest else None
        self._retry_at: int | None = None
        self._waited_seconds = 0.0
        self._counters: dict = {}
        self._writer = checkpoints.BackgroundWriter()

    def newest(self, step: int) -> Path | None:
        """On rank 0, at `step`: the newest checkpoint, once what is being written is on the disk;
        None when there is none.
        """
        self._collect(step, waiting=True)
        return self._newest

    def is_due(self, step: int) -> bool:
        """On rank 0: whether a checkpoint was asked for through the run's folder, or one that
        failed is to be tried again.
        """
        self._collect(step)
        asked = folder.take_save_request(self._run_dir)
        retrying = self._retry_at is not None and step >= self._retry_at
        return (asked or retrying) and self._saved_step != step

    def save(self, step: int, contents: Callable[[], tuple[dict, str]]) -> None:
        """Copies everything to host memory and has it written in the background, once the
        checkpoint before is through.
        """
        began = time.perf_counter()
        if distributed.world().is_first:
            self._collect(step, waiting=True)
        state, card = contents()
        snapshot = checkpoints.take_snapshot(step, self._model, state)
        if snapshot is not None:
            keep = self._runtime.keep_checkpoints, self._runtime.keep_every
            arguments = (
                self._run_dir,
                snapshot,
                self._model,
                self._tokenizer,
                card,
                self._identity,
                *keep,
            )
            self._writer.start(checkpoints.write_checkpoint, *arguments)
            self._saved_step, self._retry_at, self._counters = step, None, state["counters"]
        self._waited_seconds = time.perf_counter() - began

    def save_and_wait(self, step: int, contents: Callable[[], tuple[dict, str]]) -> Path:
        """The checkpoint of `step`, on the disk when this returns. Raises CheckpointFailed on all
        ranks when it cannot be.
        """
        if distributed.on_first_rank(
            lambda: self._collect(step, waiting=True) or self._saved_step != step
        ):
            self.save(step, contents)
        return distributed.on_first_rank(self._written)

    def close(self) -> None:
        """Waits for what is being written."""
        self._writer.close()

    def _collect(self, step: int, waiting: bool = False) -> None:
        """Takes note of a checkpoint that has been written. When it failed, training goes on and
        tries again before long.
        """
        try:
            self._note(self._writer.collect(waiting))
        except CheckpointFailed as error:
            self._saved_step = None
            self._retry_at = step + max(1, self._runtime.checkpoint_every // 10)
            warnings.warn(
                f"{error} Training goes on; the next try is at step {self._retry_at}.", stacklevel=2
            )

    def _written(self) -> Path | None:
        self._note(self._writer.collect(waiting=True))
        return self._newest

    def _note(self, written: Path | None) -> None:
        if written is not None:
            self._newest = written
            self._on_written(self._counters, self._waited_seconds)
