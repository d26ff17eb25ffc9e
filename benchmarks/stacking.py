"""How long does stacking take beside copying a file as large as its result, and how much memory?

    python benchmarks/stacking.py [--profile kl3m-007-500m] [--rounds 3] [--folder FOLDER]

The source is the profile's, with random weights; it lies in FOLDER, on whose disk everything is
measured. Stacking, with and without verification, takes turns with copying the stacked file (both
end with fsync, and the page cache is warm for both). Each stacking runs in a process of its own,
whose most resident memory above that of the imports is the extra memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import write_table

from kl3m_nb.growth.stacking import ORDERS, stack_checkpoint, verify_stack
from kl3m_nb.model import decoder
from kl3m_nb.profiles import PROFILES, get_profile, source_profile


def measure(source: Path, target: Path, factor: int, order: str, noise: float) -> dict[str, float]:
    before, began = peak_bytes(), time.perf_counter()
    stack_checkpoint(source, target, factor, order, noise)
    stacked = time.perf_counter()
    extra = peak_bytes() - before
    verify_stack(source, target)
    return {
        "stack": stacked - began,
        "verify": time.perf_counter() - stacked,
        "extra": extra,
        "extra of both": peak_bytes() - before,
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def in_a_process(*arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def copy_seconds(source: Path, target: Path) -> float:
    began = time.perf_counter()
    shutil.copyfile(source, target)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", choices=PROFILES, default="kl3m-007-500m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="default: the system's temporary folder")
    parser.add_argument(
        "--measure", nargs=5, metavar=("SOURCE", "TARGET", "FACTOR", "ORDER", "NOISE")
    )
    arguments = parser.parse_args()
    if arguments.measure:
        source, target, factor, order, noise = arguments.measure
        print(json.dumps(measure(Path(source), Path(target), int(factor), order, float(noise))))
        return
    profile = get_profile(arguments.profile)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        decoder.build_model(source_profile(profile)).save_pretrained(folder / "source")
        cases = [(order, 0.0) for order in ORDERS] + [("cyclic", 0.2)]
        rows = []
        for order, noise in cases:
            best: dict[str, float] = {}
            for _ in range(arguments.rounds):
                result = in_a_process(
                    folder / "source", folder / "stack", profile.growth_factor, order, noise
                )
                result["copy"] = copy_seconds(
                    folder / "stack" / "model.safetensors", folder / "copy"
                )
                best = {key: min(value, best.get(key, value)) for key, value in result.items()}
                size = (folder / "copy").stat().st_size
                shutil.rmtree(folder / "stack")
                (folder / "copy").unlink()
            rows.append(
                {
                    "order": order + (f", {noise:.0%} noise" if noise else ""),
                    "GB out": size / 1e9,
                    "copy s": best["copy"],
                    "stack s": best["stack"],
                    "stack / copy": best["stack"] / best["copy"],
                    "verify s": best["verify"],
                    "extra MB stacking": best["extra"] / 1e6,
                    "extra MB with verification": best["extra of both"] / 1e6,
                }
            )
        write_table("stacking", rows)


if __name__ == "__main__":
    main()
