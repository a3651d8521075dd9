"""Runs above others, and runs as tables."""

import json
import warnings
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet
import pytest

from dist_dml.cli import main
from dist_dml.config import Config
from dist_dml.config_loading import resolve, to_yaml
from dist_dml.errors import UsageError
from dist_dml.tracking import run_files
from dist_dml.tracking.destination import destination_of
from dist_dml.tracking.mlflow_run import connect
from dist_dml.tracking.parent_run import (
    parent_run,
    shortened,
    sync_below,
    words_of_child,
    write_child,
)
from dist_dml.tracking.recorder import Recorder


def configured(root: Path, name: str, *words: str) -> Config:
    given = [f"run.root={root}", f"run.name={name}", "tracking.mlflow=false", *words]
    return resolve(None, given).config


def trained(root: Path, name: str, *words: str, loss: float = 1.0) -> Path:
    """A run as a training leaves it: three steps, one of them written twice."""
    config = configured(root, name, *words)
    folder = root / name
    folder.mkdir(parents=True)
    run_files.identify_run(folder, {"config_hash": "c0", "mlflow.note": "x"})
    (folder / "config.yaml").write_text(to_yaml(config))
    recorder = Recorder(folder)
    for step in (1, 2, 2, 3):
        recorder.record(step, 8 * step, step / 4, {"train/loss": loss / step})
    recorder.note_end("FINISHED")
    recorder.close()
    return folder


def test_a_parent_and_what_was_added_later_are_in_mlflow_with_their_children(tmp_path):
    root = tmp_path / "runs"
    config = configured(root, "fair", "tracking.tags={team: a}")
    with parent_run(root / "fair", config, "protocol", dataset_fingerprint="f0") as parent:
        words = parent.words_of_child(config, {"fold": 1})
        assert words == words_of_child(parent.run_id, {"team": "a"}, {"fold": "1"})
        parent.describe("# a table")
        parent.recorder.record(1, 0, 0.0, {"protocol/separated/map_at_r": 0.25})
    child = trained(root, "fair/fold-1", *words)
    result = child / "protocol"
    result.mkdir()
    (result / "table.md").write_text("| a table |")
    with_parent = configured(root, "fair/fold-1/protocol", *words)
    for _ in range(2):
        score, cost = {"score": 0.5}, (1200, 2.5)
        write_child(
            result, with_parent, "method", score, 2, cost, "# a result", ["table.md"], trial="t0"
        )
    assert sync_below(root / "fair", 3) == ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        destination = destination_of(config.tracking, root, "fair")
        client = connect(destination)
        experiment = client.get_experiment_by_name(destination.experiment)
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(found) == {"fair", "fair/fold-1", "fair/fold-1/protocol"}
    top = found["fair"]
    assert top.data.tags["kind"] == "protocol"
    assert top.data.metrics["protocol/separated/map_at_r"] == 0.25
    assert top.info.status == "FINISHED"
    assert top.data.tags["mlflow.note.content"] == "# a table"
    for name in ("fair/fold-1", "fair/fold-1/protocol"):
        tags = found[name].data.tags
        assert tags["mlflow.parentRunId"] == top.info.run_id
        assert (tags["team"], tags["fold"]) == ("a", "1")
    method = found["fair/fold-1/protocol"]
    assert method.data.tags["kind"] == "method"
    assert method.data.metrics["score"] == 0.5
    assert method.data.metrics["images_seen"] == 1200
    assert method.data.metrics["seconds"] == 2.5
    assert method.data.tags["mlflow.note.content"] == "# a result"
    (file,) = client.list_artifacts(method.info.run_id, "report")
    assert file.path == "report/table.md"


def test_a_store_that_does_not_answer_is_said_with_the_command_that_sends_the_rest(tmp_path):
    root = tmp_path / "runs"
    trained(root, "fair/fold-0", "tracking.mlflow_uri=http://127.0.0.1:9")
    said = sync_below(root / "fair", 1)
    assert f"`dist-dml track sync --recursive {root / 'fair'}` sends the rest" in said
    assert "\n" not in said


def test_how_the_block_ends_is_how_the_parent_ends(tmp_path):
    config = configured(tmp_path, "a")
    for error, status in ((ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")):
        with (
            pytest.raises(error),
            parent_run(tmp_path / "a", config, "study"),
        ):
            raise error
        assert run_files.last_status(tmp_path / "a")["status"] == status


def test_two_kinds_of_runs_in_one_folder_are_refused(tmp_path):
    trained(tmp_path, "a")
    config = configured(tmp_path, "a")
    with (
        pytest.raises(UsageError, match=r"holds a training and a protocol .* another run\.name"),
        parent_run(tmp_path / "a", config, "protocol"),
    ):
        pass
    with parent_run(tmp_path / "b", config, "study"):
        pass
    with pytest.raises(UsageError, match="holds a study and a training"):
        run_files.check_kind(tmp_path / "b", "")
    run_files.check_kind(tmp_path / "b", "study")
    run_files.check_kind(tmp_path / "a", "")
    run_files.check_kind(tmp_path / "nothing", "study")


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_runs_and_their_curves_are_exported_as_tables(tmp_path, capsys, ending):
    root = tmp_path / "runs"
    one = trained(root, "many/one", "optimizer.learning_rate=0.5")
    trained(root, "many/two", "tracking.tags={team: a}", loss=2.0)
    Recorder(one, run_files.SYSTEM).record(10, 0, 10.0, {"system/cpu": 50.0})
    out = tmp_path / "tables"
    given = ["track", "export", str(root), "--out", str(out), "--format", ending]
    assert main(given) == 0
    assert "2 runs" in capsys.readouterr().out
    read = pyarrow.parquet.read_table if ending == "parquet" else pyarrow.csv.read_csv
    runs = {row["folder"]: row for row in read(out / f"runs.{ending}").to_pylist()}
    row = runs[str(one)]
    identity = run_files.read_json(one / "run.json")
    assert row["run_id"] == identity["run_id"]
    assert row["status"] == "FINISHED"
    assert row["started_at"].timestamp() == pytest.approx(identity["started_at"], abs=1e-3)
    assert str(row["config.optimizer.learning_rate"]) == "0.5"
    assert row["last.train/loss"] == pytest.approx(1 / 3)
    assert row["mlflow_note"] == "x"
    assert not row["config.tracking.tags.team"]
    assert runs[str(root / "many/two")]["config.tracking.tags.team"] == "a"
    metrics = read(out / f"metrics.{ending}").to_pylist()
    assert len(metrics) == 7
    mine = [m for m in metrics if m["run_id"] == identity["run_id"] and m["name"] == "train/loss"]
    assert [(m["step"], m["images_seen"], m["seconds"]) for m in mine] == [
        (1, 8, 0.25),
        (2, 16, 0.5),
        (3, 24, 0.75),
    ]
    assert [m["value"] for m in mine] == pytest.approx([1, 1 / 2, 1 / 3])


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for command in (["export", "--out", str(tmp_path / "out")], ["sync", "--recursive"]):
        assert main(["track", *command, str(tmp_path / "empty")]) == 2
        assert "holds no run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_how_a_run_ended_is_not_said_of_many(tmp_path, capsys):
    trained(tmp_path, "a")
    assert main(["track", "sync", "--recursive", "--status", "KILLED", str(tmp_path)]) == 2
    assert "--status says how one run ended" in capsys.readouterr().err


def test_the_parent_of_a_child_is_part_of_its_configuration():
    words = words_of_child("0a", {"team": "a"}, {"fold": 0})
    tracking = resolve(None, list(words)).config.tracking
    assert tracking.parent == "0a"
    assert json.dumps(tracking.tags, sort_keys=True) == '{"fold": "0", "team": "a"}'


def test_a_text_too_long_for_a_tag_ends_with_a_whole_line():
    text = "\n".join(f"line {i:04d} of many" for i in range(1000))
    short = shortened(text)
    assert len(short) <= 5000
    assert short.endswith(" of many\n...")
    assert shortened("short") == "short"
