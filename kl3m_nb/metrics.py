"""metrics.jsonl: one JSON object a line, the record every figure is drawn from.

Rows have a `kind`: `train` (a step), `held_out` (an evaluation), `clamp` (one event, its matrices as parallel lists), `experts`
(of a mixture, with each evaluation: the share of a layer's choices that each expert got in the step before), `checkpoint`,
`skipped`. A resumed run cuts the file back to where its checkpoint was written, so no step stands twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

FILE_NAME = "metrics.jsonl"


class MetricsLog:
    """Appends rows to a run's metrics.jsonl, each line written at once."""

    def __init__(self, run_dir: Path, position: int = 0):
        """Opens the file and drops what stands behind `position`, in bytes: what was logged after the checkpoint."""
        path = Path(run_dir) / FILE_NAME
        path.touch()
        if path.stat().st_size > position:
            os.truncate(path, position)
        self._file = open(path, "a", encoding="utf-8")

    @property
    def position(self) -> int:
        """Bytes written so far, for the training state."""
        return self._file.tell()

    def append(self, row: Mapping) -> None:
        """Writes one row; NaN and infinities become null, which every JSON reader takes."""
        self._file.write(json.dumps({key: _finite(value) for key, value in row.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(run_dir: str | Path, kind: str) -> pd.DataFrame:
    """The rows of one kind as a table; for `clamp` and `experts` a row per matrix or expert. Empty when there are none.

    A last line that was cut off by a crash is passed over.
    """
    path = Path(run_dir) / FILE_NAME
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row.pop("kind") == kind:
                rows.append(row)
    frame = pd.DataFrame(rows)
    if kind in ("clamp", "experts") and rows:
        lists = [column for column in frame.columns if isinstance(frame[column].iloc[0], list)]
        frame = frame.explode(lists, ignore_index=True).infer_objects()
    return frame
