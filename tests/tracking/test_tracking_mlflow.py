"""Replaying run folders into a real MLflow database."""

import argparse
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dist_dml.config import TrackingConfig
from dist_dml.errors import UsageError
from dist_dml.tracking import run_files, sync_command, ui_command
from dist_dml.tracking.destination import Destination, destination_of, root_of
from dist_dml.tracking.mlflow_mirror import mirror_once
from dist_dml.tracking.mlflow_run import (
    connect,
    create_run,
    experiment_id,
    flatten_config,
    mlflow_name,
)
from dist_dml.tracking.received import is_mirrored
from dist_dml.tracking.recorder import Recorder, encode_value
from dist_dml.whole_files import write_json

FINGERPRINT = "0123456789abcdef" * 4
CONFIG = {
    "run": {"name": "study/a", "root": "runs"},
    "data": {"path": "data/glyphs", "split": "train"},
    "optimizer": {"learning_rate": 0.001},
    "evaluation": {"protocols": [{"name": "unseen", "query": "test", "gallery": ""}]},
    "tracking": {"experiment": "glyphs"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A run root with its database, which takes seconds to make, once for all tests."""
    root = tmp_path_factory.mktemp("runs")
    with warnings.catch_warnings():
        # MLflow uses what SQLAlchemy has deprecated, when its tables are defined.
        warnings.simplefilter("ignore")
        connect(destination_of(TrackingConfig(), root, "a")).search_experiments()
    return root


@pytest.fixture
def destination(root) -> Destination:
    return destination_of(TrackingConfig(experiment="glyphs"), root, "study/a")


@pytest.fixture
def client(destination):
    return connect(destination)


@pytest.fixture
def folder(tmp_path, client) -> Path:
    """The folder of a run that has ended: 30 recorded steps, an evaluation, a figure."""
    folder = tmp_path / "runs" / "study" / "a"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "report").mkdir()
    (folder / "report" / "curves.png").write_bytes(b"a picture")
    run_files.identify_run(
        folder, {"dataset_fingerprint": FINGERPRINT, "config_hash": "c0", "git_commit": "9a"}
    )
    record(folder, range(10, 310, 10))
    recorder = Recorder(folder)
    recorder.record(300, 38400, 30.0, {"unseen/cosine/map_at_r": 0.5, "bad": math.nan})
    recorder.note_figure(folder / "report" / "curves.png")
    recorder.note_end("FINISHED")
    recorder.close()
    return folder


def record(folder: Path, steps: range, sign: float = 1.0) -> None:
    recorder = Recorder(folder)
    for step in steps:
        recorder.record(step, step * 128, step / 10, {"train/loss": sign / step})
    recorder.close()


def history(client, run_id: str, name: str) -> list[tuple]:
    """Step, value and timestamp; nan, which is equal to nothing, as "nan"."""
    entries = client.get_metric_history(run_id, name)
    return sorted((entry.step, encode_value(entry.value), entry.timestamp) for entry in entries)


def test_a_replay_carries_metrics_params_tags_data_set_and_artifacts(folder, destination, client):
    run_id = mirror_once(folder, destination)
    run = client.get_run(run_id)
    started = run_files.read_json(folder / "run.json")["started_at"]

    losses = history(client, run_id, "train/loss")
    assert losses == [
        (step, 1 / step, int(1000 * (started + step / 10))) for step in range(10, 310, 10)
    ]
    assert [entry[1] for entry in history(client, run_id, "images_seen")] == [
        128 * step for step in range(10, 310, 10)
    ]
    assert len(history(client, run_id, "seconds")) == 30
    assert history(client, run_id, "unseen/cosine/map_at_r")[0][:2] == (300, 0.5)
    assert history(client, run_id, "bad")[0][:2] == (300, "nan")

    assert run.data.params == flatten_config(CONFIG)
    assert run.data.params["optimizer.learning_rate"] == "0.001"
    assert run.data.tags["config_hash"] == "c0"
    assert run.data.tags["git_commit"] == run.data.tags["mlflow.source.git.commit"] == "9a"
    assert run.data.tags["dataset_fingerprint"] == FINGERPRINT
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("glyphs", FINGERPRINT[:36])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "study/a")
    assert run.info.start_time == int(1000 * started)
    artifacts = Path(client.download_artifacts(run_id, ""))
    assert yaml.safe_load((artifacts / "config.yaml").read_text()) == CONFIG
    assert (artifacts / "report" / "curves.png").read_bytes() == b"a picture"
    assert is_mirrored(folder, destination)


def test_replays_change_nothing_even_when_the_state_is_lost(folder, destination, client):
    run_id = mirror_once(folder, destination)
    before = {name: history(client, run_id, name) for name in client.get_run(run_id).data.metrics}
    assert mirror_once(folder, destination) == run_id
    (folder / "mlflow.json").unlink()
    assert mirror_once(folder, destination) == run_id
    assert before == {name: history(client, run_id, name) for name in before}
    assert len(client.get_run(run_id).inputs.dataset_inputs) == 1


def test_a_call_that_died_before_it_could_note_what_it_sent_sends_no_duplicates(
    folder, destination, client
):
    run_id = mirror_once(folder, destination)
    state = run_files.read_json(folder / "mlflow.json")
    for received in state.values():
        received["offsets"], received["last_step"] = {}, {}
    write_json(folder / "mlflow.json", state)
    before = history(client, run_id, "train/loss")
    assert mirror_once(folder, destination) == run_id
    assert history(client, run_id, "train/loss") == before


def test_the_empty_run_of_a_request_that_was_made_twice_is_removed(folder, destination, client):
    identity = run_files.read_json(folder / "run.json")
    experiment = experiment_id(client, destination)
    first, second = (create_run(client, experiment, identity, "study/a") for _ in range(2))
    run_id = mirror_once(folder, destination)
    twin = ({first.info.run_id, second.info.run_id} - {run_id}).pop()
    assert client.get_run(twin).info.lifecycle_stage == "deleted"
    assert len(history(client, run_id, "train/loss")) == 30
    (folder / "mlflow.json").unlink()
    late = create_run(client, experiment, identity, "study/a").info.run_id
    run_files.start_attempt(folder)
    assert mirror_once(folder, destination) == run_id
    assert client.get_run(late).info.lifecycle_stage == "deleted"


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(folder, destination, client):
    run_id = mirror_once(folder, destination)
    changed = CONFIG | {"optimizer": {"learning_rate": 0.01}}
    (folder / "config.yaml").write_text(yaml.safe_dump(changed))
    run_files.start_attempt(folder)
    assert not is_mirrored(folder, destination)
    record(folder, range(290, 330, 10), sign=-1.0)
    assert mirror_once(folder, destination) == run_id
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params["optimizer.learning_rate"] == "0.001"
    assert run.data.tags["config_changed.optimizer.learning_rate"] == "0.01"
    losses = history(client, run_id, "train/loss")
    assert [step for step, _, _ in losses] == list(range(10, 330, 10))
    assert losses[-1][1] == -1 / 320


def test_a_deleted_run_or_experiment_does_not_stand_in_the_way(folder, destination, client):
    elsewhere = replace(destination, experiment="another")
    first = mirror_once(folder, elsewhere)
    client.delete_run(first)
    second = mirror_once(folder, elsewhere)
    assert second != first
    assert len(history(client, second, "train/loss")) == 30
    client.delete_experiment(client.get_run(second).info.experiment_id)
    with pytest.raises(UsageError, match=r"tracking\.experiment"):
        mirror_once(folder, elsewhere)


def test_sync_replays_by_the_stored_config_and_sets_the_status_it_is_given(
    folder, root, client, capsys
):
    run_files.start_attempt(folder)
    parser = argparse.ArgumentParser()
    sync_command.add_arguments(parser)
    given = [str(folder), "--uri", f"sqlite:///{root}/mlflow.db", "--status", "KILLED"]
    assert sync_command.run(parser.parse_args(given)) == 0
    assert "KILLED" in capsys.readouterr().out
    experiment = client.get_experiment_by_name("glyphs")
    identity = run_files.read_json(folder / "run.json")["run_id"]
    rule = f"tags.`dist_dml.run_id` = '{identity}'"
    (run,) = client.search_runs([experiment.experiment_id], filter_string=rule)
    assert run.info.status == "KILLED"


@pytest.mark.parametrize("uri", ["runs/mlruns", "file:///tmp/mlruns", "/tmp/mlruns"])
def test_the_file_store_is_refused_with_what_to_give_instead(uri, tmp_path):
    with pytest.raises(UsageError, match="sqlite:///"):
        destination_of(TrackingConfig(mlflow_uri=uri), tmp_path, "a")


def test_a_folder_without_a_run_and_a_root_without_a_database_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no config\.yaml"):
        sync_command.sync(tmp_path, None, None, None)
    with pytest.raises(UsageError, match="track sync"):
        ui_command.ui_command(tmp_path, 5000)


def test_the_root_of_a_run_with_slashes_in_its_name_lies_above_all_of_them(tmp_path):
    assert root_of(tmp_path / "runs" / "study" / "a", "study/a") == tmp_path / "runs"
    assert root_of(tmp_path / "runs" / "moved", "a") == tmp_path / "runs"


def test_names_become_what_mlflow_accepts(client):
    from mlflow.utils.validation import _validate_metric_name

    for name in ("sop@1//x", "../up", "/top", "ü", "a" * 300, ".", "", "a:b c/d-e.f"):
        _validate_metric_name(mlflow_name(name))
    assert mlflow_name("unseen/cosine/recall_at_1") == "unseen/cosine/recall_at_1"


def test_a_run_stands_below_its_study_whichever_comes_first(
    tmp_path, folder, destination, client
) -> None:
    study = tmp_path / "runs" / "study"
    identity = run_files.identify_run(study, {"kind": "study"})
    tracking = {"parent": identity["run_id"], "tags": {"trial": "trial-003"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"tracking": tracking}))
    # The study is not there yet: nothing waits for it.
    child = mirror_once(folder, destination)
    tags = client.get_run(child).data.tags
    assert tags["trial"] == "trial-003"
    assert "mlflow.parentRunId" not in tags
    assert is_mirrored(folder, destination)
    parent = mirror_once(study, replace(destination, run_name="study"))
    assert mirror_once(folder, destination) == child
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == parent
