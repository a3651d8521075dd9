"""`dist-dml export` refuses what cannot be, in one line, before it reads or computes anything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dist_dml.cli import main


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A folder that looks like a run's, and holds no checkpoint."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("run: {name: run}\n")
    return str(folder)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--private"], "--private is about --push-to-hub"),
        (["--push-to-hub", "shoes"], "expected OWNER/NAME"),
        (["--formats", "pt2", "--mlflow-register", "shoes"], "add onnx"),
        (["--formats", "tflite"], "invalid choice: 'tflite'"),
        ([], "holds no checkpoint; train it first"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line_and_leaves_nothing(
    run: str, tmp_path: Path, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", run, "--out", str(tmp_path / "out"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert list(tmp_path.glob("out*")) == []


def test_a_folder_that_is_no_run_or_is_there_already_is_refused(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    (tmp_path / "kept").mkdir()
    assert main(["export", run, "--out", str(tmp_path / "kept")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_missing_onnx_names_the_extra(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", run, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'dist_dml[export]'" in line
