"""The JSONL files of a run: what is written, what survives, what is read back."""

import json
import math
import os
from pathlib import Path

import pytest

from dist_dml.errors import RunError
from dist_dml.tracking import run_files
from dist_dml.tracking.recorder import Recorder, read_metrics


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refuse_constant(name: str) -> float:
    raise AssertionError(f"{name} is not standard JSON")


def test_a_record_is_one_object_a_line_with_the_agreed_keys(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.record(10, 1280, 1.5, {"train/loss": 2.5, "train/accuracy": 0.25})
    recorder.close()
    common = {"step": 10, "images_seen": 1280, "seconds": 1.5}
    assert lines_of(tmp_path / "metrics.jsonl") == [
        common | {"name": "train/loss", "value": 2.5},
        common | {"name": "train/accuracy", "value": 0.25},
    ]


def test_values_that_are_not_finite_stay_standard_json_and_come_back(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.record(1, 1, 0.0, {"a": math.nan, "b": math.inf, "c": -math.inf})
    recorder.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    values = [
        json.loads(line, parse_constant=refuse_constant)["value"] for line in text.splitlines()
    ]
    assert values == ["nan", "inf", "-inf"]
    metrics = read_metrics(tmp_path)
    assert math.isnan(metrics["a"].value[0])
    assert metrics["b"].value[0] == math.inf
    assert metrics["c"].value[0] == -math.inf


def test_a_step_recorded_twice_counts_as_recorded_last(tmp_path):
    first = Recorder(tmp_path)
    for step in (10, 20, 30):
        first.record(step, step, float(step), {"loss": step / 10})
    first.close()
    resumed = Recorder(tmp_path)
    for step in (30, 20, 40):
        resumed.record(step, step, float(step), {"loss": -step / 10})
    resumed.close()
    curve = read_metrics(tmp_path)["loss"]
    assert curve.step.tolist() == [10, 20, 30, 40]
    assert curve.value.tolist() == [1.0, -2.0, -3.0, -4.0]
    assert len(lines_of(tmp_path / "metrics.jsonl")) == 6  # Nothing is deleted.


def test_a_torn_last_line_is_left_out_and_does_not_spoil_what_follows(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.record(1, 1, 1.0, {"loss": 1.0})
    recorder.record(2, 2, 2.0, {"loss": 2.0})
    recorder.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert read_metrics(tmp_path)["loss"].step.tolist() == [1]
    resumed = Recorder(tmp_path)
    resumed.record(3, 3, 3.0, {"loss": 3.0})
    resumed.close()
    assert read_metrics(tmp_path)["loss"].step.tolist() == [1, 3]


def test_a_full_disk_loses_records_warns_once_and_never_raises(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / "artifacts.jsonl").symlink_to("/dev/full")
    recorder = Recorder(tmp_path)
    for step in range(5):
        recorder.record(step, 0, 0.0, {"loss": 1.0, "accuracy": 0.5})
    recorder.note_end("FINISHED")
    recorder.close()
    assert recorder.lost == 11
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "No space left" in warning


def test_a_write_that_fits_in_part_loses_only_what_is_torn(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path)
    recorder.record(1, 1, 1.0, {"loss": 1.0})
    real_write = os.write
    # The kernel does the same when the disk fills up within a block: here, in the second line.
    monkeypatch.setattr(os, "write", lambda fd, block: real_write(fd, block[:100]))
    recorder.record(2, 2, 2.0, {"loss": 2.0, "accuracy": 0.5, "rate": 3.0})
    monkeypatch.undo()
    recorder.record(3, 3, 3.0, {"loss": 3.0})
    recorder.close()
    metrics = read_metrics(tmp_path)
    assert recorder.lost == 2
    assert metrics["loss"].step.tolist() == [1, 2, 3]
    assert set(metrics) == {"loss"}


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    with pytest.raises(RunError, match=r"run\.root") as refusal:
        Recorder(tmp_path / "absent")
    assert "\n" not in str(refusal.value)


def test_lines_are_followed_by_offset_however_small_the_blocks(tmp_path):
    recorder = Recorder(tmp_path)
    for step in range(50):
        recorder.record(step, step, 0.0, {"loss": float(step)})
    recorder.close()
    path = tmp_path / "metrics.jsonl"
    steps, offset = [], 0
    while offset < path.stat().st_size:
        lines, offset = run_files.complete_lines(path, offset, most_bytes=100)
        steps += [line["step"] for line in lines]
    assert steps == list(range(50))
    assert run_files.complete_lines(path, offset) == ([], offset)


def test_the_identity_outlives_restarts_and_takes_new_facts(tmp_path):
    first = run_files.identify_run(tmp_path, {"config_hash": "a", "git_commit": "x"})
    again = run_files.identify_run(tmp_path, {"config_hash": "b"})
    assert again == first | {"config_hash": "b"}


def test_the_last_word_of_a_superseded_attempt_is_not_listened_to(tmp_path):
    killed = run_files.start_attempt(tmp_path)
    recorder = Recorder(tmp_path)
    resumed = run_files.start_attempt(tmp_path)
    run_files.append_event(tmp_path, {"status": "KILLED", "attempt": killed, "time": 0.0})
    status = run_files.last_status(tmp_path)
    assert (status["status"], status["attempt"]) == ("RUNNING", resumed)
    recorder.note_end("FINISHED")
    recorder.close()
    status = run_files.last_status(tmp_path)
    assert (status["status"], status["attempt"]) == ("FINISHED", resumed)


def test_figures_are_noted_with_paths_relative_to_the_run(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.note_figure(tmp_path / "report" / "curves.png")
    recorder.note_artifact(tmp_path / "config.yaml")
    recorder.close()
    assert lines_of(tmp_path / "artifacts.jsonl") == [
        {"path": "report/curves.png", "folder": "report"},
        {"path": "config.yaml", "folder": ""},
    ]
