"""What a full disk leads to: every place that writes names the file, in a sentence."""

from __future__ import annotations

import errno
import shutil

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from kl3m_nb import cli
from kl3m_nb.common.files import naming, replace_text, why
from kl3m_nb.data.sources import Document
from kl3m_nb.evaluation.tasks import _document_config
from kl3m_nb.figures import style
from kl3m_nb.growth import speedups
from kl3m_nb.profiles import get_profile
from kl3m_nb.runs.folder import write_run_file
from tests.conftest import files_up_to

LONG = pd.DataFrame({"x": np.arange(5000.0)})


def _figure(folder):
    figure = Figure()
    figure.subplots().plot(np.random.default_rng(0).random(3000))
    style.save_figure(figure, folder, "a", LONG)


def _documents(folder):
    _document_config([Document("a", "d", "long " * 5000)], folder)


def _comparison() -> speedups.GrowthComparison:
    never = speedups.Crossing(1.0, 1.0, 1.0)
    return speedups.GrowthComparison(1.0, LONG, LONG, None, never, never)


WRITERS = {
    "a.txt": lambda folder: replace_text(folder / "a.txt", "x" * 20_000),
    "durable.txt": lambda folder: replace_text(folder / "durable.txt", "x" * 20_000, durable=True),
    "losses.csv": lambda folder: _comparison().save(folder),
    "a.png": _figure,
    "": _documents,
    "run.json": lambda folder: write_run_file(folder, get_profile("tiny"), None, "x" * 20_000),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_names_its_file_on_a_full_disk_and_leaves_nothing_half_written(name, tmp_path):
    with files_up_to(1000), pytest.raises(OSError) as caught:
        WRITERS[name](tmp_path)
    assert caught.value.errno == errno.EFBIG and caught.value.filename.startswith(
        str(tmp_path / name)
    )
    assert why(caught.value).startswith(f"{tmp_path / name}") and "Errno" not in why(caught.value)
    assert not list(tmp_path.glob(".*"))


def test_the_command_line_says_which_file_the_full_disk_was_meant_to_take(
    trained_run, tmp_path, capsys
):
    source = tmp_path / "source"
    shutil.copytree(trained_run[1].checkpoint, source)
    with files_up_to(20_000):
        assert cli.main(["stack", str(source), str(tmp_path / "stack")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"kl3m_nb: {tmp_path / '.writing-stack-'}")
    assert "Errno" not in error and error.count("\n") == 1 and "File too large" in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_error_that_names_a_file_or_is_of_no_disk_stays_as_it_is(tmp_path):
    for error in (
        OSError(errno.ENOSPC, "full", "b"),
        OSError(errno.EMFILE, "too many"),
        OSError("ours"),
    ):
        before = error.filename
        with pytest.raises(OSError), naming(tmp_path / "a"):
            raise error
        assert error.filename == before
    assert (
        why(OSError("ours")) == "ours"
        and why(OSError(errno.ENOENT, "No such file", "b")) == "b: No such file."
    )
    copied = OSError(errno.ENOSPC, "No space left on device", "from", None, "to")
    assert why(copied).startswith("to: No space left on device; make room")
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "none").read_text()
    assert why(caught.value) == f"{tmp_path / 'none'}: No such file or directory."
