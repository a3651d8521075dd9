"""`dist-dml embed` and `evaluate --embeddings` on a run, on several workers, killed and resumed."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import Launcher, finish, kill_tree, start_command

from dist_dml.cli import main
from dist_dml.data.index import load_index
from dist_dml.retrieval.embedding_files import read_embeddings
from dist_dml.train import main as train

pytestmark = pytest.mark.slow

WORDS = ("--split", "test", "train", "--part-rows", "20")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    root = tmp_path_factory.mktemp("embedded")
    settings = Launcher(data, root).settings
    assert train([*settings, "run.name=one", "training.max_steps=3"]) == 0
    return root / "one"


@pytest.fixture(scope="module")
def alone(trained: Path) -> Path:
    """All images, embedded by one worker in one go."""
    out = trained.parent / "alone"
    assert main(["embed", str(trained), "--out", str(out), *WORDS]) == 0
    return out


def digests(folder: Path) -> dict[str, str]:
    files = [*folder.glob("*.parquet"), *folder.glob("*.json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def by_workers(launcher: Launcher, workers: int, *words: str) -> str:
    """The output of the command, by several workers."""
    program = ["-m", "dist_dml.embed"]
    ended = launcher.run("by hand", workers, *words, settings=[], program=program)
    assert ended.exit_code == 0, ended.output
    return ended.output


def test_three_workers_write_the_files_of_one(
    trained: Path, alone: Path, launcher: Launcher
) -> None:
    out = trained.parent / "by three"
    output = by_workers(launcher, 3, str(trained), "--out", str(out), *WORDS)
    assert digests(out) == digests(alone)
    assert "worker 2 of 3" in output


def test_killed_and_gone_on_with_by_two_workers_it_writes_the_files_of_one(
    trained: Path, launcher: Launcher
) -> None:
    words = [str(trained), "--split", "test", "train", "--part-rows", "3", "--out"]
    out, whole = trained.parent / "killed", trained.parent / "not killed"
    process = start_command("embed", *words, str(out))
    deadline = time.monotonic() + 60
    while len(list(out.glob("part-*.parquet"))) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, finish(process)[1]
        time.sleep(0.005)
    kill_tree(process.pid)
    finish(process)
    first = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    output = by_workers(launcher, 2, *words, str(out))
    assert main(["embed", *words, str(whole)]) == 0
    num_parts = len(list(whole.glob("part-*.parquet")))
    assert 3 <= len(first) < num_parts
    assert f"{len(first)} of {num_parts} parts are there" in output
    again = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert first.items() <= again.items()
    assert digests(out) == digests(whole)


def test_files_score_as_the_run_does(
    trained: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(trained.parent / "test")
    assert main(["embed", str(trained), "--out", out]) == 0
    overrides = ['evaluation.distances=["cosine", "l2"]', "evaluation.nmi=true"]
    capsys.readouterr()
    assert main(["evaluate", str(trained), "--json", "--no-report", *overrides]) == 0
    (of_run,) = json.loads(capsys.readouterr().out)["scores"].values()
    distances = ["--distance", "cosine", "--distance", "l2"]
    assert main(["evaluate", "--embeddings", out, "--json", *distances]) == 0
    found = json.loads(capsys.readouterr().out)
    index = load_index(data)
    assert found["queries"]["samples"] == len(index.select("test"))
    for distance in ("cosine", "l2"):
        scores = found["distances"][distance]["scores"]
        expected = {
            name.removeprefix(f"unseen/{distance}/"): value
            for name, value in of_run.items()
            if name.startswith(f"unseen/{distance}/")
        }
        assert expected
        assert {name: scores[name] for name in expected} == expected


def test_a_gallery_of_another_split_is_searched(
    trained: Path, alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gallery = str(trained.parent / "gallery")
    words = ["embed", str(trained), "--out", gallery, "--split", "train", "--dtype", "float16"]
    assert main(words) == 0
    half = read_embeddings(gallery)
    both = read_embeddings(alone)
    chosen = np.isin(both.embeddings.ids, half.embeddings.ids)
    assert (half.embeddings.vectors == both.embeddings.vectors[chosen].astype(np.float16)).all()
    capsys.readouterr()
    options = ["--group-by", "split", "--no-nmi", "--no-verification", "--resamples", "50"]
    files = ["--embeddings", str(alone), "--gallery", gallery]
    assert main(["evaluate", *files, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    scores = found["distances"]["cosine"]["scores"]
    assert scores["num_queries"] == len(both)
    # Test classes have no image in the gallery; a training image does not find itself.
    test = [row for row, split in enumerate(both.metadata["split"]) if split == "test"]
    assert scores["num_queries_without_match"] == len(test)
    groups = {group["name"]: group for group in found["distances"]["cosine"]["groups"]}
    assert set(groups) >= {"train"}
    kept = torch.from_numpy(both.embeddings.vectors[chosen]).double()
    kept = torch.nn.functional.normalize(kept, dim=1)
    near = (kept @ kept.T).fill_diagonal_(-2).argmax(dim=1).numpy()
    labels = both.embeddings.labels[chosen]
    # Rounded to float16, a few neighbours that are nearly as near change places.
    assert scores["recall_at_1"] == pytest.approx((labels[near] == labels).mean(), abs=0.02)
    assert main(["evaluate", *files, *options]) == 0
    shown = capsys.readouterr().out
    assert f"{scores['map_at_r']:.4f}" in shown


def test_other_data_are_embedded_with_the_same_network(
    trained: Path, divided_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(trained.parent / "other")
    words = ["embed", str(trained), "--out", out, "--data", str(divided_data), "--split", "train"]
    assert main(words) == 0
    found = read_embeddings(out)
    assert len(found) == 9 * 12
    assert found.width == 16
    assert found.facts["fingerprint"] == load_index(divided_data).fingerprint
    assert main([*words[:-1], "test"]) == 2
    assert "another job (splits: ['train'] -> ['test']" in capsys.readouterr().err
