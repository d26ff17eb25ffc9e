"""The registry: which profile a stage was trained with, and which checkpoints there
are to judge.
"""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
import signal

import pytest

from kl3m_nb.data import corpus, loader
from kl3m_nb.data.tokenizer import read_tokenizer
from kl3m_nb.growth import stacking
from kl3m_nb.profiles import get_profile
from kl3m_nb.runs import checkpoints, folder, registry
from kl3m_nb.runs.metrics import read_metrics
from kl3m_nb.training import loop
from tests.conftest import at_step, small_profile


def test_a_stage_has_the_profile_it_was_trained_with_or_the_named_one(tmp_path, monkeypatch):
    monkeypatch.setenv("KL3M_NB_RUNS", str(tmp_path))
    assert registry.stage_profile("tiny", "grown") == get_profile("tiny")
    trained = get_profile("tiny", max_steps=3, source="files:texts/*.jsonl")
    registry.run_path("tiny", "grown").mkdir()
    folder.write_run_file(registry.run_path("tiny", "grown"), trained, None, "")
    assert registry.stage_profile("tiny", "grown") == trained
    with pytest.raises(ValueError, match="no profile"):
        registry.stage_profile("huge", "grown")


def test_checkpoints_are_named_by_their_stage_by_hand_or_as_they_are_given(
    trained_run, tmp_path, monkeypatch
):
    monkeypatch.setenv("KL3M_NB_RUNS", str(tmp_path))
    with pytest.raises(ValueError, match="notebook 00"):
        registry.named_checkpoints("tiny", {"source": ""})
    shutil.copytree(trained_run[0], registry.run_path("tiny", "grown"))
    newest = checkpoints.latest_checkpoint(registry.run_path("tiny", "grown"))
    (registry.run_path("tiny", "stack") / "checkpoint").mkdir(parents=True)
    stack = registry.run_path("tiny", "stack") / "checkpoint"
    assert registry.named_checkpoints("tiny", {}) == {"stack, step 0": stack, "trained": newest}
    named = registry.named_checkpoints(
        "tiny", {"source": "a", "trained": "b"}, "owner/name, folder"
    )
    assert list(named.items()) == [
        ("source", "a"),
        ("stack, step 0", stack),
        ("trained", "b"),
        ("owner/name", "owner/name"),
        ("folder", "folder"),
    ]


def test_the_source_is_what_the_stack_was_made_of(trained_run, tmp_path, monkeypatch):
    monkeypatch.setenv("KL3M_NB_RUNS", str(tmp_path / "runs"))
    with pytest.raises(
        ValueError, match="runs/demo-source has no whole checkpoint; train it first"
    ):
        registry.require_stage_checkpoint("tiny", "source")
    run_dir = shutil.copytree(trained_run[0], registry.run_path("tiny", "source"))
    assert registry.stage_checkpoint("tiny", "source") == checkpoints.latest_checkpoint(run_dir)
    elsewhere = shutil.copytree(checkpoints.latest_checkpoint(run_dir), tmp_path / "kl3m-006-170m")
    stack = registry.run_path("tiny", "stack") / "checkpoint"
    stacking.stack_checkpoint(elsewhere, stack, 2)
    assert registry.require_stage_checkpoint("tiny", "source") == elsewhere
    assert list(registry.named_checkpoints("tiny", {}).items()) == [
        ("source", elsewhere),
        ("stack, step 0", stack),
    ]
    shutil.rmtree(elsewhere)
    assert registry.stage_checkpoint("tiny", "source") == checkpoints.latest_checkpoint(run_dir)


@pytest.mark.parametrize("name", [".", "..", "a/b", "/tmp/a", "../a"])
def test_a_run_lies_right_below_the_folder_of_runs(tmp_path, monkeypatch, name):
    monkeypatch.setenv("KL3M_NB_RUNS", str(tmp_path))
    with pytest.raises(
        ValueError, match=f"The run '{name}' is no name of a folder right below {tmp_path}"
    ):
        registry.run_path("tiny", "train", name)


def test_a_run_of_no_known_profile_and_no_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("KL3M_NB_RUNS", str(tmp_path))
    assert registry.run_path("", "", "my-run") == tmp_path / "my-run"
    with pytest.raises(ValueError, match="no profile 'tniy'"):
        registry.run_path("tniy", "grown")
    with pytest.raises(ValueError, match="no profile 'tniy'"):
        registry.named_checkpoints("tniy", {})
    with pytest.raises(ValueError, match="The run 3 is no name of a folder"):
        registry.run_path("tiny", "grown", 3)
    for wrong in (3, ["a", 3], "a 'b"):
        with pytest.raises(
            ValueError,
            match=r"^others is .*; give checkpoint folders or hub ids as a list, or as one text",
        ):
            registry.named_checkpoints("tiny", {}, wrong)


def test_other_checkpoints_may_have_blanks_and_commas_in_their_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("My Drive/m", "a,b"):
        (tmp_path / name).mkdir(parents=True)
    assert registry.listed("My Drive/m") == ["My Drive/m"] and registry.listed("a,b") == ["a,b"]
    assert registry.listed("'My Drive/m', \"a,b\" owner/name") == [
        "My Drive/m",
        "a,b",
        "owner/name",
    ]
    assert registry.listed(["My Drive/m", "a,b"]) == ["My Drive/m", "a,b"]
    assert registry.listed("owner/a,owner/b  owner/c") == ["owner/a", "owner/b", "owner/c"]
    many = [f"owner/{name * 100}" for name in "abcdefgh"]
    assert registry.listed(",".join(many)) == many, "longer than a file's name can be"
    assert registry.listed("") == registry.listed([]) == registry.listed(" , ") == []


def test_a_run_that_cannot_be_read_is_named_and_the_others_are_shown(tmp_path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
        folder.write_run_file(tmp_path / name, get_profile("tiny"), None, "cpu")
    (tmp_path / "a" / "run.json").write_text("")
    (tmp_path / "c" / "run.json").write_text("[]")
    with pytest.warns(UserWarning) as warned:
        table = registry.load_runs(tmp_path)
    assert table["run"].tolist() == ["b", "d"] and set(table["init"]) == {"random weights"}
    for warning, name in zip(warned, ("a", "c"), strict=True):
        assert str(warning.message).startswith(
            f"The run {name} is left out of the table: {tmp_path / name / 'run.json'}"
        )


def test_a_checkpoint_is_known_by_the_run_it_lies_in(trained_run, tmp_path):
    run_dir, result = trained_run
    profile, windows = registry.trained_on(result.checkpoint)
    assert profile == folder.read_run_profile(run_dir)
    assert windows == result.step * profile.data.micro_batch * profile.data.grad_accumulation
    assert registry.trained_on(str(result.checkpoint)) == (profile, windows)
    assert registry.trained_on(tmp_path / "checkpoint") is None
    assert (
        registry.trained_on(run_dir / "export" / "kl3m-tiny-step6") is None
    )  # lies in the run, and is no checkpoint of it
    assert registry.trained_on("alea-institute/kl3m-006-170m") is None
    lost = shutil.copytree(run_dir, tmp_path / "lost")
    (lost / "metrics.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl has no evaluation that tells at which step the run began"
    ):
        registry.trained_on(lost / "checkpoints" / result.checkpoint.name)


def test_what_a_model_has_read_is_told_back_to_random_weights(trained_run, tmp_path):
    """A run, its stack, a run of the stack that was stopped and one that was begun
    from that one.
    """
    _, result = trained_run
    [own] = registry.readings(result.checkpoint)
    assert (own.data, own.windows) == (
        registry.trained_on(result.checkpoint)[0].data,
        registry.trained_on(result.checkpoint)[1],
    )
    stream = loader.open_stream(own.data, read_tokenizer(str(result.checkpoint)))
    stream.take(own.windows)
    assert own.stream["rest"].tolist() == stream.state_dict()["rest"].tolist()
    stacking.stack_checkpoint(result.checkpoint, tmp_path / "stack", factor=2)
    assert [reading.windows for reading in registry.readings(tmp_path / "stack")] == [own.windows]
    settings = small_profile(layers=4, growth_factor=2, max_steps=3, seed=5)
    grown = loop.train(settings, tmp_path / "grown", init=tmp_path / "stack").checkpoint
    assert [(reading.data.seed, reading.windows) for reading in registry.readings(grown)] == [
        (5, 12),
        (own.data.seed, own.windows),
    ]
    shutil.copytree(tmp_path / "stack", tmp_path / "copy")
    record = tmp_path / "copy" / "stack.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"trained_steps": 7}))
    for unknown in ("alea-institute/kl3m-006-170m", tmp_path / "copy"):
        with pytest.raises(
            registry.UnknownTraining, match=f"{unknown} was trained on is not recorded"
        ):
            registry.readings(unknown)


@pytest.mark.parametrize("packing", ["dense", "segments"])
def test_the_prefix_of_a_document_is_what_stood_before_documents_in_training(packing, tmp_path):
    settings = small_profile(packing=packing, max_steps=1, seq_len=64)
    checkpoint = loop.train(settings, tmp_path / "run").checkpoint
    tokenizer = read_tokenizer(str(checkpoint))
    texts = [
        document.text for document in corpus.iterate_documents(settings.data.source, held_out=False)
    ]
    beginnings = {
        tuple(tokenizer.encode(text[:400], add_special_tokens=False)[:16]) for text in texts
    }
    before = collections.Counter()
    for row in loader.open_stream(settings.data, tokenizer).take(400).input_ids.tolist():
        before.update(
            row[place - 1] for place in range(1, 49) if tuple(row[place : place + 16]) in beginnings
        )
    ((token, _),) = before.most_common(1)
    assert registry.document_prefix(checkpoint, tokenizer) == token
    stacking.stack_checkpoint(checkpoint, tmp_path / "stack", 2)
    assert registry.document_prefix(str(tmp_path / "stack"), tokenizer) == token
    for unknown in ("owner/name", shutil.copytree(checkpoint, tmp_path / "foreign" / "model")):
        assert registry.document_prefix(unknown, tokenizer) == tokenizer.eos_token_id


def test_a_checkpoint_is_judged_on_what_it_was_trained_on_unless_told_otherwise(tmp_path):
    settings = small_profile(
        tokenizer="corpus-001", source="package:licensedcode-data(min_tokens=4)", max_steps=1
    )
    checkpoint = loop.train(settings, tmp_path / "run").checkpoint
    judged = registry.profile_to_judge("tiny", checkpoint, seq_len=48, held_out_windows=4)
    assert (judged.data.source, judged.data.tokenizer) == (settings.data.source, str(checkpoint))
    assert (judged.data.held_out_windows, judged.data.seq_len, judged.growth_factor) == (4, 48, 4)
    assert (judged.model.vocabulary, judged.model.context) == (
        512,
        64,
    ) and judged.model.layers == get_profile("tiny").model.layers
    with pytest.raises(ValueError, match="seq_len 256 is longer than the context of 64 tokens"):
        registry.profile_to_judge("tiny", checkpoint)
    told = registry.profile_to_judge(
        "tiny", str(checkpoint), "files:texts/*.jsonl", "OWNER/NAME", seq_len=64
    ).data
    assert (told.source, told.tokenizer) == ("files:texts/*.jsonl", "OWNER/NAME")
    foreign = shutil.copytree(checkpoint, tmp_path / "foreign" / "model")
    assert registry.profile_to_judge("tiny", foreign, seq_len=64).data.tokenizer == str(foreign)
    (foreign / "tokenizer.json").unlink()
    own = {"vocabulary": 512, "context": 64, "seq_len": 64}
    assert registry.profile_to_judge("tiny", foreign, seq_len=64) == get_profile("tiny", **own)


def test_the_table_tells_of_the_newest_checkpoint_and_of_nothing_later(trained_run, tmp_path):
    run_dir = shutil.copytree(trained_run[0], tmp_path / "runs" / "run")
    profile = folder.read_run_profile(run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-000006")
    with pytest.raises(KeyboardInterrupt):
        loop.train(
            profile, run_dir, callbacks=[at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))]
        )
    row = registry.load_runs(run_dir.parent).iloc[0]
    held_out = read_metrics(run_dir, "held_out").set_index("step")
    assert (row.step, row.tokens, row.held_out_loss) == (
        4,
        4 * profile.tokens_per_step,
        held_out.held_out_loss[3],
    )
    saved = read_metrics(run_dir, "checkpoint")
    assert row.seconds == saved.seconds.iloc[-1] >= read_metrics(run_dir, "train").seconds.iloc[-1]
    assert list(saved.step * profile.tokens_per_step) == list(saved.tokens) and list(
        saved.step
    ) == [3, 4]
    card = (checkpoints.latest_checkpoint(run_dir) / "README.md").read_text()
    assert f"**Held-out loss**: {row.held_out_loss:.4f} nats per token at step 3" in card


def test_the_table_of_runs_has_the_columns_that_are_named(trained_run):
    run_dir, result = trained_run
    table = registry.load_runs(run_dir.parent)
    named = registry.load_runs.__doc__.partition("A row per run folder: ")[2].partition(".")[0]
    assert (
        list(table.columns) == re.sub(r"\(.*?\)", "", named, flags=re.S).replace(",", " ").split()
    )
    assert table.loc[0, ["layers", "step", "checkpoint"]].tolist() == [2, 6, str(result.checkpoint)]
