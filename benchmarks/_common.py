"""What benchmarks share: the machine and the versions they ran on, a clock, one way to show and to
keep a table.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def environment() -> dict[str, str]:
    """Date (UTC), hardware and versions of this run, each as a short text."""
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        gpu_text = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    else:
        gpu_text = "none"
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "gpu": gpu_text,
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
    }


def now() -> float:
    """Seconds by a clock, once a GPU that this process uses has done all it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def write_table(name: str, rows: Sequence[dict]) -> Path:
    """Print `rows` (all with the same keys) as a table and write them to
    `benchmarks/results/<name>.csv`.

    Every line of the file also carries the date, hardware and versions of `environment`. Floats
    keep four digits.
    """
    if not rows:
        raise ValueError(f"The table {name!r} has no rows; pass at least one.")
    if any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(
            f"The rows of table {name!r} have different columns; give every row the same keys."
        )
    surroundings = environment()
    lines = [{key: _cell(value) for key, value in row.items()} for row in rows]
    widths = {key: max(len(key), *(len(line[key]) for line in lines)) for key in lines[0]}
    print(", ".join(f"{key} {value}" for key, value in surroundings.items()))
    for line in [
        {key: key for key in widths},
        {key: "-" * width for key, width in widths.items()},
        *lines,
    ]:
        print("  ".join(line[key].ljust(width) for key, width in widths.items()).rstrip())
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*lines[0], *surroundings])
        writer.writeheader()
        writer.writerows(line | surroundings for line in lines)
    return path


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
