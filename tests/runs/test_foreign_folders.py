"""Folders from somewhere else: links, pipes, stray files and records that are no records. See
docs/faults.md.
"""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
from transformers import AutoModelForCausalLM

from kl3m_nb import cli
from kl3m_nb.data import tokenizer
from kl3m_nb.growth import stacking
from kl3m_nb.model import decoder
from kl3m_nb.runs import checkpoints, export, registry
from kl3m_nb.runs.folder import LOCK_FILE
from kl3m_nb.runs.metrics import read_metrics
from kl3m_nb.spectra import matrices
from kl3m_nb.training import loop
from tests.conftest import small_profile

PRECIOUS = "precious\n" * 1000


@pytest.fixture
def run_dir(trained_run, tmp_path):
    """A copy of a run of six steps that has its checkpoint of step 3 alone."""
    shutil.copytree(trained_run[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
    return tmp_path / "run"


@pytest.fixture
def model(trained_run, tmp_path):
    """A model's folder as anybody may have sent it."""
    return export.export_model(trained_run[1].checkpoint, tmp_path / "sent")


@pytest.fixture(autouse=True)
def _hangs_end_the_test():
    def hangs(*_):
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _change(path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("name", [LOCK_FILE, "metrics.jsonl"])
@pytest.mark.parametrize("kind", ["a link", "a pipe"])
def test_a_run_writes_to_files_of_its_own_folder_alone(run_dir, tmp_path, name, kind):
    outside = tmp_path / "precious.txt"
    outside.write_text(PRECIOUS)
    (run_dir / name).unlink(missing_ok=True)
    os.symlink(outside, run_dir / name) if kind == "a link" else os.mkfifo(run_dir / name)
    with pytest.raises(ValueError, match=rf"{name} is {kind}"):
        loop.train(small_profile(), run_dir)
    assert outside.read_text() == PRECIOUS
    (run_dir / name).unlink()
    shutil.copy(outside, run_dir / name)  # a file of its own with anything in it is taken over
    assert loop.train(small_profile(), run_dir).step == 6


def test_a_report_writes_no_figure_through_a_link(run_dir, tmp_path):
    outside = tmp_path / "precious.txt"
    outside.write_text(PRECIOUS)
    (run_dir / "figures").mkdir()
    for ending in ("png", "pdf", "csv"):
        os.symlink(outside, run_dir / "figures" / f"training.{ending}")
    assert cli.main(["report", str(run_dir)]) == 0
    assert (
        outside.read_text() == PRECIOUS
        and (run_dir / "figures" / "training.png").stat().st_size > 1000
    )


def test_a_pipe_or_a_device_beside_a_tokenizer_is_not_read(model):
    os.mkfifo(model / "notes.txt")
    os.symlink("/dev/zero", model / "more.json")
    assert len(tokenizer.read_tokenizer(str(model))) == 512


@pytest.mark.parametrize("name", ["config.json", "run.json", "manifest.json"])
def test_a_pipe_in_the_place_of_a_record_is_not_waited_for(run_dir, name):
    checkpoint = run_dir / "checkpoints" / "step-000003"
    path = {
        "config.json": checkpoint,
        "run.json": run_dir,
        "manifest.json": checkpoint / "training_state",
    }[name] / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=name):
        (
            decoder.load_model(checkpoint)
            if name == "config.json"
            else loop.train(small_profile(), run_dir)
        )


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../outside.safetensors", "a/../../b.safetensors", 7]
)
def test_an_index_that_leaves_its_folder_is_refused(model, name):
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model, max_shard_size="40KB")
    (model / "model.safetensors").unlink()
    index = model / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    _change(index, weight_map={**places, next(iter(places)): name})
    for read in (
        decoder.load_model,
        matrices.find_matrices,
        lambda folder: stacking.stack_checkpoint(folder, folder / "x"),
    ):
        with pytest.raises(ValueError, match="names the shard"):
            read(model)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            {"transformers_weights": "other.safetensors"},
            "transformers_weights 'other.safetensors' in config.json, and model.safetensors is",
        ),
        (
            {"_attn_implementation": "somebody/kernel"},
            "_attn_implementation 'somebody/kernel' in config.json, code",
        ),
        (
            {"text_config": {"attn_implementation": "somebody/kernel:f"}},
            "attn_implementation 'somebody/kernel:f' in config.json, code",
        ),
        ({"num_hidden_layers": "2"}, "num_hidden_layers '2'"),
        ({"hidden_size": [32]}, r"hidden_size \[32\]"),
        ({"vocab_size": 512.0}, "vocab_size 512.0"),
        ({"num_key_value_heads": True}, "num_key_value_heads True"),
        ({"head_dim": {"a": "b" * 500}}, r"head_dim .{80} in config.json"),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused_by_name(model, entry, words):
    _change(model / "config.json", **entry)
    for read in (
        decoder.load_model,
        matrices.find_matrices,
        lambda folder: stacking.stack_checkpoint(folder, folder / "x"),
    ):
        with pytest.raises(ValueError, match=f"has {words}") as told:
            read(model)
        assert len(str(told.value)) < 500


def test_a_config_that_names_its_own_weights_is_taken(model):
    _change(
        model / "config.json",
        transformers_weights="model.safetensors",
        _attn_implementation="eager",
    )
    assert decoder.load_model(model).config._attn_implementation == "sdpa"


def test_only_the_files_of_a_model_leave_its_folder(trained_run, tmp_path):
    checkpoint = tmp_path / "step-000006"
    shutil.copytree(trained_run[1].checkpoint, checkpoint)
    sound = {path.name for path in export.export_model(checkpoint, tmp_path / "a").iterdir()}
    for stray in (
        "extra.env",
        ".git/config",
        "notes.md",
        "model.safetensors.bak",
        "pytorch_model.bin",
        "tokenizer.json~",
    ):
        (checkpoint / stray).parent.mkdir(exist_ok=True)
        (checkpoint / stray).write_text("TOKEN=secret")
    exported = export.export_model(checkpoint, tmp_path / "b")
    assert {path.name for path in exported.iterdir()} == sound


@pytest.mark.parametrize("name", ["chat_template.jinja", "LICENSE", "tokenizer.json"])
def test_what_a_link_points_to_is_neither_exported_nor_stacked(model, tmp_path, name):
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    (model / name).unlink(missing_ok=True)
    os.symlink(secret, model / name)
    for copy in (export.export_model, stacking.stack_checkpoint):
        with pytest.raises(ValueError, match=rf"{name} is a link to .*id_rsa"):
            copy(model, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_snapshot_in_the_hubs_cache_is_made_of_links_and_is_taken(model, tmp_path):
    blobs, snapshot = (
        tmp_path / "models--a--b" / "blobs",
        tmp_path / "models--a--b" / "snapshots" / "0123",
    )
    shutil.move(model, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        os.symlink(f"../../blobs/{path.name}", snapshot / path.name)
    stacking.stack_checkpoint(snapshot, tmp_path / "stack", 2)
    assert export.export_model(snapshot, tmp_path / "copy").is_dir()
    assert not any(path.is_symlink() for path in (tmp_path / "stack").iterdir())


BROKEN = {
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "no text": b"\xff\xfe\x00",
    "cut": b'{"a": 1',
    "a list": b"[]",
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_record_that_is_none_is_a_sentence_with_its_name(run_dir, model, content):
    (model / "config.json").write_bytes(BROKEN[content])
    for read in (decoder.load_model, matrices.find_matrices):
        with pytest.raises(ValueError, match=r"config\.json (is|holds)"):
            read(model)
    checkpoint = run_dir / "checkpoints" / "step-000003"
    (checkpoint / checkpoints.MANIFEST).write_bytes(BROKEN[content])
    assert (
        "no whole checkpoint" in checkpoints.flaw_of(checkpoint)
        and checkpoints.latest_checkpoint(run_dir) is None
    )
    (run_dir / "run.json").write_bytes(BROKEN[content])
    with pytest.raises(ValueError, match=r"run\.json cannot be read"):
        loop.train(small_profile(), run_dir)


def test_a_record_without_end_is_not_read_to_its_end(model):
    with open(model / "config.json", "r+b") as file:
        file.truncate(2**40)  # a terabyte of zeros that takes no room
    with pytest.raises(ValueError, match=r"config\.json is longer than 64 MiB"):
        decoder.load_model(model)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "a: " + "[" * 5000 + "]" * 5000, "a: 1\n" * 500_000, "\0"]
)
def test_a_parameter_file_that_is_none_is_a_sentence(tmp_path, capsys, content):
    path = tmp_path / "parameters.yaml"
    path.write_text(content)
    assert cli.main(["run", "00_source_model", "-f", str(path)]) == cli.EXIT_REFUSED
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"kind": "held_out", "step": "six", "held_out_loss": 5}',
        '{"kind": "held_out"}',
        '{"kind": "held_out", "step": 6, "held_out_loss": "low"}',
        '{"kind": "train", "step": 6, "tokens": [1]}',
        '{"kind": "checkpoint", "step": {}, "tokens": 1}',
        '{"kind": "train", "step": 6, "seconds": {"a": 1}}',
        "\0\0\0",
    ],
)
def test_a_line_that_is_no_row_spoils_neither_its_run_nor_the_table(trained_run, tmp_path, line):
    for name in ("a", "b"):
        shutil.copytree(trained_run[0], tmp_path / name)
    for kind in ("train", "held_out", "checkpoint", "clamp", "experts"):
        with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
            file.write(line.replace("held_out", kind) + "\n")
    table = registry.load_runs(tmp_path).set_index("run")
    assert list(table.loc["a", ["held_out_loss", "tokens"]]) == list(
        table.loc["b", ["held_out_loss", "tokens"]]
    )
    assert len(read_metrics(tmp_path / "a", "train")) == 6


def test_lists_of_different_lengths_are_no_event(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "clamp", "step": 5, "name": ["a"], "raised": [1, 2]}\n'
    )
    assert read_metrics(tmp_path, "clamp").empty
