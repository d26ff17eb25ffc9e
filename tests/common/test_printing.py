from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kl3m_nb.common import printing
from kl3m_nb.runs.checkpoints import latest_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PRINTING_RUN = """
import sys
from tests.conftest import small_profile
from kl3m_nb.common import printing
from kl3m_nb.training.loop import train
printing.keep_printing()
def print_all(row):
    print(row)
    print(row, file=sys.stderr, flush=True)
train(small_profile(warmup_steps=9), sys.argv[1], callbacks=[print_all])
import warnings, logging
warnings.warn("said to nobody")
logging.getLogger("kl3m_nb").warning("nor this")
print("and this waits until Python ends", end="")
"""


def test_what_cannot_be_printed_is_dropped_and_said_when_there_is_room_again(monkeypatch):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # a pipe that is full refuses like a disk that is
    filling = 0
    with pytest.raises(BlockingIOError):
        while True:
            filling += os.write(writer, b"." * 4096)
    output = os.fdopen(writer, "w", encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", output)
    printing.keep_printing()
    for number in range(3):
        print("line", number, flush=True)
    assert len(os.read(reader, filling)) == filling
    print("§ fits again", flush=True)
    said, line, end = os.read(reader, 4096).decode().split("\n")
    assert "3 lines" in said and os.strerror(errno.EAGAIN) in said
    assert (line, end) == (r"\xa7 fits again", "")
    output.close()
    os.close(reader)


@pytest.mark.parametrize("where", ["a full disk", "a reader that ended", "nowhere"])
def test_a_run_is_not_ended_by_what_it_prints(tmp_path, where):
    command = [sys.executable, "-c", PRINTING_RUN, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if where == "nowhere":
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    if where == "a reader that ended":
        reader, output = os.pipe()
        os.close(reader)
    else:
        output = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(
        command, stdout=output, stderr=output, env=environment, cwd=ROOT, timeout=120
    )
    os.close(output)
    assert done.returncode == 0
    assert latest_checkpoint(tmp_path / "run").name == "step-000006"
