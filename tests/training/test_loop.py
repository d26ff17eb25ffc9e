from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kl3m_nb.common import linalg
from kl3m_nb.common.files import sha256
from kl3m_nb.data import loader, tokenizer
from kl3m_nb.data.windows import PackedStream
from kl3m_nb.model import decoder
from kl3m_nb.model.roles import parameter_roles
from kl3m_nb.model.runtime import prepare_model
from kl3m_nb.optim import loss, objective, schedule
from kl3m_nb.profiles import get_profile
from kl3m_nb.runs import checkpoints, export, lineage
from kl3m_nb.runs.folder import read_run_profile, request_checkpoint
from kl3m_nb.runs.metrics import read_metrics
from kl3m_nb.spectra.subject import find_subject
from kl3m_nb.training import loop
from kl3m_nb.training.state import TrainingState
from tests.conftest import at_step, small_profile

ROOT = Path(__file__).resolve().parents[2]


def _losses(run_dir: Path) -> list[float]:
    return list(read_metrics(run_dir, "train").loss)


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def _interrupt_at(step: int):
    """A callback that asks the run to stop, as the notebook's stop button does, once `step` is
    reached.
    """
    return at_step(step, lambda: os.kill(os.getpid(), signal.SIGINT))


def test_training_learns_and_logs_every_step(trained_run):
    run_dir, result = trained_run
    train, held_out = read_metrics(run_dir, "train"), read_metrics(run_dir, "held_out")
    assert list(train.step) == [1, 2, 3, 4, 5, 6] and list(held_out.step) == [0, 3, 6]
    assert held_out.held_out_loss.iloc[0] == pytest.approx(math.log(512), abs=0.3)
    assert result.held_out_loss == held_out.held_out_loss.iloc[-1] < held_out.held_out_loss.iloc[0]
    assert list(train.tokens) == [128 * step for step in range(1, 7)] == list(train.valid_tokens)
    parts = (
        train.cross_entropy
        + train.label_smoothing
        + train.entropy_bonus
        + train.entropy_target
        + train.activation_norm
    )
    assert torch.allclose(torch.tensor(parts), torch.tensor(train.loss), atol=1e-5)
    assert set(read_metrics(run_dir, "clamp").step) == {2, 4, 6}


def test_a_run_that_ends_before_its_warmup_is_warned_of_once_and_trains(tmp_path, recwarn):
    def told() -> list[str]:
        return [
            text
            for warned in recwarn
            if (text := str(warned.message)).startswith("warmup_steps 9 is not below max_steps 3:")
        ]

    profile = small_profile(max_steps=3, warmup_steps=9)
    assert loop.train(profile, tmp_path / "run").step == 3
    assert len(told()) == 1
    rates = list(read_metrics(tmp_path / "run", "train").lr_muon)
    assert rates == sorted(rates) and rates[-1] < profile.muon_lr
    loop.train(profile, tmp_path / "run")  # complete: nothing is trained any more
    loop.train(small_profile(max_steps=3, warmup_steps=2), tmp_path / "other")
    assert len(told()) == 1


def test_the_logged_cross_entropy_is_the_models_own_on_the_streams_first_windows(tmp_path):
    profile = small_profile(max_steps=1, grad_accumulation=2)
    loop.train(profile, tmp_path / "run")
    tokens = tokenizer.load_tokenizer("corpus", profile.data.source, 512)
    windows = PackedStream(profile.data, tokens).next_batch(8)
    with torch.no_grad():
        logits = decoder.build_model(profile)(input_ids=windows[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1).double(), windows[:, 1:].flatten())
    assert read_metrics(tmp_path / "run", "train").cross_entropy.item() == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_accumulated_micro_batches_are_one_large_batch(tmp_path):
    whole = loop.train(
        small_profile(micro_batch=4, grad_accumulation=1, max_steps=4), tmp_path / "whole"
    )
    split = loop.train(
        small_profile(micro_batch=1, grad_accumulation=4, max_steps=4), tmp_path / "split"
    )
    assert _losses(tmp_path / "whole") == pytest.approx(_losses(tmp_path / "split"), rel=1e-4)
    assert whole.held_out_loss == pytest.approx(split.held_out_loss, rel=1e-4)


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    """In a run that goes on from a checkpoint, as every run after stacking does."""
    decoder.build_model(small_profile()).save_pretrained(tmp_path / "start")
    kept = {}
    for chosen in ("off", "on"):
        profile = small_profile(max_steps=3, gradient_checkpointing=chosen)
        kept[chosen] = []

        def keep(tensor, into=kept[chosen]):
            into.append(1)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loop.train(profile, tmp_path / chosen, init=tmp_path / "start")
    assert _losses(tmp_path / "off") == pytest.approx(_losses(tmp_path / "on"), rel=1e-6)
    assert len(kept["on"]) < len(kept["off"]) / 2


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("stop_at", [1, 4])
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, experts, stop_at):
    mixture = {"experts": experts, "active_experts": 2, "router_aux_loss": 0.05} if experts else {}
    profile = small_profile(**mixture, grad_accumulation=2)
    whole = loop.train(profile, tmp_path / "whole")
    with pytest.raises(
        KeyboardInterrupt, match=f"step {stop_at} is saved; training again continues"
    ):
        loop.train(profile, tmp_path / "run", callbacks=[_interrupt_at(stop_at)])
    assert checkpoints.checkpoint_step(checkpoints.latest_checkpoint(tmp_path / "run")) == stop_at
    resumed = loop.train(profile, tmp_path / "run")
    assert _losses(tmp_path / "run") == _losses(tmp_path / "whole")
    before, after = _weights(whole.checkpoint), _weights(resumed.checkpoint)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("packing", ["dense", "segments"])
def test_a_run_goes_on_in_smaller_micro_batches_with_the_same_windows(
    tmp_path, monkeypatch, packing
):
    taken = []

    def take(stream, spec, stop):
        share = loader.take_share(stream, spec, stop)
        taken.extend(row.tolist() for batch in share[0] for row in batch.input_ids)
        assert (
            max(map(len, share[0])) == spec.micro_batch and len(share[0]) == spec.grad_accumulation
        )
        return share

    monkeypatch.setattr(loop, "take_share", take)
    pairs = {"p_sft": 0.25, "seq_len": 256, "context": 256} if packing == "segments" else {}
    settings = {"packing": packing, "eval_every": 6, "checkpoint_every": 6, **pairs}
    whole = loop.train(small_profile(**settings), tmp_path / "whole")
    windows, losses = taken.copy(), _losses(tmp_path / "whole")
    taken.clear()
    with pytest.raises(KeyboardInterrupt):
        loop.train(small_profile(**settings), tmp_path / "run", callbacks=[_interrupt_at(2)])
    for micro_batch, stop_at in ((1, 4), (2, None)):
        smaller = small_profile(
            **settings, micro_batch=micro_batch, grad_accumulation=4 // micro_batch
        )
        with pytest.warns(
            UserWarning,
            match=f"with {4 // micro_batch} micro-batches of {micro_batch} windows instead of",
        ):
            with contextlib.nullcontext() if stop_at is None else pytest.raises(KeyboardInterrupt):
                loop.train(
                    smaller, tmp_path / "run", callbacks=[_interrupt_at(stop_at)] if stop_at else []
                )
    assert taken == windows
    assert _losses(tmp_path / "run") == pytest.approx(losses, rel=1e-5)
    assert read_run_profile(tmp_path / "run").data.micro_batch == 2
    (newest,) = checkpoints.whole_checkpoints(tmp_path / "run")[-1:]
    before, after = _weights(whole.checkpoint), _weights(newest)
    assert all(torch.allclose(before[name], after[name], atol=1e-4) for name in before)


def test_a_killed_run_continues_bit_for_bit(tmp_path):
    code = f"""
        import os, signal
        from tests.conftest import at_step, small_profile
        from kl3m_nb import training
        kill = at_step(5, lambda: os.kill(os.getpid(), signal.SIGKILL))
        training.train(small_profile(), {str(tmp_path / "run")!r}, callbacks=[kill])
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    resumed = loop.train(small_profile(), tmp_path / "run")
    whole = loop.train(small_profile(), tmp_path / "whole")
    assert _losses(tmp_path / "run") == _losses(tmp_path / "whole")
    before, after = _weights(whole.checkpoint), _weights(resumed.checkpoint)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_finished_run_is_not_trained_again(trained_run):
    run_dir, result = trained_run
    before = (run_dir / "metrics.jsonl").read_bytes()
    again = loop.train(small_profile(), run_dir)
    assert again == result and (run_dir / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="already holds"):
        loop.train(small_profile(), run_dir, resume="never")


def test_how_a_run_is_carried_out_may_change_on_resume_what_is_learned_may_not(trained_run):
    run_dir, result = trained_run
    assert loop.train(small_profile(eval_every=2, keep_checkpoints=5), run_dir) == result
    for other, words in (
        (small_profile(max_steps=9), "max_steps = 6, now it is 9"),
        (get_profile("tiny"), "profile tiny with"),
    ):
        with pytest.raises(ValueError, match=words):
            loop.train(other, run_dir)
    with pytest.raises(ValueError, match="random weights"):
        loop.train(small_profile(), run_dir, init=result.checkpoint)


def test_bad_input_writes_nothing(tmp_path, trained_run):
    _, result = trained_run
    cases = [
        (small_profile(), {"init": tmp_path / "missing"}, "no checkpoint folder"),
        (small_profile(layers=4), {"init": result.checkpoint}, "num_hidden_layers 2"),
        (small_profile(source=f"files:{tmp_path}/none*.jsonl"), {}, "No file matches"),
        (small_profile(tokenizer=str(tmp_path / "none")), {}, "could not be loaded"),
        (small_profile(held_out_windows=100_000), {}, "lower held_out_windows"),
        (small_profile(), {"resume": "maybe"}, "auto and never"),
    ]
    for profile, arguments, words in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            loop.train(profile, tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def _same(left, right) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.mark.parametrize("gradients_too", [True, False])
def test_a_non_finite_step_is_skipped_and_changes_nothing(tmp_path, monkeypatch, gradients_too):
    profile = small_profile(max_steps=3, clamp_every=0, checkpoint_every=1, keep_checkpoints=3)
    original, calls = objective.activation_penalty, []

    def poisoned(residual, *rest):
        calls.append(1)
        penalty = original(residual, *rest)
        if len(calls) == 2:
            return penalty * math.nan if gradients_too else penalty + math.nan
        return penalty

    monkeypatch.setattr(loss, "activation_penalty", poisoned)
    seen = {}

    def watch(row):
        if row["kind"] == "train":
            seen[row["step"]] = row["skipped"]
            assert math.isfinite(row["grad_norm"]) == (row["step"] != 2 or not gradients_too)
            if row["skipped"]:  # by itself such a step is not saved
                request_checkpoint(tmp_path / "run")

    loop.train(profile, tmp_path / "run", callbacks=[watch])
    assert seen == {1: False, 2: True, 3: False}
    first, second, third = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    before, after = checkpoints.load_state(first), checkpoints.load_state(second)
    for part in ("muon", "aux"):
        assert _same(after[part]["state"], before[part]["state"])
    assert _same([after["clip"], after["clamp"]], [before["clip"], before["clamp"]])
    assert after["counters"]["skipped"] == before["counters"]["skipped"] + 1
    assert all(
        torch.equal(weight, _weights(first)[name]) for name, weight in _weights(second).items()
    )
    assert any(
        not torch.equal(weight, _weights(first)[name]) for name, weight in _weights(third).items()
    )


def test_ten_bad_steps_in_a_row_stop_with_the_last_good_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(loss, "activation_penalty", lambda residual, *_: residual.sum() * math.nan)
    profile = small_profile(max_steps=30, clamp_every=0)
    with pytest.raises(loop.TrainingStopped, match="the gradient of model"):
        loop.train(profile, tmp_path / "run")
    saved = checkpoints.latest_checkpoint(tmp_path / "run")
    assert checkpoints.checkpoint_step(saved) == profile.runtime.checkpoint_every
    fresh = decoder.build_model(profile).state_dict()
    assert all(torch.equal(weight, fresh[name]) for name, weight in _weights(saved).items())
    for _ in range(
        4
    ):  # training again gets as many tries, and a restart loop pushes out no earlier checkpoint
        with pytest.raises(
            loop.TrainingStopped,
            match=rf"10 steps in a row .* Nothing has been learned since {saved}",
        ):
            loop.train(profile, tmp_path / "run")
        assert checkpoints.whole_checkpoints(tmp_path / "run") == [saved]


def test_bad_steps_push_out_no_checkpoint_of_step_0_either(tmp_path, monkeypatch):
    monkeypatch.setattr(loss, "activation_penalty", lambda residual, *_: residual.sum() * math.nan)

    def ask(row):
        if row["kind"] == "start":
            request_checkpoint(tmp_path / "run")

    with pytest.raises(loop.TrainingStopped, match=r"Nothing has been learned since .*step-000000"):
        loop.train(small_profile(max_steps=30, clamp_every=0), tmp_path / "run", callbacks=[ask])
    assert [path.name for path in checkpoints.whole_checkpoints(tmp_path / "run")] == [
        "step-000000"
    ]


def test_ten_bad_steps_at_the_end_of_a_run_are_evaluated_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(loss, "activation_penalty", lambda residual, *_: residual.sum() * math.nan)
    profile = small_profile(max_steps=10, clamp_every=5, eval_every=100)
    with pytest.raises(loop.TrainingStopped):
        loop.train(profile, tmp_path / "run")
    assert list(read_metrics(tmp_path / "run", "held_out").step) == [0, 10]
    assert set(read_metrics(tmp_path / "run", "clamp").step) == {5, 10}


def test_the_reason_named_is_that_of_the_first_bad_step(tmp_path, monkeypatch):
    calls = []

    def poisoned(residual, *_):
        calls.append(1)
        return residual.sum() * 0 + math.nan if len(calls) == 1 else residual.sum() * math.nan

    monkeypatch.setattr(loss, "activation_penalty", poisoned)
    with pytest.raises(loop.TrainingStopped, match="first in the loss;"):
        loop.train(small_profile(max_steps=30, clamp_every=0), tmp_path / "run")


@pytest.mark.parametrize(
    ("spoilt_after", "checkpoint_every", "newest"),
    [(4, 3, "step-000003"), (4, 1, "step-000003"), (1, 100, None)],
)
def test_a_weight_that_is_not_a_number_is_named_and_never_saved(
    tmp_path, monkeypatch, spoilt_after, checkpoint_every, newest
):
    prepare, prepared = prepare_model, []
    monkeypatch.setattr(
        loop, "prepare_model", lambda model, runtime: prepared.append(prepare(model, runtime))
    )

    def spoil():
        prepared[0].model.layers[1].mlp.up_proj.weight.data[3, 5] = math.nan

    profile = small_profile(clamp_every=0, checkpoint_every=checkpoint_every)
    with pytest.raises(loop.TrainingStopped) as stopped:
        loop.train(profile, tmp_path / "run", callbacks=[at_step(spoilt_after, spoil)])
    name = "model.layers.1.mlp.up_proj.weight"
    assert (
        f"the weight {name} is not finite after step {spoilt_after}, so nothing is saved;"
        in str(stopped.value)
    )
    assert (
        f"continues from {tmp_path}/run/checkpoints/{newest}"
        if newest
        else "there is no checkpoint"
    ) in str(stopped.value)
    saved = checkpoints.latest_checkpoint(tmp_path / "run")
    assert (saved and saved.name) == newest
    assert not saved or all(torch.isfinite(weight).all() for weight in _weights(saved).values())


def test_a_start_that_is_not_finite_is_refused_by_the_name_of_its_weight(tmp_path):
    model = decoder.build_model(small_profile())
    model.model.layers[0].self_attn.k_proj.weight.data[2, 2] = math.inf
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(
        ValueError,
        match=r"The weight model\.layers\.0\.self_attn\.k_proj\.weight of .*start is not finite",
    ):
        loop.train(small_profile(), tmp_path / "run", init=tmp_path / "start")
    assert not (tmp_path / "run").exists()


def test_no_clipped_step_is_lost_between_two_rows(tmp_path):
    """Nor at the end of the run, nor over a resume: here every step is clipped."""
    profile = small_profile(
        max_steps=8,
        log_every=3,
        clip_mode="fixed",
        clip_max_norm=1e-3,
        eval_every=5,
        checkpoint_every=4,
        clamp_every=0,
    )

    def crash(row):
        if row["kind"] == "held_out" and row["step"] == 5:
            raise SystemExit("a crash")

    with pytest.raises(SystemExit, match="a crash"):
        loop.train(profile, tmp_path / "run", callbacks=[crash])
    loop.train(profile, tmp_path / "run")
    rows = read_metrics(tmp_path / "run", "train")
    assert (
        list(rows.step) == [3, 6, 8]
        and list(rows.clipped) == [3, 3, 2]
        and list(rows.skipped) == [0, 0, 0]
    )


def test_the_clamp_holds_its_ceilings(tmp_path):
    profile = small_profile(
        attention_max_condition=3.0, mlp_max_condition=2.0, lm_head_max_condition=4.0, clamp_every=3
    )
    result = loop.train(profile, tmp_path / "run")
    assert read_metrics(tmp_path / "run", "clamp").raised.sum() > 0
    roles = parameter_roles(decoder.load_model(result.checkpoint))
    for name, weight in _weights(result.checkpoint).items():
        if ceiling := profile.clamp.max_condition(roles[name]):
            values = torch.linalg.svdvals(weight.double())
            assert values[0] / values[-1] <= ceiling * (1 + 1e-4), name


@pytest.mark.parametrize("route", ["decomposed", "tested"])
def test_the_conditions_on_the_card_are_those_of_the_saved_weights(tmp_path, monkeypatch, route):
    """The last step is clamped; its row of the log says which matrices were looked at."""
    if route == "tested":
        monkeypatch.setattr(linalg, "EIGENVALUES_UP_TO", 0)
    checkpoint = loop.train(
        small_profile(attention_max_condition=60.0), tmp_path / "run"
    ).checkpoint
    last = read_metrics(tmp_path / "run", "clamp").query("step == 6")
    assert set(last.route) == {"certified", "repaired", route}
    saved = decoder.load_model(checkpoint).state_dict()
    shown = dict(
        re.findall(
            r"^\| (attention|MLP|LM head) \| (.+) \|$", lineage.read_card(checkpoint), re.MULTILINE
        )
    )
    for name, modules in (("attention", "self_attn"), ("MLP", "mlp"), ("LM head", "embed_tokens")):
        of_group = last[last.name.str.contains(modules)]
        looked_at = of_group[of_group.route != "certified"]
        measured, median, maximum, certified = shown[name].split(" | ")
        assert measured == f"{len(looked_at)} of {len(of_group)}"
        assert certified == ("all" if looked_at.empty else str(len(of_group) - len(looked_at)))
        spectra = [torch.linalg.svdvals(saved[matrix].double()) for matrix in looked_at.name]
        true = [(sigma[0] / sigma[-1]).item() for sigma in spectra]
        for figure, expected in (
            ((median, statistics.median(true)), (maximum, max(true))) if true else ()
        ):
            at_least = (0.95 if route == "tested" else 0.999) * expected
            assert at_least - 0.05 <= float(figure) <= 1.001 * expected + 0.05, name
        assert true or median == maximum == "–"


def test_the_checkpoint_is_a_model_for_transformers_alone(trained_run, tmp_path):
    _, result = trained_run
    code = """
        import sys
        from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
        path = sys.argv[1]
        writer = pipeline("text-generation", model=path)
        written = writer("Governing Law.\\n", max_new_tokens=12, do_sample=True, temperature=0.8, top_p=0.95)
        assert written[0]["generated_text"].startswith("Governing Law.\\n")
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        inputs = tokenizer("The United States", return_tensors="pt", return_token_type_ids=False)
        outputs = model.generate(**inputs, max_new_tokens=5, do_sample=True, temperature=0.8, top_p=0.95)
        assert outputs.shape[1] > inputs["input_ids"].shape[1]
        assert tokenizer.pad_token_id == 2 and model.config.eos_token_id == 1 and str(model.dtype) == "torch.float32"
        assert not any(name.startswith("kl3m_nb") for name in sys.modules)
        print("loaded")
    """
    command = [sys.executable, "-I", "-c", textwrap.dedent(code), str(result.checkpoint)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.stdout.strip().endswith("loaded"), ended.stderr


def test_run_json_names_what_was_run(trained_run):
    run_dir, _ = trained_run
    assert read_run_profile(run_dir) == small_profile()
    assert json.loads((run_dir / "run.json").read_text())["init"] == "random weights"
    with pytest.raises(ValueError, match="no run folder"):
        read_run_profile(run_dir.parent)


@pytest.mark.parametrize("kind", ["start", "train", "held_out", "clamp", "checkpoint", "end"])
def test_a_callback_that_fails_ends_nothing_and_is_not_called_again(tmp_path, kind):
    failing, other = [], []

    def draw(row):
        failing.append(row["kind"])
        if row["kind"] == kind:
            raise ZeroDivisionError("no axis")

    with pytest.warns(
        UserWarning,
        match=r"The callback .*draw failed \(ZeroDivisionError: no axis\) and is not called again",
    ):
        result = loop.train(small_profile(), tmp_path / "run", callbacks=[draw, other.append])
    assert result.step == 6 and failing.count(kind) == 1 and failing[-1] == kind
    assert len(other) > 6


def _family_folder(checkpoint: Path, folder: Path) -> Path:
    """`checkpoint` as the family publishes a model: its files, an older transformers' config, and
    the kl3m-007 card's lines.
    """
    folder.mkdir()
    for name in (
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    config = json.loads((checkpoint / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(
        "# KL3M 500M, 7th Gen Model, Step 37000 (4x Stacked Architecture)\n\n## Training"
        " Progress\n\n- **Steps**: 37,000 / 100,000 planned\n- **Tokens Processed**: 3,917,824,000"
        " (~3.92B)\n- **Valid Tokens**: 3,914,825,728\n- **Dataset**:"
        " alea-institute/kl3m-data-sample-006-medium\n"
    )
    return folder


def test_a_checkpoint_of_the_family_is_continued(trained_run, tmp_path):
    folder = _family_folder(trained_run[1].checkpoint, tmp_path / "kl3m-007-500m-step37000")
    profile = small_profile(max_steps=100_000, warmup_steps=3, eval_every=2, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        loop.train(profile, tmp_path / "run", init=folder, callbacks=[_interrupt_at(37_005)])
    train, held_out = (
        read_metrics(tmp_path / "run", "train"),
        read_metrics(tmp_path / "run", "held_out"),
    )
    assert list(train.step) == list(range(37_001, 37_006)) and held_out.step.iloc[0] == 37_000
    assert (
        train.tokens.iloc[0] == 3_917_824_000 + 128
        and train.valid_tokens.iloc[0] == 3_914_825_728 + 128
    )
    assert held_out.held_out_loss.iloc[0] == pytest.approx(trained_run[1].held_out_loss, abs=1e-5)
    cosine = schedule.lr_factor(37_004, profile.schedule)
    assert list(train.lr_muon / profile.muon_lr) == pytest.approx(
        [1 / 3, 2 / 3, *[cosine] * 3], abs=1e-4
    )
    checkpoint = checkpoints.latest_checkpoint(tmp_path / "run")
    assert checkpoints.checkpoint_step(checkpoint) == 37_005
    assert (
        lineage.carried_counts(export.export_model(checkpoint, tmp_path)).tokens
        == train.tokens.iloc[-1]
    )
    steps = find_subject(tmp_path / "run").steps
    assert next(iter(steps)) == 37_000 and steps[37_000] == str(folder), (
        "what its spectra are drawn over begins there too"
    )
    with pytest.raises(KeyboardInterrupt):
        loop.train(profile, tmp_path / "run", init=folder, callbacks=[_interrupt_at(37_006)])
    assert list(read_metrics(tmp_path / "run", "train").step) == list(range(37_001, 37_007))
    with pytest.raises(ValueError, match="37,000 steps behind it and max_steps is 6"):
        loop.train(small_profile(), tmp_path / "other", init=folder)


def test_a_run_goes_on_without_what_it_was_started_from(trained_run, tmp_path):
    """Steps, tokens and what the card says of the stack were taken over when it began."""
    folder = _family_folder(trained_run[1].checkpoint, tmp_path / "kl3m-007-500m-step37000")
    stack = {
        "source": "a/source",
        "factor": 2,
        "order": "cyclic",
        "noise": 0.0,
        "source_layers": 1,
        "source_sha256": {},
    }
    (folder / "stack.json").write_text(json.dumps(stack))
    profile = small_profile(max_steps=37_004, checkpoint_every=2, growth_factor=2)
    with pytest.raises(KeyboardInterrupt):
        loop.train(profile, tmp_path / "run", init=folder, callbacks=[_interrupt_at(37_002)])
    shutil.rmtree(folder)
    result = loop.train(profile, tmp_path / "run", init=folder)
    assert list(read_metrics(tmp_path / "run", "train").step) == list(range(37_001, 37_005))
    assert read_metrics(tmp_path / "run", "train").tokens.iloc[-1] == 3_917_824_000 + 4 * 128
    assert "G_stack" in (result.checkpoint / "README.md").read_text()


def test_how_a_mixture_uses_its_experts_is_logged(tmp_path):
    profile = small_profile(
        experts=4, active_experts=2, sliding_window=16, router_aux_loss=0.05, grad_accumulation=2
    )
    loop.train(profile, tmp_path / "run")
    used = read_metrics(tmp_path / "run", "experts")
    assert sorted(used.step.unique()) == [3, 6] and len(used) == 2 * 2 * 4
    assert used.groupby(["step", "layer"]).share.sum().tolist() == pytest.approx(
        [1.0] * 4, abs=1e-4
    )
    assert (
        used.least_share.tolist() == used.groupby(["step", "layer"]).share.transform("min").tolist()
    )
    # of the choices of all micro-batches: 2 × 256 tokens
    assert (used.share * 2 * 256 % 1).round(2).isin([0.0, 1.0]).all()
    assert (read_metrics(tmp_path / "run", "train").router_loss > 0).all()


def test_an_idle_expert_is_warned_of_once_for_its_layer(tmp_path, monkeypatch):
    """Layer 1 sends nothing to expert 3, of which the router's bias cannot be learned away in six
    steps.
    """
    original = loss.training_loss

    def biased(model, *arguments):
        with torch.no_grad():
            model.model.layers[1].mlp.gate.weight[3] = 0.0
            model.model.layers[1].mlp.gate.weight[:3] = 10.0 * torch.eye(3, 32) - 10.0 * torch.eye(
                3, 32
            ).roll(1, 0)
        return original(model, *arguments)

    monkeypatch.setattr(loop, "training_loss", biased)
    profile = small_profile(experts=4, active_experts=1, router_aux_loss=0.05, eval_every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.train(profile, tmp_path / "run")
    remarks = [str(warning.message) for warning in caught if "layer 1 " in str(warning.message)]
    assert len(remarks) == 1 and "expert 3" in remarks[0] and "step 1" in remarks[0]


def test_a_mixture_trained_with_the_loss_of_an_earlier_version_goes_on_and_says_so_once(
    tmp_path, monkeypatch
):
    profile = small_profile(experts=4, active_experts=2, router_aux_loss=0.05)
    state_dict = TrainingState.state_dict

    def older(self):
        state = state_dict(self)
        del state["router_loss"]
        state["clip"] = {"norm_ema": 30.0}
        return state

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingState, "state_dict", older)
        loop.train(profile, tmp_path / "run", callbacks=[_interrupt_at(2)])
    with (
        pytest.warns(UserWarning, match="up to 2 .* pooled all layers"),
        pytest.raises(KeyboardInterrupt),
    ):
        loop.train(profile, tmp_path / "run", callbacks=[_interrupt_at(4)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.train(profile, tmp_path / "run")
    assert not [warning for warning in caught if "pooled" in str(warning.message)]
    assert list(read_metrics(tmp_path / "run", "train").step) == [1, 2, 3, 4, 5, 6]


def test_every_checkpoint_has_a_card_of_its_own(trained_run):
    run_dir, result = trained_run
    for checkpoint in checkpoints.whole_checkpoints(run_dir):
        text = (checkpoint / "README.md").read_text()
        step = checkpoints.checkpoint_step(checkpoint)
        assert (
            f"# tiny-2-layers-step{step}\n" in text
            and f"**Tokens Processed**: {128 * step:,}\n" in text
        )
    assert f"**Held-out loss**: {result.held_out_loss:.4f} nats per token" in text
    assert "| attention |" in text and "random weights" in text


def test_a_run_that_another_process_began_and_left_meanwhile_is_not_written_over(
    tmp_path, monkeypatch
):
    original = decoder.build_model

    def slowly(profile, **options):
        monkeypatch.setattr(decoder, "build_model", original)
        loop.train(profile, tmp_path / "run")
        return original(profile, **options)

    monkeypatch.setattr(decoder, "build_model", slowly)
    with pytest.raises(ValueError, match=r"Another process has trained in .* meanwhile"):
        loop.train(small_profile(), tmp_path / "run")
    assert list(read_metrics(tmp_path / "run", "train").step) == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_an_earlier_version_is_continued(tmp_path):
    """It did not hold everything that a card says now, and its conditions were from before the
    repair, or bounds.
    """
    profile, run_dir = small_profile(clamp_every=5), tmp_path / "run"
    whole = loop.train(profile, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-000006")
    older = run_dir / "checkpoints" / "step-000003"
    state = checkpoints.load_state(older)
    del state["losses"], state["stack"]
    state["conditions"] = {"step": 2, "by_role": {"attention": (777.0, 999.0)}}
    file = older / "training_state" / "state.pt"
    torch.save(state, file)
    manifest = json.loads((older / checkpoints.MANIFEST).read_text())
    manifest["files"]["training_state/state.pt"] = {
        "bytes": file.stat().st_size,
        "sha256": sha256(file),
    }
    (older / checkpoints.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(KeyboardInterrupt):
        loop.train(profile, run_dir, callbacks=[_interrupt_at(4)])
    card = lineage.read_card(run_dir / "checkpoints" / "step-000004")
    assert (
        "777.0" not in card
        and "not known: no clamp has come since this run began or was last continued" in card
    )
    result = loop.train(profile, run_dir)
    assert result.held_out_loss == whole.held_out_loss
    assert "as the clamp of step 5 left them, 1 training step before" in lineage.read_card(
        result.checkpoint
    )
