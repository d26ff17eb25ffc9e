"""What a checkpoint is compared with: told by its run, its stack's record, or the model that is
given.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import known_spectra
import pytest

from kl3m_nb.growth import stacking
from kl3m_nb.profiles import ModelSpec
from kl3m_nb.runs import folder
from kl3m_nb.spectra import matrices
from kl3m_nb.spectra.subject import find_subject
from tests.conftest import small_profile

SPEC = ModelSpec(
    layers=4, hidden=32, mlp=48, heads=2, kv_heads=1, head_size=16, vocabulary=80, context=32
)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return known_spectra.write_known_stack(tmp_path_factory.mktemp("known"), SPEC, copies=2)


def test_a_model_alone_is_its_own_source(known):
    subject = find_subject(known.trained)
    assert (
        subject.layers,
        subject.source_layers,
        subject.copies,
        subject.start,
        subject.source,
    ) == (4, 4, 1, "", "")
    assert (
        subject.profile is None
        and not subject.steps
        and subject.clamp.attention_max_condition == 3000
    )


def test_a_hub_model_keeps_its_name(known, monkeypatch):
    monkeypatch.setattr(
        matrices.huggingface_hub, "snapshot_download", lambda *_, **__: str(known.trained)
    )
    subject = find_subject("owner/model")
    assert subject.name == "owner/model" and subject.checkpoint == known.trained
    assert find_subject(known.trained).name == "trained"


def test_a_fresh_stack_names_its_source(known):
    subject = find_subject(known.stack)
    assert (subject.source_layers, subject.copies) == (2, 2)
    assert subject.start == str(known.stack) and subject.source == str(known.source)


def test_a_model_as_deep_is_the_start_and_brings_its_source(known):
    subject = find_subject(known.trained, against=str(known.stack))
    assert (subject.start, subject.source, subject.source_layers) == (
        str(known.stack),
        str(known.source),
        2,
    )


def test_a_less_deep_model_is_the_source(known):
    subject = find_subject(known.trained, against=str(known.source))
    assert (subject.start, subject.source, subject.source_layers) == ("", str(known.source), 2)


def test_a_run_brings_its_start_its_ceilings_and_its_checkpoints(known, trained_run, tmp_path):
    run_dir, result = trained_run
    subject = find_subject(run_dir)
    assert subject.name == "run, step-000006" and subject.checkpoint == result.checkpoint
    assert subject.profile == small_profile() and subject.run_dir == run_dir
    assert subject.copies == 1 and not subject.steps  # begun from random weights: no stack
    earlier = find_subject(run_dir / "checkpoints" / "step-000003")
    assert (
        earlier.run_dir == run_dir
        and earlier.checkpoint.name == "step-000003"
        and earlier.last_step == 3
    )
    assert (
        earlier.steps_since_clamp == 1 and subject.steps_since_clamp == 0
    )  # it clamps every two steps
    assert (
        find_subject(known.trained).last_step == math.inf
        and find_subject(known.trained).steps_since_clamp == 0
    )


def test_a_run_begun_from_a_stack_has_a_trajectory(trained_run, tmp_path):
    run_dir, _ = trained_run
    record = json.loads((run_dir / folder.RUN_FILE).read_text())
    copy = tmp_path / "run"
    (copy / "checkpoints").mkdir(parents=True)
    for step in ("step-000003", "step-000006"):
        (copy / "checkpoints" / step).symlink_to(run_dir / "checkpoints" / step)
    start = tmp_path / "stack"
    start.symlink_to(run_dir / "checkpoints" / "step-000003")
    (copy / folder.RUN_FILE).write_text(json.dumps(record | {"init": str(start)}))
    subject = find_subject(copy, source_layers=1)
    assert (
        list(subject.steps) == [0, 3, 6]
        and subject.steps[0] == subject.start == str(start)
        and subject.copies == 2
    )
    assert list(find_subject(copy / "checkpoints" / "step-000003", source_layers=1).steps) == [0, 3]
    assert list(find_subject(copy, against=str(start)).steps) == [0, 3, 6]


def test_a_checkpoint_of_the_run_is_compared_with_at_its_own_step(trained_run):
    run_dir, _ = trained_run
    earlier = run_dir / "checkpoints" / "step-000003"
    subject = find_subject(run_dir, against=str(earlier), source_layers=1)
    assert list(subject.steps) == [3, 6] and subject.steps[3] == subject.start == str(earlier)


def test_what_a_run_was_stacked_from_is_known_whatever_it_is_compared_with(trained_run, tmp_path):
    run_dir, _ = trained_run
    record = json.loads((run_dir / folder.RUN_FILE).read_text())
    copy, source = tmp_path / "run", tmp_path / "source"
    shutil.copytree(run_dir / "checkpoints" / "step-000003", tmp_path / "stack")
    (tmp_path / "stack" / "stack.json").write_text(
        json.dumps({"order": "cyclic", "source_layers": 1, "source": str(source)})
    )
    source.mkdir()
    shutil.copytree(run_dir / "checkpoints", copy / "checkpoints")
    (copy / folder.RUN_FILE).write_text(json.dumps(record | {"init": str(tmp_path / "stack")}))
    subject = find_subject(copy, against=str(copy / "checkpoints" / "step-000003"))
    assert (
        subject.source_layers == 1
        and subject.source == str(source)
        and list(subject.steps) == [3, 6]
    )


def test_a_trained_model_with_the_record_of_its_stack_has_a_source_and_is_no_start(known, tmp_path):
    exported = shutil.copytree(known.trained, tmp_path / "model-step5")
    record = json.loads((known.stack / "stack.json").read_text())
    (exported / "stack.json").write_text(json.dumps(record | {"trained_steps": 5}))
    subject = find_subject(exported)
    assert (subject.start, subject.source, subject.source_layers, subject.last_step) == (
        "",
        str(known.source),
        2,
        5,
    )
    assert find_subject(known.trained, against=str(exported)).source == str(known.source)
    (exported / "stack.json").write_text(
        json.dumps(record | {"trained_steps": 5, "order": "random"})
    )
    assert (find_subject(exported).order, find_subject(exported).copies) == ("random", 1)


def test_a_trained_model_is_what_the_record_of_its_stack_says_and_else_what_is_given(
    known, tmp_path
):
    stack = shutil.copytree(known.stack, tmp_path / "stack")
    record = json.loads((stack / "stack.json").read_text())
    (stack / "stack.json").write_text(json.dumps(record | {"noise": 0.2}))
    noisy = find_subject(known.trained, str(stack))
    assert (noisy.order, noisy.noise, noisy.copies) == ("cyclic", 0.2, 2)
    for order in stacking.ORDERS[1:]:
        (stack / "stack.json").write_text(json.dumps(record | {"order": order}))
        other = find_subject(known.trained, str(stack))
        assert (other.order, other.copies, other.start) == (order, 1, str(stack))
        assert other.source == str(known.source)
    (stack / "stack.json").unlink()
    assert find_subject(known.trained, str(stack)).copies == 1
    assert find_subject(known.trained, str(stack), 1).copies == 4
    with pytest.raises(ValueError, match="is not made of copies of 3"):
        find_subject(known.trained, str(stack), 3)


def test_ceilings_are_those_of_a_run_that_clamps(known, trained_run):
    subject = find_subject(trained_run[0])
    assert subject.ceilings["q_proj"] == small_profile().clamp.attention_max_condition
    never = dataclasses.replace(subject, clamp=dataclasses.replace(subject.clamp, clamp_every=0))
    foreign = find_subject(known.trained)
    assert never.ceilings == foreign.ceilings == {}
    assert (
        foreign.reference_ceilings["q_proj"] == 3000
        and foreign.reference_ceilings["up_proj"] == 2000
    )


def test_what_does_not_fit_is_refused(known, tmp_path):
    odd = known_spectra.write_known_stack(
        tmp_path / "odd", ModelSpec(**(SPEC.__dict__ | {"layers": 6})), copies=2
    )
    with pytest.raises(
        ValueError, match=r"has 3 layers and .* has 4; give the stack it was begun from"
    ):
        find_subject(known.trained, against=str(odd.source))
    with pytest.raises(ValueError, match="is not made of copies of 3"):
        find_subject(known.trained, source_layers=3)
    record = odd.stack / "stack.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"order": "interpolated"}))
    with pytest.raises(ValueError, match="compared for cyclic stacks only"):
        find_subject(odd.trained, against=str(odd.stack), source_layers=3)
    subject = find_subject(odd.trained, against=str(odd.stack))
    assert (subject.order, subject.copies, subject.source, subject.start) == (
        "interpolated",
        1,
        str(odd.source),
        str(odd.stack),
    )
