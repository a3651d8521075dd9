"""`dist-dml COMMAND`: help, exit codes, and one line for a user's mistake."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_dml.cli import COMMANDS, main
from dist_dml.config_loading import Resolved
from dist_dml.entry import run_worker
from dist_dml.errors import RunError, UsageError
from dist_dml.parallel.world import World

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_declares_its_arguments_and_runs(name: str) -> None:
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert callable(module.run)
    assert (module.__doc__ or "").strip()


def test_help_lists_every_command_and_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, (_, text) in COMMANDS.items():
        assert f"  {name:<16} {text}" in shown
    assert main(["pack", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "pack glyphs" in shown
    assert "evaluate" not in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "usage: dist-dml COMMAND"),
        (["pack"], "usage: dist-dml pack"),
        (["pack", "letters"], "pack glyphs"),
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["qqq"], "unknown command 'qqq'\n"),
        (["config"], "the following arguments are required: form; see `dist-dml config --help`"),
        (["config", "shwo"], "invalid choice: 'shwo'"),
        (["train", "--conf", "x.yaml"], "unrecognized arguments: --conf"),
        (["config", "show", "optimizer.lr=1"], "did you mean optimizer.learning_rate?"),
        (["config", "show", "--config", "absent.yaml"], "absent.yaml cannot be read"),
        (["config", "diff", "absent.yaml", "absent.yaml"], "absent.yaml cannot be read"),
        (["train", "optimizer.lr=1"], "did you mean optimizer.learning_rate?"),
        (["train", "--config", "absent.yaml", "--local_rank=0"], "absent.yaml cannot be read"),
        (["train", "--resume", "no"], "data.path is empty"),
        (["train", "run.seed=1", "--resume", "auto", "run.sed=2"], "did you mean run.seed"),
        (["evaluate", "absent"], "absent is not the folder of a run"),
    ],
)
def test_a_mistake_ends_with_exit_code_2_and_says_what_to_do(
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert says in error
    if "error:" in error:
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (UsageError("data.path=x is\nempty"), 2, "dist_dml: error: data.path=x is empty"),
        (RunError("the disk is full"), 1, "dist_dml: error: the disk is full"),
        (MemoryError("of 3 GiB"), 1, "dist_dml: error: out of memory (of 3 GiB); lower data.batch"),
        (KeyError("x"), 1, "dist_dml: error: KeyError: 'x' (an error of dist_dml; please report"),
    ],
)
def test_one_process_ends_with_one_line_and_the_exit_code_of_its_error(
    error: Exception, exit_code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def body(resolved: Resolved, world: World, arguments: argparse.Namespace) -> None:
        assert resolved.config.run.seed == 5
        assert (world.rank, world.size, world.group) == (0, 1, None)
        raise error

    arguments = argparse.Namespace(config="", overrides=["run.seed=4"])
    assert run_worker(body, arguments, ["run.seed=5", "engine.threads=1"]) == exit_code
    *traceback, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith(line)
    # A traceback is for errors of dist_dml itself, not for a user's mistakes.
    assert bool(traceback) == (not isinstance(error, (UsageError, RunError)))


@pytest.mark.parametrize("arguments", [["config", "schema"], ["config", "show"], ["--help"]])
def test_a_reader_that_has_had_enough_is_no_error(arguments: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "dist_dml.cli", *arguments],
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_error_stands_behind_what_was_printed_in_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "output.txt"
    program = "from dist_dml.errors import print_failure; print('a table'); print_failure('why')"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with path.open("wb") as output:
        words = [sys.executable, "-c", program]
        subprocess.run(words, stdout=output, stderr=output, check=True, cwd=ROOT, env=environment)
    assert path.read_text().splitlines() == ["a table", "dist_dml: error: why"]
