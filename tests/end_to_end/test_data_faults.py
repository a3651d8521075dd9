"""Real runs over damaged, changed and differing data, and over every order."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pyarrow.parquet
import pytest
from launching import BIN, Launcher, training_processes

from dist_dml.data.index import load_index
from dist_dml.data.index_command import build_index

pytestmark = pytest.mark.slow

TRAINING = ["data.batch_size=32", "training.max_steps=8", "checkpoint.every_steps=4"]


def metrics(launcher: Launcher, name: str, metric: str) -> list[float]:
    lines = (launcher.root / name / "metrics.jsonl").read_text().splitlines()
    return [r["value"] for r in map(json.loads, lines) if r["name"] == metric]


@pytest.fixture
def broken(data: Path, tmp_path: Path) -> Path:
    """A copy whose third training image and second test image are no images."""
    copy = shutil.copytree(data, tmp_path / "broken")
    index = load_index(copy)
    for sample in (int(index.select("train")[2]), int(index.select("test")[1])):
        tar = index.shard_path(int(index.shard[sample]))
        content = bytearray(tar.read_bytes())
        content[index.offset[sample] : index.offset[sample] + 8] = b"no image"
        tar.write_bytes(content)
    build_index(copy)
    return copy


def test_damaged_images_are_replaced_alike_on_any_layout_counted_and_listed(
    launcher: Launcher, broken: Path
) -> None:
    arguments = [*TRAINING, f"data.path={broken}", "evaluation.every_epochs=1"]
    one = launcher.run("python", 1, "run.name=one", *arguments)
    two = launcher.run("by hand", 2, "run.name=two", "data.loader_processes=2", *arguments)
    assert (one.exit_code, two.exit_code) == (0, 0), one.output + two.output
    expected = launcher.losses("one")
    for step, loss in launcher.losses("two").items():
        assert loss == pytest.approx(expected[step], abs=3e-6)
    for name in ("one", "two"):
        assert metrics(launcher, name, "data/damaged_images")[-1] >= 1
        assert metrics(launcher, name, "data/damaged/not_an_image")[-1] >= 1
        assert metrics(launcher, name, "data/left_out/test")[-1] == 1
    lists = sorted((launcher.root / "two" / "damaged").glob("worker-*.parquet"))
    rows = [row for path in lists for row in pyarrow.parquet.read_table(path).to_pylist()]
    assert {row["kind"] for row in rows} == {"not_an_image"}
    index = load_index(broken)
    assert {row["key"] for row in rows} == {index.key(int(index.select("train")[2]))}

    command = [str(BIN / "dist-dml"), "evaluate", str(launcher.root / "one"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "1 damaged images of split test are left out" in done.stderr
    assert json.loads(done.stdout)["scores"]


def test_strict_ends_every_worker_with_the_name_of_the_image(
    launcher: Launcher, broken: Path
) -> None:
    arguments = [*TRAINING, f"data.path={broken}", "data.strict=true"]
    ended = launcher.run("by hand", 2, "run.name=strict", *arguments)
    assert ended.exit_code != 0
    (line,) = set(ended.error_lines)
    assert "it is not a JPEG, PNG or WebP" in line
    assert not training_processes(launcher.root)


def test_a_shard_deleted_in_mid_run_ends_the_run_with_its_name(
    launcher: Launcher, data: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    steps_per_epoch = -(-len(load_index(copy).select("train")) // 8)
    arguments = ["data.batch_size=8", f"data.path={copy}", "data.order=sequential"]
    arguments += ["data.storage={retries: 2, retry_seconds: 0.05}", "training.epochs=40"]
    processes = launcher.start("by hand", 2, "run.name=lost", *arguments)
    started = time.monotonic()
    while not (launcher.root / "lost" / "metrics.jsonl").exists():
        assert time.monotonic() - started < 60, "the run did not get going"
        time.sleep(0.01)
    for tar in copy.glob("train-*.tar"):
        tar.unlink()
    ended = launcher.wait(processes, time.monotonic() + 60)
    if ended.exit_code == 0:  # All shards were open already: a name is not needed any more.
        assert max(launcher.losses("lost")) == 40 * steps_per_epoch
    else:
        assert ended.error_lines, ended.output
        assert all("train-" in line and ".tar" in line for line in ended.error_lines)
    assert not training_processes(launcher.root)


def test_workers_with_other_data_are_told_before_the_first_step(
    launcher: Launcher, data: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(data, tmp_path / "other")
    last = sorted(other.glob("train-*.tar"))[-1]
    last.unlink()
    build_index(other)
    arguments = ["run.name=differ", *TRAINING]
    processes = launcher.start("by hand", 2, *arguments, of_worker={1: [f"data.path={other}"]})
    ended = launcher.wait(processes, time.monotonic() + 60)
    assert ended.exit_code != 0
    (line,) = set(ended.error_lines)
    assert "the workers disagree before the first step" in line
    assert "fingerprint" in line
    assert "steps_per_epoch" in line
    assert not (launcher.root / "differ" / "metrics.jsonl").exists()
    assert not training_processes(launcher.root)


def test_changed_data_and_batches_are_refused_with_the_difference_or_accepted(
    launcher: Launcher, data: Path
) -> None:
    arguments = ["run.name=changed", "data.batch_size=32", "training.epochs=2"]
    arguments += ["checkpoint.every_steps=4", "checkpoint.every_epochs=0"]
    first = launcher.run("python", 1, *arguments, "training.max_steps=4")
    assert first.exit_code == 0, first.output
    changed = [*arguments, "data.batch_size=16", "--resume", "auto"]
    refused = launcher.run("by hand", 2, *changed)
    assert refused.exit_code != 0
    assert any("batch_size 32 -> 16" in line for line in refused.error_lines), refused.output
    accepted = launcher.run("by hand", 2, *changed, "run.accept_changed_data=true")
    assert accepted.exit_code == 0, accepted.output
    assert "step 4 of 5 an epoch becomes step 8 of 10 an epoch" in accepted.output
    assert sorted(launcher.losses("changed")) == [*range(1, 5), *range(9, 21)]


@pytest.mark.parametrize(
    ("order", "processes"),
    [
        # Each loader process of each worker is some seconds of imports: for one order.
        (["data.order=sequential"], (0, 0)),
        (["data.locality=window", "data.window_shards=2"], (1, 2)),
        (["data.order=balanced", "data.samples_per_class=4"], (0, 0)),
        (["data.repeat_below=0.2"], (0, 0)),
    ],
    ids=["sequential", "window", "balanced", "repeated"],
)
def test_every_order_trains_alike_on_any_layout_and_resumes_on_another(
    launcher: Launcher, order: list[str], processes: tuple[int, int]
) -> None:
    arguments = [*TRAINING, "checkpoint.every_epochs=0", *order]
    one = launcher.run("python", 1, "run.name=one", *arguments)
    assert one.exit_code == 0, one.output
    two = launcher.run(
        "by hand", 2, "run.name=two", f"data.loader_processes={processes[0]}", *arguments
    )
    assert two.exit_code == 0, two.output
    middle = launcher.root / "two" / "checkpoints" / "step-000000004"
    three = launcher.run(
        *("by hand", 3, "run.name=three", "--resume", str(middle)),
        *(f"data.loader_processes={processes[1]}", *arguments),
    )
    assert three.exit_code == 0, three.output
    expected = launcher.losses("one")
    assert list(expected) == list(range(1, 9))
    assert list(launcher.losses("two")) == list(expected)
    assert list(launcher.losses("three")) == [5, 6, 7, 8]
    for step, loss in [*launcher.losses("two").items(), *launcher.losses("three").items()]:
        assert loss == pytest.approx(expected[step], abs=3e-6)
