"""Scripts and examples of `cluster/`, and what all its files have in common: each is read as the
tool that reads it does, and held against this checkout."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_files import (
    BATCH_FILES,
    CLUSTER,
    FILES,
    OWN,
    ROOT,
    SCRIPTS,
    given_commands,
    here,
    name_of,
)

from dist_dml.command_line import CommandParser
from dist_dml.config_loading import resolve

BIN = Path(sys.executable).parent


def test_every_command_that_the_files_give_is_understood() -> None:
    given = list(given_commands())
    assert {one.entry for one in given} == {"train", "tune"}
    assert len({one.file for one in given}) >= 5
    for file, entry, words in given:
        parser = CommandParser(allow_abbrev=False)
        importlib.import_module(f"dist_dml.{entry}").add_arguments(parser)
        arguments = parser.parse_intermixed_args([here(word) for word in words])
        searches = [arguments.search] if entry == "tune" else []
        for path in [*arguments.config, *searches]:
            if not path.startswith(OWN):
                assert (ROOT / path.split(":")[0]).is_file(), f"{file}: {path}"
        known = [str(ROOT / path) for path in arguments.config if not path.startswith(OWN)]
        # Keys, values and variants, as a run would look at them.
        resolve(known, arguments.overrides)


def test_every_path_that_a_file_names_is_in_the_checkout() -> None:
    shape = re.compile(r"(?<![\w./~-])(?:/opt/dist_dml/)?((?:cluster|configs|dist_dml)/[\w./-]*\w)")
    of_the_reader = {"cluster/hostfile", "cluster/deepspeed_env", "cluster/mlflow/.env"}
    of_the_reader |= {"configs/search/mine.yaml"}
    seen = 0
    for path in FILES:
        for named in set(shape.findall(path.read_text())) - of_the_reader:
            seen += 1
            assert (ROOT / named).exists(), f"{path.relative_to(ROOT)}: {named}"
    assert seen > 20


def test_no_file_holds_a_secret_or_an_image_that_changes() -> None:
    secret = re.compile(
        r"(?i)(?<![\w-])[\w.-]*(?:password|secret|token|access[_-]key)[\w.-]*"
        r"(?:=|: )[\"']?([^\s\"'#,}]+)"
    )
    # What stands there instead: references, names and keys of Secrets, files, modes.
    harmless = re.compile(
        r"[$~./<{`(]|mlflow|token\b|password|access-key|secret-key|cluster/|false\b"
    )
    for path in FILES:
        text = re.sub(r"(?m)^\s*#.*$", "", path.read_text())
        # Colons are prose elsewhere.
        colons = path.suffix == ".yaml"
        for value in secret.findall(text if colons else text.replace(": ", " ")):
            assert harmless.match(value), f"{path.relative_to(ROOT)}: {value}"
        for image in re.findall(r"^\s*image: (?:&\w+ )?([^\s*]+)", text, re.MULTILINE):
            assert re.search(r":v?\d+\.\d+(\.\d+)?(-\w+)?$", image), f"{path.name}: {image}"
    example = (CLUSTER / "mlflow" / "env.example").read_text().splitlines()
    assert all(line.startswith("#") or line.endswith("=") for line in example)


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_are_executable_and_pass_shellcheck(path: Path) -> None:
    assert path.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    found = subprocess.run(
        [str(BIN / "shellcheck"), "--severity=style", str(path)], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout
    assert not re.search(r"^\s*ray stop", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", BATCH_FILES, ids=name_of)
def test_batch_files_say_what_requeueing_needs(path: Path) -> None:
    lines = path.read_text().splitlines()
    directives = {}
    for number, line in enumerate(lines):
        if line.startswith("#SBATCH"):
            # sbatch stops reading them at the first command.
            assert all(before.startswith("#") for before in lines[:number])
            found = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
            assert found, line
            directives[found[1]] = found[2]
    whole = {"nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task"}
    other = {"job-name", "time", "signal", "requeue", "open-mode", "output"}
    assert directives.keys() == whole | other
    assert all(int(directives[name]) > 0 for name in whole)
    assert re.fullmatch(r"\d\d:\d\d:\d\d", directives["time"])
    assert re.fullmatch(r"(B:)?USR1@(\d+)", directives["signal"])
    # Else a requeued job would write over what it said before.
    assert directives["open-mode"] == "append"
    assert directives["requeue"] is None
    # Slurm makes no folders, and a job whose output cannot be opened fails without a word.
    assert "/" not in directives["output"]


def test_deepspeed_reads_the_hostfile_and_the_environment() -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner", reason="needs deepspeed")
    hosts = runner.fetch_hostfile(str(CLUSTER / "hostfile.example"))
    assert len(hosts) == 2
    assert set(hosts.values()) == {8}
    lines = (CLUSTER / "deepspeed_env.example").read_text().splitlines(keepends=True)
    # Its launcher does just this; a comment or an empty line would end it with a traceback.
    pairs = dict(line.split("=", maxsplit=1) for line in lines)
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]*", name) for name in pairs)
    # Values go through the remote shell.
    assert all(re.fullmatch(r"[\w@%+=:,./-]+", value.strip()) for value in pairs.values())
    assert {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} <= pairs.keys()
