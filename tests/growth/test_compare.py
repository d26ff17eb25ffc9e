"""Which source a growth comparison counts in, and up to where: what the grown run's record says,
and no other.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from kl3m_nb.data import tokenizer
from kl3m_nb.data.windows import held_out_windows
from kl3m_nb.growth import compare, stacking
from kl3m_nb.growth.compare import Source
from kl3m_nb.model import costs, decoder, scoring
from kl3m_nb.profiles import get_profile, source_profile
from kl3m_nb.runs import checkpoints
from kl3m_nb.runs.folder import write_run_file
from kl3m_nb.runs.metrics import read_metrics
from kl3m_nb.training import loop
from tests.conftest import at_step, small_profile

GROWN = {"layers": 4, "max_steps": 2}


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A folder with the run `short`, stopped after four of its six steps, and `grown`, from a stack
    of what was saved then.
    """
    folder = tmp_path_factory.mktemp("grown")
    with pytest.raises(KeyboardInterrupt):
        loop.train(
            small_profile(),
            folder / "short",
            callbacks=[at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT))],
        )
    stacking.stack_checkpoint(folder / "short" / "checkpoints" / "step-000004", folder / "stack", 2)
    loop.train(small_profile(), folder / "short")
    loop.train(small_profile(**GROWN), folder / "grown", folder / "stack")
    return folder


@pytest.fixture
def moved(grown, tmp_path):
    """A copy of it to change, in which every record names the copy."""
    folder = shutil.copytree(grown, tmp_path / "moved")
    for path in (folder / "grown" / "run.json", folder / "stack" / "stack.json"):
        path.write_text(path.read_text().replace(str(grown), str(folder)))
    shutil.rmtree(folder / "grown" / "checkpoints")  # their states name the original
    return folder


def test_the_source_is_what_was_stacked_at_the_step_that_was_stacked(grown):
    assert compare.find_source(grown / "grown") == Source(grown / "short", 4)
    curve = compare.source_curve(Source(grown / "short", 4))
    evaluated, profile = (
        read_metrics(grown / "short", "held_out").set_index("step"),
        small_profile(),
    )
    assert list(curve.step) == [0, 3, 4] and list(evaluated.index) == [0, 3, 6]
    assert list(curve.tokens) == [step * profile.tokens_per_step for step in curve.step]
    assert curve.flops.iloc[2] == pytest.approx(evaluated.flops[3] * 4 / 3)
    assert evaluated.seconds[3] < curve.seconds.iloc[2] < evaluated.seconds[6]
    assert curve.held_out_loss.iloc[2] == evaluated.held_out_loss[3]
    assert compare.source_curve(Source(grown / "short", 3)).equals(
        read_metrics(grown / "short", "held_out")[:2]
    )


def test_the_grown_run_remembers_its_source_when_the_stack_is_gone_or_another(grown, tmp_path):
    copy = shutil.copytree(grown / "grown", tmp_path / "copy")
    record = json.loads((copy / "run.json").read_text())
    for start in ("gone", "other"):
        (copy / "run.json").write_text(json.dumps(record | {"init": str(tmp_path / start)}))
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "stack.json").write_text('{"source": "elsewhere"}')
        assert compare.find_source(copy) == Source(grown / "short", 4)


def test_a_source_whose_cost_nobody_knows_is_named(moved, grown, tmp_path):
    assert compare.find_source(moved / "grown") == Source(moved / "short", 4)
    (moved / "short").rename(moved / "away")
    with pytest.raises(
        ValueError,
        match=(
            r"grown from .*/short/checkpoints/step-000004, which no run here has written as it was"
        ),
    ):
        compare.find_source(moved / "grown")
    shutil.copytree(grown / "short", moved / "short")
    manifest = moved / "short" / "checkpoints" / "step-000004" / checkpoints.MANIFEST
    described = json.loads(manifest.read_text())
    described["files"]["model.safetensors"]["sha256"] = "of a run that was trained anew"
    manifest.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="which no run here has written as it was then"):
        compare.find_source(moved / "grown")
    shutil.rmtree(manifest.parent.parent)  # what a run keeps only for a while
    assert compare.find_source(moved / "grown") == Source(moved / "short", 4)
    (moved / "short" / "metrics.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl does not tell what the source had cost at step 4"
    ):
        compare.plan_comparison(moved / "grown")


def test_what_was_not_grown_from_random_weights_by_one_stack_is_refused(grown, moved, tmp_path):
    with pytest.raises(
        ValueError, match="short was started from random weights, so nothing was grown"
    ):
        compare.find_source(grown / "short")
    write_run_file(moved / "short", small_profile(), "OWNER/NAME", "")
    with pytest.raises(
        ValueError, match=r"short, which .* was grown from, was itself started from OWNER/NAME"
    ):
        compare.find_source(moved / "grown")
    (moved / "stack" / "stack.json").unlink()
    with pytest.raises(
        ValueError, match=r"Nothing says what the start of .*grown, .*stack, was made of"
    ):
        compare.find_source(moved / "grown")
    trained = checkpoints.latest_checkpoint(grown / "grown")
    loop.train(small_profile(**GROWN | {"max_steps": 1}), tmp_path / "on", trained)
    with pytest.raises(ValueError, match="had been trained since it was stacked"):
        compare.find_source(tmp_path / "on")


def test_the_run_from_scratch_has_the_grown_runs_profile_and_the_steps_that_are_asked_for(grown):
    assert compare.plan_comparison(grown / "grown").scratch == small_profile(**GROWN)
    plan = compare.plan_comparison(grown / "grown", 7)
    assert plan.scratch == small_profile(**GROWN | {"max_steps": 7}) and plan.source.step == 4
    with pytest.raises(ValueError, match="is no run folder"):
        compare.plan_comparison(grown / "nowhere")


def _laptop_run(folder: Path, source=None, step=240, order="cyclic", noise=0.0, **changes) -> Path:
    """The folder of a grown run as the laptop's notebooks leave it, without what they compute."""
    laptop = get_profile("tiny")
    checkpoint = folder / "source" / "checkpoints" / f"step-{step:06d}"
    for name in ("source", "stack", "grown"):
        (folder / name).mkdir(parents=True)
    record = {"source": str(checkpoint), "source_sha256": {}, "order": order, "noise": noise}
    (folder / "stack" / "stack.json").write_text(json.dumps(record))
    write_run_file(folder / "source", source or source_profile(laptop), None, "")
    write_run_file(folder / "grown", get_profile("tiny", **changes), folder / "stack", "")
    return folder / "grown"


def test_the_laptops_run_is_known_by_all_that_it_was_made_with(tmp_path, grown):
    assert compare.is_laptop_run(_laptop_run(tmp_path / "as-it-is"))
    others = [
        {"order": "random"},
        {"noise": 0.2},
        {"step": 100},
        {"base_lr": 0.02},
        {"source": source_profile(get_profile("tiny", tokenizer="corpus-001"))},
    ]
    for number, other in enumerate(others):
        assert not compare.is_laptop_run(_laptop_run(tmp_path / str(number), **other)), other
    for folder in (grown / "grown", grown / "short", grown / "nowhere"):
        assert not compare.is_laptop_run(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"layers": 2}}, "layers is 2 instead of 4"),
        (
            {"model": {"hidden": 64}, "data": {"seq_len": 16}},
            "hidden is 64 instead of 32, seq_len is 16 instead of 32",
        ),
        (
            {"data": {"source": "files:*.txt"}},
            "source is 'files:[*].txt' instead of 'package:licensedcode-data'",
        ),
        ({"init": "runs/other/checkpoint"}, "init is runs/other/checkpoint"),
    ],
)
def test_a_run_that_is_not_the_same_model_from_scratch_on_the_same_text_is_not_compared(
    grown, tmp_path, changes, words
):
    (scratch := tmp_path / "scratch").mkdir()
    write_run_file(scratch, small_profile(**GROWN), None, "cpu")
    assert compare.curves(grown / "grown", scratch)[
        "scratch"
    ].empty  # not trained yet, and the right one
    record = json.loads((scratch / "run.json").read_text())
    record["init"] = changes.get("init", record["init"])
    for section in changes.keys() - {"init"}:
        record["profile"][section].update(changes[section])
    (scratch / "run.json").write_text(json.dumps(record))
    with pytest.raises(
        ValueError, match=f"scratch is no run from scratch.*: its {words}; name one"
    ):
        compare.curves(grown / "grown", scratch)


def test_the_last_loss_of_a_source_with_other_windows_is_measured_on_the_grown_runs(
    moved, tmp_path
):
    """The target comes from it, so it may not be taken from an easier text."""
    path = moved / "short" / "run.json"
    record = json.loads(path.read_text())
    record["profile"]["data"]["held_out_windows"] = 4
    path.write_text(json.dumps(record))
    source = compare.curves(moved / "grown", tmp_path / "scratch")["source"]
    checkpoint = moved / "short" / "checkpoints" / "step-000004"
    windows = held_out_windows(small_profile().data, tokenizer.read_tokenizer(str(checkpoint)))
    expected = scoring.held_out_loss(decoder.load_model(checkpoint), windows).loss
    assert (
        source.held_out_loss.iloc[-1] == pytest.approx(expected, rel=1e-6)
        and source.held_out_loss[:-1].isna().all()
    )
    assert list(source.tokens) == list(compare.source_curve(Source(moved / "short", 4)).tokens)
    shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match=r"There is no checkpoint folder .*step-000004"):
        compare.curves(moved / "grown", tmp_path / "scratch")


def test_operations_of_earlier_versions_are_counted_anew_with_newton_schulz(moved):
    path = moved / "grown" / "metrics.jsonl"
    profile, evaluated = small_profile(**GROWN), read_metrics(moved / "grown", "held_out")
    old = [json.loads(line) for line in path.read_text().splitlines()]
    for row in old:
        if row["kind"] == "held_out":
            row["flops"] = row["tokens"] * costs.flops_per_token(
                profile.model, profile.data.seq_len
            )
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    grown = compare.curves(moved / "grown", moved / "scratch")["grown"]
    assert list(grown.flops) == list(evaluated.flops)
    orthogonalising = costs.muon_flops_per_step(profile.model, profile.optimizer.ns_steps)
    assert grown.flops.iloc[-1] - read_metrics(moved / "grown", "held_out").flops.iloc[
        -1
    ] == pytest.approx(2 * orthogonalising)


CARD = "# kl3m-tiny\n\n## Training\n  • **Steps**: 63,000\n  • **Tokens Processed**: 15,830,000\n"


@pytest.fixture
def published(moved):
    """As `moved`, with the source's checkpoint as a model that others have published, and no run of
    it.
    """
    name = moved / "kl3m-tiny-checkpoint-63000"
    shutil.copytree(
        moved / "short" / "checkpoints" / "step-000004",
        name,
        ignore=shutil.ignore_patterns("training_state"),
    )
    (name / "README.md").write_text(CARD)
    shutil.rmtree(moved / "short")
    path = moved / "stack" / "stack.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source": str(name)}))
    return name


def test_a_published_source_costs_what_its_card_says_and_not_steps_times_a_batch(published):
    """63,000 steps of the profile's batch would be other tokens: the family's own card names less
    than half of them.
    """
    grown_dir = published.parent / "grown"
    source, scratch = compare.plan_comparison(grown_dir)
    assert (source.counts.step, source.counts.tokens) == (
        63_000,
        15_830_000,
    ) and scratch == small_profile(**GROWN)
    [row] = compare.curves(grown_dir, published.parent / "scratch")["source"].to_dict("records")
    small = small_profile()
    assert (
        (row["step"], row["tokens"])
        == (63_000, 15_830_000)
        != (63_000, 63_000 * small.tokens_per_step)
    )
    per_token = costs.flops_per_token(small.model, small.data.seq_len)
    orthogonalising = costs.muon_flops_per_step(small.model, small.optimizer.ns_steps)
    assert row["flops"] == pytest.approx(15_830_000 * per_token + 63_000 * orthogonalising)
    windows = held_out_windows(small.data, tokenizer.read_tokenizer(str(published)))
    expected = scoring.held_out_loss(decoder.load_model(published), windows).loss
    assert row["held_out_loss"] == pytest.approx(expected, rel=1e-6)


def test_a_published_source_that_does_not_tell_its_cost_is_refused(published):
    grown_dir = published.parent / "grown"
    (published / "README.md").write_text(CARD + "\n## G_stack\n\nIt was grown from 1 layer.\n")
    with pytest.raises(ValueError, match="was itself grown"):
        compare.find_source(grown_dir)
    (published / "README.md").write_text("# kl3m-tiny\n")
    with pytest.raises(ValueError, match="has no line 'Tokens Processed"):
        compare.find_source(grown_dir)
    (published / "README.md").write_text(CARD)
    with (published / "model.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match="has changed since"):
        compare.find_source(grown_dir)
    shutil.rmtree(published)
    with pytest.raises(ValueError, match="which no run here has written as it was then"):
        compare.find_source(grown_dir)
