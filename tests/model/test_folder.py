"""Folders that are written whole or not at all, and can be read by whoever may read other new
folders.
"""

from __future__ import annotations

import os
import stat

import pytest

from kl3m_nb.common import files
from kl3m_nb.data import tokenizer
from kl3m_nb.growth import stacking


def _mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_stacks_and_tokenizers_have_the_mode_of_any_new_folder(
    trained_run, tmp_path, monkeypatch, umask
):
    monkeypatch.setenv("KL3M_NB_CACHE", str(tmp_path / "cache"))
    before = os.umask(umask)
    try:
        stacking.stack_checkpoint(trained_run[1].checkpoint, tmp_path / "stack", factor=2)
        tokenizer.load_tokenizer("corpus", "package:licensedcode-data", 400)
    finally:
        os.umask(before)
    [trained] = (tmp_path / "cache" / "tokenizers").iterdir()
    assert _mode(tmp_path / "stack") == _mode(trained) == 0o777 & ~umask


def test_a_folder_appears_with_its_last_file_or_not_at_all(tmp_path):
    with files.written_whole(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b", "file"]
    with pytest.raises(KeyboardInterrupt), files.written_whole(tmp_path / "a" / "c") as folder:
        (folder / "file").write_text("x")
        raise KeyboardInterrupt
    with (
        pytest.raises(OSError),
        files.written_whole(tmp_path / "a" / "b") as folder,
    ):  # somebody was first
        (folder / "file").write_text("y")
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b", "file"] and (
        tmp_path / "a/b/file"
    ).read_text() == "x"


def test_what_a_killed_process_left_half_written_is_cleared_and_what_a_living_one_writes_is_not(
    tmp_path,
):
    child = os.fork()
    if not child:
        with files.written_whole(tmp_path / "killed") as folder:
            (folder / "file").write_text("gigabytes")
            os._exit(9)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    with files.written_whole(tmp_path / "a") as folder:
        (folder / "file").write_text("x")
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
        with files.written_whole(tmp_path / "b") as another:
            (another / "file").write_text("y")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "file", "file"]


def test_a_hidden_folder_that_is_somebody_elses_stays(tmp_path):
    for name in (".writing-notes", ".git", ".writing-a-0123456789ab.txt"):
        (tmp_path / name).mkdir()
    with files.written_whole(tmp_path / "a"):
        pass
    assert len(list(tmp_path.iterdir())) == 4
