from __future__ import annotations

import gzip
import itertools
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kl3m_nb.common import distributed
from kl3m_nb.runs import checkpoints
from kl3m_nb.runs.metrics import read_metrics
from kl3m_nb.training import loop
from tests.conftest import at_step, small_profile

# Ceilings so low that the clamp has something to repair on every rank.
CLAMPED = {"attention_max_condition": 3.0, "mlp_max_condition": 2.0, "lm_head_max_condition": 4.0}
DENSE = {"max_steps": 6, **CLAMPED}  # one micro-batch a step: its windows are dealt out
SEGMENTS = {
    "max_steps": 4,
    "packing": "segments",
    "vocabulary": 900,
    "clamp_every": 0,
}  # ranks have unequal numbers of valid labels
MIXTURE = {  # of segments, so that ranks have unequal numbers of routed tokens too
    "max_steps": 6,
    "micro_batch": 2,
    "grad_accumulation": 4,
    "experts": 4,
    "active_experts": 2,
    "router_aux_loss": 0.05,
    "packing": "segments",
    "vocabulary": 900,
}


def _losses(run_dir) -> list[float]:
    return list(read_metrics(run_dir, "train").loss)


def _weights(run_dir) -> dict[str, torch.Tensor]:
    return load_file(checkpoints.require_checkpoint(run_dir) / "model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Run folders of the profiles above, trained by one process."""
    folders = {
        name: tmp_path_factory.mktemp("alone") / name for name in ("dense", "segments", "mixture")
    }
    loop.train(small_profile(**DENSE), folders["dense"])
    loop.train(small_profile(**SEGMENTS), folders["segments"])
    loop.train(small_profile(**MIXTURE), folders["mixture"])
    return folders


def _assert_same_run(run_dir, other):
    assert _losses(run_dir) == pytest.approx(_losses(other), rel=2e-5)
    assert list(read_metrics(run_dir, "train").valid_tokens) == list(
        read_metrics(other, "train").valid_tokens
    )
    ours, theirs = _weights(run_dir), _weights(other)
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=2e-4) for name in theirs)


@pytest.mark.parametrize(
    ("ranks", "name", "profile"),
    [(2, "dense", DENSE), (2, "segments", SEGMENTS), (4, "mixture", MIXTURE)],
)
def test_several_processes_train_what_one_does(
    warm_processes, tmp_path, alone, ranks, name, profile
):
    assert warm_processes.train(ranks, tmp_path / "run", profile) == [0] * ranks, (
        tmp_path / "run.log"
    ).read_text()
    _assert_same_run(tmp_path / "run", alone[name])
    if name == "dense":
        assert (
            read_metrics(tmp_path / "run", "clamp").raised.sum()
            == read_metrics(alone[name], "clamp").raised.sum()
            > 0
        )


def test_gradients_are_reduced_once_a_step_whatever_is_accumulated(warm_processes, tmp_path):
    counts = {}
    for accumulation in (2, 6):
        profile = {
            "max_steps": 3,
            "micro_batch": 1,
            "grad_accumulation": accumulation,
            "clamp_every": 0,
        }
        assert warm_processes.train(
            2, tmp_path / f"run{accumulation}", profile, count_reductions=True
        ) == [0, 0]
        counts[accumulation] = len(
            (tmp_path / f"run{accumulation}.reductions-1").read_text().splitlines()
        )
    assert counts[2] == counts[6] > 0 and counts[2] % 3 == 0


def test_a_run_of_four_goes_on_with_two_and_with_one(warm_processes, tmp_path, alone):
    stopping = {"rank": 3, "call": 2, "kind": "stop"}
    assert warm_processes.train(4, tmp_path / "run", DENSE, stopping) == [130] * 4, (
        tmp_path / "run.log"
    ).read_text()
    assert _losses(tmp_path / "run") == pytest.approx(_losses(alone["dense"])[:2], rel=2e-5)
    assert (
        warm_processes.train(2, tmp_path / "run", DENSE, {"rank": 0, "call": 2, "kind": "stop"})
        == [130] * 2
    )
    assert checkpoints.latest_checkpoint(tmp_path / "run").name == "step-000004"
    loop.train(small_profile(**DENSE), tmp_path / "run")
    _assert_same_run(tmp_path / "run", alone["dense"])


def test_shards_train_what_whole_models_do_and_their_checkpoints_are_the_same(
    warm_processes, tmp_path, alone
):
    stopping = {"rank": 1, "call": 3, "kind": "stop"}
    assert (
        warm_processes.train(2, tmp_path / "run", {**DENSE, "parallel": "fsdp"}, stopping)
        == [130] * 2
    ), (tmp_path / "run.log").read_text()
    assert (
        warm_processes.train(
            2, tmp_path / "run", {**DENSE, "parallel": "fsdp"}, {**stopping, "call": 2}
        )
        == [130] * 2
    )
    assert len(_losses(tmp_path / "run")) == 5
    loop.train(small_profile(**DENSE), tmp_path / "run")
    _assert_same_run(tmp_path / "run", alone["dense"])


def test_sharded_experts_train_what_whole_ones_do(warm_processes, tmp_path, alone):
    profile = {**MIXTURE, "parallel": "fsdp", "gradient_checkpointing": "on"}
    assert warm_processes.train(2, tmp_path / "run", profile) == [0, 0], (
        tmp_path / "run.log"
    ).read_text()
    _assert_same_run(tmp_path / "run", alone["mixture"])


def test_shards_that_do_not_come_out_even_train_the_same_and_keep_the_same_optimizer_state(
    warm_processes, tmp_path
):
    """32, 512 and 4 experts in three shards: some are shorter, those of the experts 2, 2 and 0."""
    profile = {
        "max_steps": 4,
        "micro_batch": 1,
        "grad_accumulation": 3,
        "experts": 4,
        "active_experts": 2,
        **CLAMPED,
    }
    loop.train(small_profile(**profile), tmp_path / "alone")
    assert warm_processes.train(3, tmp_path / "run", {**profile, "parallel": "fsdp"}) == [0] * 3
    _assert_same_run(tmp_path / "run", tmp_path / "alone")
    ours, theirs = (
        checkpoints.load_state(checkpoints.require_checkpoint(tmp_path / name))
        for name in ("run", "alone")
    )
    for optimizer in ("muon", "aux"):
        for index, state in theirs[optimizer]["state"].items():
            for name, value in state.items():
                assert torch.allclose(
                    ours[optimizer]["state"][index][name],
                    value,
                    rtol=1e-3,
                    atol=1e-4 * value.abs().max(),
                )


@pytest.mark.parametrize(("kind", "code"), [("kill", -9), ("error", 1)])
def test_a_rank_that_dies_ends_the_job_and_the_next_one_goes_on(
    warm_processes, tmp_path, alone, kind, code
):
    codes = warm_processes.train(2, tmp_path / "run", DENSE, {"rank": 1, "call": 5, "kind": kind})
    assert codes[1] == code and codes[0] not in (
        0,
        999,
    ), "the surviving rank has to end by itself, with an error"
    log = (tmp_path / "run.log").read_text()
    words = (
        ("no memory for the activations",)
        if kind == "error"
        else ("closed by peer", "Connection reset", "Broken pipe")
    )
    assert any(word in log for word in words)
    assert warm_processes.train(2, tmp_path / "run", DENSE) == [0, 0]
    _assert_same_run(tmp_path / "run", alone["dense"])


def test_a_stop_while_one_rank_has_no_data_saves_the_last_whole_step(
    warm_processes, tmp_path, alone
):
    codes = warm_processes.train(
        2, tmp_path / "run", DENSE, {"rank": 1, "call": 2, "kind": "stall"}
    )
    assert codes == [130, 130], (tmp_path / "run.log").read_text()
    assert (
        2
        <= checkpoints.checkpoint_step(checkpoints.require_checkpoint(tmp_path / "run"))
        < DENSE["max_steps"]
    )
    assert warm_processes.train(2, tmp_path / "run", DENSE) == [0, 0]
    _assert_same_run(tmp_path / "run", alone["dense"])


def test_ranks_that_are_started_again_do_not_meet_the_addresses_of_dead_ones(
    warm_processes, tmp_path
):
    codes = warm_processes.call("join_again", attempts=6, run_dir=str(tmp_path / "run"))
    assert codes == [[0, 0]] * 6, (tmp_path / "run.log").read_text()


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(warm_processes, tmp_path):
    fault = {"rank": 1, "call": 2, "kind": "nan"}
    assert warm_processes.train(2, tmp_path / "run", {"max_steps": 4, "clamp_every": 0}, fault) == [
        0,
        0,
    ]
    assert list(read_metrics(tmp_path / "run", "train").skipped) == [False, True, False, False]
    assert all(torch.isfinite(weight).all() for weight in _weights(tmp_path / "run").values())


def test_windows_that_cannot_be_shared_are_refused_by_all_ranks(warm_processes, tmp_path):
    assert warm_processes.train(3, tmp_path / "run", DENSE) == [1, 1, 1]
    assert (
        "A step of 4 windows cannot be shared evenly by 3 processes"
        in (tmp_path / "run.log").read_text()
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed is 7 in process 0 and 1 in process 1"),
        ({"micro_batch": 2}, "micro_batch is 4 in process 0 and 2 in process 1"),
        ({"checkpoint_every": 5}, "checkpoint_every is 3 in process 0 and 5 in process 1"),
    ],
)
def test_processes_with_different_settings_are_refused_by_all(
    warm_processes, tmp_path, change, words
):
    assert warm_processes.train(2, tmp_path / "run", DENSE, last_rank=change) == [1, 1]
    assert (tmp_path / "run.log").read_text().count(f"ValueError: {words}") == 2
    assert not (tmp_path / "run").exists()


def _own_folders(tmp_path, ranks: int) -> list[str]:
    folders = [tmp_path / f"machine{rank}" for rank in range(ranks)]
    for folder in folders:
        folder.mkdir()
    return [str(folder) for folder in folders]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            gzip.compress(b'{"tokens": [9, 9, 9, 9]}\n' * 10),
            "process 1 has read other documents than process 0; give both the",
        ),
        (b"cut off", "process 1: ValueError: /proc/self/cwd/b.jsonl.gz is cut off, damaged"),
    ],
)
def test_data_that_is_different_or_broken_on_one_machine_stops_all_of_them(
    warm_processes, tmp_path, alone, other, words
):
    rows = [
        json.dumps({"identifier": f"d{number}", "tokens": [5 + number] * 40}).encode() + b"\n"
        for number in range(60)
    ]
    places = _own_folders(tmp_path, 2)
    for place, end in zip(places, (gzip.compress(b"".join(rows[50:])), other), strict=True):
        (Path(place) / "a.jsonl").write_bytes(b"".join(rows[:50]))
        (Path(place) / "b.jsonl.gz").write_bytes(end)
    tokenizer = str(checkpoints.latest_checkpoint(alone["dense"]))
    profile = {
        "source": "files:/proc/self/cwd/*",
        "tokenizer": tokenizer,
        "shuffle_buffer": 2,
        "held_out_windows": 1,
    }
    assert warm_processes.train(
        2, tmp_path / "run", {**profile, "max_steps": 30}, places=places
    ) == [1, 1]
    log = (tmp_path / "run.log").read_text()
    assert log.count(f"could not be read ({words}") == 2, log
    assert (
        checkpoints.checkpoint_step(checkpoints.latest_checkpoint(tmp_path / "run"))
        == len(_losses(tmp_path / "run"))
        > 5
    )


def test_a_run_folder_that_one_machine_does_not_see_is_refused_by_all(warm_processes, tmp_path):
    places = _own_folders(tmp_path, 2)
    seen = "/proc/self/cwd/run"
    assert warm_processes.train(2, tmp_path / "run", DENSE, places=places, seen_run_dir=seen) == [
        1,
        1,
    ]
    log = (tmp_path / "run.log").read_text()
    assert (
        log.count(
            f"does not see {seen}/run.json as process 0 does; put the run folder where all machines"
            " have it"
        )
        == 2
    )
    with pytest.raises(KeyboardInterrupt):
        loop.train(
            small_profile(**DENSE),
            Path(places[0]) / "run",
            callbacks=[at_step(3, lambda: signal.raise_signal(signal.SIGTERM))],
        )
    assert warm_processes.train(2, tmp_path / "run", DENSE, places=places, seen_run_dir=seen) == [
        1,
        1,
    ]
    assert (
        "step-000003/training_state/manifest.json as process 0 does"
        in (tmp_path / "run.log").read_text()
    )


def test_a_start_that_is_another_model_on_one_machine_is_refused_by_all(
    warm_processes, tmp_path, alone
):
    places = _own_folders(tmp_path, 2)
    for place in places:
        shutil.copytree(checkpoints.latest_checkpoint(alone["dense"]), Path(place) / "model")
    weights = load_file(Path(places[1]) / "model" / "model.safetensors")
    save_file(
        {**weights, "model.norm.weight": weights["model.norm.weight"] * 1.001},
        Path(places[1]) / "model/model.safetensors",
    )
    profile, start = {**DENSE, "parallel": "fsdp"}, "/proc/self/cwd/model"
    assert warm_processes.train(2, tmp_path / "run", profile, places=places, init=start) == [1, 1]
    assert (tmp_path / "run.log").read_text().count(
        f"ValueError: the checksum of the weights in {start} is "
    ) == 2
    assert not (tmp_path / "run").exists()


def test_a_command_that_one_machine_refuses_is_refused_by_all(warm_processes, tmp_path, alone):
    places = _own_folders(tmp_path, 2)
    shutil.copytree(alone["dense"], Path(places[0]) / "run")
    arguments = {
        "run_dir": str(tmp_path / "run"),
        "words": ["train", "--run-dir", "/proc/self/cwd/run"],
        "places": places,
    }
    codes = warm_processes.call("run_ranks", ranks=2, work="command", arguments=arguments)
    log = (tmp_path / "run.log").read_text()
    assert codes == [2, 2] and "kl3m_nb: process 1: /proc/self/cwd/run is no run folder" in log, log


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(
        ValueError,
        match=r"has started 8 processes on .*, where 4 GPUs are seen; .* --nproc-per-node 4",
    ):
        distributed._own_gpu()


def test_one_process_is_its_own_world(monkeypatch):
    assert distributed.world() == distributed.World(0, 1) and distributed.world().is_first
    assert distributed.sum_over_ranks([1, 2.5]) == [1, 2.5] and distributed.gather("a") == ["a"]
    with pytest.raises(ValueError, match="no"):
        distributed.on_first_rank(lambda: int("no"))
    weight = torch.randn(4, 3)
    assert distributed.local(weight) is distributed.whole(weight) is weight


def test_owners_share_the_cost(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: distributed.World(0, 3))
    costs = [9.0, 1.0, 5.0, 4.0, 3.0, 5.0]
    owners = distributed.balanced_owners(costs)
    loads = [
        sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank)
        for rank in range(3)
    ]
    best = min(
        max(
            sum(cost for cost, owner in zip(costs, dealt, strict=True) if owner == rank)
            for rank in range(3)
        )
        for dealt in itertools.product(range(3), repeat=len(costs))
    )
    assert sum(loads) == sum(costs) and max(loads) <= 4 / 3 * best  # Graham's bound for this rule
