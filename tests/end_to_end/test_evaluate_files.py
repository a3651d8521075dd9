"""`evaluate --embeddings` by several workers: the numbers of one process, and one error line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from launching import Finished, Launcher

from dist_dml.retrieval.embedding_files import write_embeddings

pytestmark = pytest.mark.slow

EVALUATE = ("-m", "dist_dml.evaluate")
WIDTH = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Queries and gallery with 21 samples in both; clusters that overlap, small row groups."""
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 60, 400)
    centres = draw.normal(size=(60, WIDTH))
    vectors = (centres[labels] + draw.normal(size=(400, WIDTH))).astype(np.float32)
    folder = tmp_path_factory.mktemp("files")
    for name, rows in (("q", range(101)), ("g", range(80, 400))):
        path = folder / f"{name}.parquet"
        own = list(rows)
        side = [["left", "right", None][row % 3] for row in own]
        names = [f"class {label}" for label in labels[own]]
        ids = [f"image {row}" for row in own]
        write_embeddings(path, ids, names, vectors[own], {"side": side})
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(path), path, row_group_size=16)
    return str(folder / "q.parquet"), str(folder / "g.parquet")


def evaluated(launcher: Launcher, workers: int, *words: str) -> Finished:
    kind = "python" if workers == 1 else "by hand"
    return launcher.run(kind, workers, *words, settings=[], program=EVALUATE)


def scored(launcher: Launcher, workers: int, *words: str) -> Any:
    finished = evaluated(launcher, workers, *words, "--json")
    assert finished.exit_code == 0, finished.output
    (line,) = [line for line in finished.output.splitlines() if line.startswith("{")]
    return json.loads(line)


@pytest.mark.parametrize(
    ("workers", "with_gallery", "options"),
    [
        (2, True, ["--distance", "l2", "--distance", "cosine", "--group-by", "side"]),
        (3, False, ["--group-by", "class_size"]),
        (3, True, ["--no-nmi", "--no-verification", "--recall-at", "1", "50"]),
    ],
)
def test_workers_give_the_numbers_of_one_process(
    workers: int,
    with_gallery: bool,
    options: list[str],
    files: tuple[str, str],
    launcher: Launcher,
) -> None:
    words = ["--embeddings", files[0], *(["--gallery", files[1]] if with_gallery else [])]
    words += [*options, "--resamples", "50"]
    alone = scored(launcher, 1, *words)
    assert 0 < alone["distances"]["cosine"]["scores"]["map_at_r"] < 1
    assert ("nmi" in alone["distances"]["cosine"]["scores"]) == ("--no-nmi" not in options)
    assert scored(launcher, workers, *words) == alone


def test_what_one_worker_cannot_read_ends_all_with_one_line(
    tmp_path: Path, files: tuple[str, str], launcher: Launcher
) -> None:
    table = pyarrow.parquet.read_table(files[0])
    vectors = table["embedding"].to_pylist()
    vectors[90] = [float("nan")] * WIDTH
    broken = table.set_column(
        table.schema.get_field_index("embedding"),
        "embedding",
        pyarrow.array(vectors, pyarrow.list_(pyarrow.float32(), WIDTH)),
    )
    path = tmp_path / "broken.parquet"
    pyarrow.parquet.write_table(broken, path, row_group_size=16)
    words = ["--embeddings", str(path), "--no-nmi", "--no-verification"]
    finished = evaluated(launcher, 2, *words)
    assert finished.exit_code == 2
    (line,) = finished.error_lines
    assert "the embedding of row 90 holds nan" in line
    assert "Traceback" not in finished.output
