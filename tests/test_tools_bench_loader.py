"""The benchmark of the loader: its images, its arithmetic, and that it runs."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))  # The modules of a tool lie beside it and are no package.

import bench_loader  # noqa: E402
import bench_loader_figures as figures  # noqa: E402
import bench_loader_images as drawn  # noqa: E402
import bench_loader_measure as measure  # noqa: E402
import bench_loader_readers as readers  # noqa: E402

from dist_dml.tracking.recorder import Recorder  # noqa: E402


@pytest.fixture
def collected(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """WebDataset leaves its last tar to the garbage collector, which warns of the open file."""
    yield
    gc.collect()
    assert all(issubclass(warning.category, ResourceWarning) for warning in recwarn)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> drawn.Images:
    return drawn.make_images(tmp_path_factory.mktemp("images"), 24, 64, seed=1)


def test_photographs_follow_their_key_and_have_the_detail_of_photographs():
    again = drawn.photograph(5, 256)
    assert np.array_equal(drawn.photograph(5, 256), again)
    assert not np.array_equal(drawn.photograph(6, 256), again)
    sizes = [len(drawn.jpeg(key, 256)) for key in range(8)]
    assert 12_000 < np.mean(sizes) < 32_000  # As 256-pixel photographs at quality 90.


def test_shards_and_tree_hold_the_same_files_of_every_class(images):
    files = sorted(images.tree.rglob("*.jpg"))
    assert len(files) == len(images.index) == images.count == 24
    assert len({file.parent.name for file in files}) == drawn.NUM_CLASSES
    stored = b"".join(Path(shard).read_bytes() for shard in images.shards)
    assert all(file.read_bytes() in stored for file in files)
    assert images.bytes_each == sum(file.stat().st_size for file in files) // 24


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("collected")
def test_every_reader_gives_the_same_kind_of_batch(images):
    batches = {
        name: next(open_stream()) for name, open_stream in readers.streams(images, 6, 0).items()
    }
    assert readers.OURS in batches
    assert readers.WEBDATASET in batches
    assert (readers.TORCHVISION in batches) == (not readers.torchvision_refusal())
    for batch in batches.values():
        assert (tuple(batch.shape), batch.dtype) == (
            (6, 3, readers.SIZE, readers.SIZE),
            torch.uint8,
        )


def test_the_pillow_view_crops_as_random_resized_crop_does():
    columns, rows = np.meshgrid(np.arange(200), np.arange(200))
    image = Image.fromarray(np.stack([columns, rows, rows], axis=2).astype(np.uint8))
    views = torch.stack([readers.PilView()(image) for _ in range(200)]).float()
    spans = views.amax(dim=(2, 3)) - views.amin(dim=(2, 3))
    areas = (spans[:, 0] + 1) * (spans[:, 1] + 1) / 200**2
    assert areas.min() > 0.05
    assert areas.max() <= 1
    assert 0.4 < areas.mean() < 0.65
    turned = (views[:, 0, 0, 0] > views[:, 0, 0, -1]).float().mean()
    assert 0.35 < turned < 0.65


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("collected")
def test_both_containers_bring_every_sample(images):
    """They check counts and bytes themselves."""
    assert readers.container_seconds_of_ours(images.index, 7) > 0
    assert readers.container_seconds_of_webdataset(images) > 0


def test_the_waiting_share_is_weighted_by_the_time_between_records(tmp_path):
    recorder = Recorder(tmp_path)
    for step, seconds, share in ((10, 10.0, 0.5), (20, 40.0, 0.1), (30, 50.0, 0.2)):
        recorder.record(step, 8 * step, seconds, {"train/data_wait_share": share})
    recorder.close()
    share, later = figures.waiting_share(tmp_path)
    assert share == pytest.approx((5 + 3 + 2) / 50)
    assert later == pytest.approx((3 + 2) / 40)


def test_a_run_that_recorded_no_waiting_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="data_wait_share"):
        figures.waiting_share(tmp_path)


def test_functions_take_turns_and_are_called_for_every_image():
    calls = []
    found = measure.compare_functions(
        {"a": lambda i: calls.append(("a", i)), "b": lambda i: calls.append(("b", i))}, 3, 2
    )
    assert {name: len(entry.cpu) for name, entry in found.items()} == {"a": 2, "b": 2}
    # One call warms up; the second repetition starts with the other.
    assert [name for name, number in calls if number == 2] == ["a", "b", "b", "a"]


def test_a_folder_without_metrics_is_refused_before_anything_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_loader.main(["--run", str(tmp_path)])
    assert "metrics.jsonl" in capsys.readouterr().err


@pytest.mark.slow
def test_the_quick_benchmark_prints_its_tables_and_writes_its_rows(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    recorder = Recorder(run)
    recorder.record(10, 80, 2.0, {"train/data_wait_share": 0.01})
    recorder.close()
    out = tmp_path / "rows.json"
    command = [sys.executable, str(TOOLS / "bench_loader.py"), "--quick"]
    command += ["--run", str(run), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("container", "end to end", "large JPEGs", "memory", "waiting for data"):
        assert f"### {part}" in done.stdout
    rows = json.loads(out.read_text())
    verdicts = [row for row in rows if row["name"] == "verdict"]
    assert len(verdicts) == 3
    assert done.stdout.count("PASS  ") + done.stdout.count("MISS  ") == 3
    assert [row["value"] for row in verdicts if "waited" in row["variant"]] == [0.01]
    measured = [row for row in rows if row["name"] != "verdict"]
    keys = "name variant config seconds_median seconds_spread extra_bytes error machine date"
    assert all(set(keys.split()) <= set(row) for row in measured)
    ends = {
        (row["variant"], row["config"]["loader_processes"]): row
        for row in measured
        if row["name"] == "end to end"
    }
    names = [readers.OURS, readers.WEBDATASET]
    names += [] if readers.torchvision_refusal() else [readers.TORCHVISION]
    assert set(ends) == {(name, count) for name in names for count in (0, 1)}
    assert all(row["images_per_second"] > 0 for row in ends.values())
    assert all((row["extra_bytes"] is None) == (key[1] == 0) for key, row in ends.items())
