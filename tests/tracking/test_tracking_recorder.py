"""The JSONL files of a run: what is written, what survives, what is read back."""

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_dml.errors import RunError
from dist_dml.tracking import run_files
from dist_dml.tracking.recorder import Recorder, read_metrics
from dist_dml.tracking.waiting_lines import LineFile


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 64 KiB, which a file beside the run fills."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all space of the disk."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free))
    assert shutil.disk_usage(disk).free == 0
    return filler


def test_a_disk_that_is_full_for_a_while_loses_no_record_and_no_event(small_disk, capsys):
    recorder = Recorder(small_disk)
    recorder.note_artifact(small_disk / "config.yaml")
    recorder.record(1, 1, 1.0, {"loss": 1.0})
    filler = fill(small_disk)
    # What is left of the file's last page takes some lines and a part of one more.
    for step in range(2, 201):
        recorder.record(step, step, 1.0, {"loss": float(step), "accuracy": 0.5})
    for number in range(100):
        recorder.note_figure(small_disk / f"{number}.png")
    torn = (small_disk / "metrics.jsonl").read_bytes()
    assert not torn.endswith(b"\n")
    assert len(read_metrics(small_disk)["loss"].step) < 60
    filler.unlink()
    recorder.record(201, 201, 1.0, {"loss": 201.0})
    recorder.note_end("FINISHED")
    recorder.close()
    records = lines_of(small_disk / "metrics.jsonl")
    assert [r["step"] for r in records if r["name"] == "loss"] == list(range(1, 202))
    assert [r["step"] for r in records if r["name"] == "accuracy"] == list(range(2, 201))
    events = lines_of(small_disk / "artifacts.jsonl")
    names = ["config.yaml", *(f"{number}.png" for number in range(100))]
    assert [e["path"] for e in events[:-1]] == names
    assert events[-1]["status"] == "FINISHED"
    assert recorder.lost == 0
    begins, ends = capsys.readouterr().err.splitlines()
    assert "wait in memory (No space left on device)" in begins
    assert "that waited are written, none is lost" in ends


def test_what_waits_is_written_at_the_latest_when_the_files_are_closed(small_disk, capsys):
    recorder = Recorder(small_disk)
    filler = fill(small_disk)
    recorder.record(1, 1, 1.0, {"loss": 1.0})
    recorder.note_end("FINISHED")
    assert (small_disk / "metrics.jsonl").stat().st_size == 0
    filler.unlink()
    recorder.close()
    assert [r["step"] for r in lines_of(small_disk / "metrics.jsonl")] == [1]
    assert run_files.last_status(small_disk)["status"] == "FINISHED"
    assert "none is lost" in capsys.readouterr().err.splitlines()[-1]


def test_a_disk_that_stays_full_is_told_once_and_counted_at_the_end(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / "artifacts.jsonl").symlink_to("/dev/full")
    recorder = Recorder(tmp_path)
    for step in range(5):
        recorder.record(step, 0, 0.0, {"loss": 1.0, "accuracy": 0.5})
    recorder.note_end("FINISHED")
    assert recorder.lost == 0
    recorder.close()
    assert recorder.lost == 11
    begins, ends = capsys.readouterr().err.splitlines()
    assert "wait in memory (No space left on device)" in begins
    assert "11 records" in ends
    assert "are lost" in ends


def test_no_event_is_written_before_the_records_that_came_before_it(small_disk):
    recorder = Recorder(small_disk)
    recorder.note_artifact(small_disk / "config.yaml")  # Its page has room for more.
    fill(small_disk)
    recorder.record(1, 1, 1.0, {"loss": 1.0})
    recorder.note_end("FINISHED")
    assert run_files.last_status(small_disk) == {}
    recorder.close()
    assert run_files.last_status(small_disk)["status"] == "FINISHED"


def test_a_line_is_torn_at_any_byte_and_continued_there(tmp_path, monkeypatch):
    real_write = os.write
    expected = [{"n": n} for n in range(4)]
    block = b"".join(json.dumps(line).encode() + b"\n" for line in expected[1:])
    for taken in range(len(block) + 1):
        file = LineFile(tmp_path / f"{taken}.jsonl")
        assert file.append(b'{"n": 0}\n')
        # The kernel does the same when the disk fills up within a block.
        monkeypatch.setattr(os, "write", lambda fd, rest, end=taken: real_write(fd, rest[:end]))
        assert file.append(block) == (taken == len(block))
        monkeypatch.undo()
        assert file.retry()
        file.close()
        assert lines_of(file.path) == expected
        assert file.lost == 0


def test_a_torn_line_that_another_process_ended_is_written_anew(tmp_path, monkeypatch):
    real_write = os.write
    line, foreign = b'{"path": "a.png"}\n', {"status": "KILLED"}
    for taken in range(len(line) + 1):
        folder = tmp_path / str(taken)
        folder.mkdir()
        file = LineFile(folder / run_files.EVENTS)
        file.open()
        monkeypatch.setattr(os, "write", lambda fd, rest, end=taken: real_write(fd, rest[:end]))
        file.append(line)
        monkeypatch.undo()
        run_files.append_event(folder, foreign)
        assert file.append(b'{"path": "b.png"}\n')
        file.close()
        found, _ = run_files.complete_lines(file.path, 0)
        assert sorted(map(str, found)) == sorted(
            map(str, [{"path": "a.png"}, foreign, {"path": "b.png"}])
        ), taken


def test_lines_beyond_the_memory_set_aside_are_lost_and_counted(small_disk):
    file = LineFile(small_disk / "lines", most_bytes=1000)
    file.open()
    filler = fill(small_disk)
    blocks = [f"{n:09d}\n".encode() * 10 for n in range(15)]
    for block in blocks:
        assert not file.append(block)
    assert file.lost == 50
    filler.unlink()
    assert file.append(b"last\n")
    file.close()
    assert file.path.read_bytes() == b"".join(blocks[:10]) + b"last\n"


def test_an_event_that_the_disk_takes_in_part_is_an_error_and_not_a_torn_line(small_disk):
    run_files.append_event(small_disk, {"path": "x" * 4000})
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        run_files.append_event(small_disk, {"path": "y" * 4000})
    assert len(run_files.complete_lines(small_disk / run_files.EVENTS, 0)[0]) == 1


def test_what_a_full_disk_does_not_take_whole_leaves_the_old_file_and_no_other(small_disk):
    before = run_files.identify_run(small_disk, {})
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        run_files.identify_run(small_disk, {"config_hash": "x" * 5000})
    assert run_files.read_json(small_disk / "run.json") == before
    assert {path.name for path in small_disk.iterdir()} == {"run.json", "filler"}


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
