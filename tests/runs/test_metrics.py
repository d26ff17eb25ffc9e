from __future__ import annotations

import json
import math

import pytest

from kl3m_nb.runs.metrics import MetricsLog, parse_row, read_metrics


def test_rows_come_back_by_kind_and_a_cut_line_is_passed_over(tmp_path):
    log = MetricsLog(tmp_path)
    log.append({"kind": "train", "step": 1, "loss": 2.5})
    log.append({"kind": "held_out", "step": 1, "held_out_loss": math.nan})
    log.append({"kind": "train", "step": 2, "loss": 2.0})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 3, "lo')
    assert read_metrics(tmp_path, "train").to_dict("list") == {"step": [1, 2], "loss": [2.5, 2.0]}
    assert read_metrics(tmp_path, "held_out").held_out_loss.isna().all()
    assert read_metrics(tmp_path, "clamp").empty


def test_reopening_at_a_position_forgets_what_came_later(tmp_path):
    log = MetricsLog(tmp_path)
    log.append({"kind": "train", "step": 1})
    position = log.position
    log.append({"kind": "train", "step": 2})
    log.close()
    again = MetricsLog(tmp_path, position)
    again.append({"kind": "train", "step": 20})
    again.close()
    assert list(read_metrics(tmp_path, "train").step) == [1, 20]


def test_that_a_checkpoint_was_written_is_kept_with_it(tmp_path):
    """It is logged behind the position that the checkpoint holds, and behind steps that a resume
    drops.
    """
    log = MetricsLog(tmp_path)
    log.append({"kind": "train", "step": 3})
    position = log.position
    log.append({"kind": "train", "step": 4})
    log.append({"kind": "checkpoint", "step": 3, "waited_seconds": 0.5})
    log.append({"kind": "checkpoint", "step": 4, "waited_seconds": 0.5})
    log.close()
    for _ in range(2):
        again = MetricsLog(tmp_path, position, step=3)
        again.append({"kind": "train", "step": 4})
        again.close()
        assert list(read_metrics(tmp_path, "checkpoint").step) == [3] and list(
            read_metrics(tmp_path, "train").step
        ) == [3, 4]
        assert again.position == (tmp_path / "metrics.jsonl").stat().st_size


def test_a_clamp_event_becomes_a_row_per_matrix(tmp_path):
    log = MetricsLog(tmp_path)
    log.append(
        {"kind": "clamp", "step": 5, "name": ["a", "b"], "sigma_max": [1.0, 2.0], "raised": [0, 3]}
    )
    log.close()
    frame = read_metrics(tmp_path, "clamp")
    assert list(frame.name) == ["a", "b"] and list(frame.step) == [5, 5]
    assert frame.raised.sum() == 3 and frame.sigma_max.dtype == float


def test_what_is_not_finite_is_null_in_lists_too_and_comes_back_as_nan(tmp_path):
    log = MetricsLog(tmp_path)
    log.append(
        {
            "kind": "clamp",
            "step": 5,
            "name": ["a", "b", "c"],
            "sigma_max": [math.nan, 2.0, math.inf],
            "tau": math.nan,
        }
    )
    log.close()
    line = (tmp_path / "metrics.jsonl").read_bytes()
    json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    frame = read_metrics(tmp_path, "clamp")
    assert (
        list(frame.sigma_max.isna()) == [True, False, True]
        and frame.sigma_max.dtype == float
        and frame.tau.isna().all()
    )
    assert list(map(math.isnan, parse_row(line)["sigma_max"])) == [True, False, True]


def test_a_line_cut_before_the_position_is_dropped_with_a_warning(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.append({"kind": "train", "step": step})
    position = log.position
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.warns(
        UserWarning, match=f"lost its end, {position - 10} of {position} bytes are left"
    ):
        again = MetricsLog(tmp_path, position)
    again.append({"kind": "train", "step": 4})
    again.close()
    assert list(read_metrics(tmp_path, "train").step) == [1, 2, 4]
    assert again.position == path.stat().st_size


def test_lines_that_are_not_the_logs_are_passed_over(tmp_path):
    lines = [
        b"[1]",
        b"3",
        b'{"step": 1}',
        b'{"kind": "train", "step": "1"}',
        b'{"kind": "train", "step": 1, "loss": {}}',
        b"\xff\xfe",
    ]
    (tmp_path / "metrics.jsonl").write_bytes(
        b"\n".join([*lines, b'{"kind": "train", "step": 2}\n'])
    )
    assert list(read_metrics(tmp_path, "train").step) == [2]


def test_null_is_not_a_number_again():
    assert math.isnan(parse_row(b'{"kind": "train", "loss": null}')["loss"])
    with pytest.raises(ValueError, match="is no row"):
        parse_row(b"[1]")


def test_what_no_checkpoint_vouches_for_is_put_back_where_the_file_lacks_it(tmp_path):
    log = MetricsLog(tmp_path)
    log.append({"kind": "train", "step": 1})
    log.vouched(log.position)
    assert not log.tail
    for step in (2, 3):
        log.append({"kind": "train", "step": step})
    position, tail = log.position, bytes(log.tail)
    log.append({"kind": "train", "step": 4})
    log.close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()[:position]
    assert whole.endswith(tail) and tail.count(b"\n") == 2
    for left in range(position - len(tail), len(path.read_bytes()) + 1):
        (tmp_path / str(left)).mkdir()
        (tmp_path / str(left) / "metrics.jsonl").write_bytes(path.read_bytes()[:left])
        again = MetricsLog(tmp_path / str(left), position, 3, tail)
        again.close()
        assert (
            tmp_path / str(left) / "metrics.jsonl"
        ).read_bytes() == whole and again.position == position
