from __future__ import annotations

import contextlib
import copy
import io
import random

import numpy as np
import pytest
import torch

from kl3m_nb.common.stopping import StopRequest
from kl3m_nb.runs import checkpoints
from kl3m_nb.runs.folder import RunLock
from kl3m_nb.training import loop
from kl3m_nb.training.state import random_state, set_random_state
from tests.conftest import small_profile


def _draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        *torch.randn(3).tolist(),
    ]


def test_all_generators_go_on_where_the_state_was_taken():
    """Taken between the two halves of a pair of normal numbers, stored as a
    checkpoint stores it.
    """
    random.gauss(0, 1), np.random.randn(), torch.randn(1)
    file = io.BytesIO()
    torch.save(random_state(), file)
    expected = _draw()
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert _draw() == expected


def test_the_state_of_a_checkpoint_has_the_keys_that_other_versions_read(trained_run):
    """The format of training_state: a key that is renamed makes earlier checkpoints unreadable."""
    state = checkpoints.load_state(trained_run[1].checkpoint)
    assert {key: type(value) for key, value in state.items()} == {
        **dict.fromkeys(("counters", "losses", "conditions", "stack", "muon", "aux"), dict),
        **dict.fromkeys(("clip", "clamp", "stream", "random"), dict),
        **dict.fromkeys(("router_loss", "metrics_tail"), str),
        "metrics_position": int,
    }
    assert state["counters"].keys() == {
        "first_step",
        "step",
        "tokens",
        "valid_tokens",
        "seconds",
        "skipped",
        "skipped_in_a_row",
        "clipped_since_row",
        "clamped_step",
    }
    assert state["losses"].keys() == {"held_out_loss", "held_out_step", "cross_entropy"}
    assert state["conditions"].keys() == {"step", "groups"}
    assert state["muon"].keys() == state["aux"].keys() == {"state", "param_groups"}
    assert state["random"].keys() == {"python", "numpy", "torch", "cuda"}
    assert state["counters"]["step"] == state["losses"]["held_out_step"] == 6


@contextlib.contextmanager
def _trainer(run_dir, **settings):
    with RunLock(run_dir) as lock, StopRequest() as stop:
        trainer = loop.Trainer(small_profile(**settings), run_dir, None, None, [], lock)
        yield trainer, stop
        for part in (trainer.saver, trainer.state.stream, trainer.log):
            part.close()


def _assert_same(first, second) -> None:
    """Compares two nested states, tensors bit for bit."""
    if isinstance(first, dict):
        assert list(first) == list(second)
        first, second = list(first.values()), list(second.values())
    if isinstance(first, (list, tuple)):
        for one, other in zip(first, second, strict=True):
            _assert_same(one, other)
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second)
    else:
        assert first == second or (first != first and second != second)


@pytest.mark.parametrize("experts", [{}, {"experts": 4, "active_experts": 2}])
def test_a_state_that_is_loaded_is_the_one_that_was_saved(tmp_path, experts):
    with _trainer(tmp_path / "first", **experts) as (trainer, stop):
        for _ in range(3):
            assert trainer.step(stop)
        saved = copy.deepcopy(trainer.state.state_dict())
    torch.randn(1), np.random.randn(), random.gauss(0, 1)
    with _trainer(tmp_path / "second", **experts) as (trainer, _):
        trainer.state.load_state_dict(copy.deepcopy(saved))
        _assert_same(trainer.state.state_dict(), saved)
    assert saved["counters"]["step"] == 3 and saved["counters"]["clamped_step"] == 2
    assert saved["muon"]["state"] and saved["aux"]["state"]


def test_a_stop_within_a_step_leaves_the_state_of_the_step_before(tmp_path, monkeypatch):
    """The batch of the step that is broken off was taken already."""
    with _trainer(tmp_path / "run", micro_batch=1, grad_accumulation=4) as (trainer, stop):
        assert trainer.step(stop)
        before = copy.deepcopy(trainer.state.state_dict())
        weights = copy.deepcopy(trainer.model.state_dict())
        part = trainer._forward_backward

        def asked(*arguments):
            stop.requested = True
            return part(*arguments)

        monkeypatch.setattr(trainer, "_forward_backward", asked)
        assert not trainer.step(stop)
        after = trainer.state.state_dict()
        with pytest.raises((AssertionError, ValueError)):
            _assert_same(trainer.state.stream.state_dict(), before["stream"])
        for optimizer in (before["muon"], before["aux"], after["muon"], after["aux"]):
            for group in optimizer["param_groups"]:
                del group["lr"]  # set anew at the beginning of every step
        _assert_same(after, before)
        _assert_same(dict(trainer.model.state_dict()), dict(weights))


def test_an_error_while_the_weights_change_leaves_the_state_marked(tmp_path):
    with _trainer(tmp_path / "run") as (trainer, _):
        with trainer.state.changing_weights():
            assert not trainer.state.is_whole
        assert trainer.state.is_whole
        with pytest.raises(LookupError), trainer.state.changing_weights():
            raise LookupError("half changed")
        assert not trainer.state.is_whole
