"""What the tests of `cluster/` share: where it is, and how its files are read."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
SCRIPTS = sorted([*CLUSTER.rglob("*.sh"), *CLUSTER.rglob("*.sbatch")])
BATCH_FILES = sorted((CLUSTER / "slurm").glob("*.sbatch"))
RAY_FILES = sorted((CLUSTER / "ray").glob("*.yaml"))
KUBERNETES_FILES = sorted((CLUSTER / "k8s").glob("*.yaml"))
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
DOCKERFILE = CLUSTER / "docker" / "Dockerfile"
OWN = ("my", "/data/", "/shared/", "mine", "configs/search/mine")
"""How files begin that the reader has to have, not we."""

_ENTRY = re.compile(
    r"(?:-m dist_dml\.(?P<module>train|tune)|dist_dml/(?P<path>train|tune)\.py"
    r"|slurm/(?P<batch>train|ray_tune)\.sbatch)(?P<words> +(?:-- +)?--[^\n&|>`]+)"
)


class GivenCommand(NamedTuple):
    """A command of ours that a file gives."""

    file: str
    entry: str
    """`train` or `tune`."""
    words: list[str]


def name_of(value: object) -> str | None:
    """Of a parameter that is a path."""
    return value.name if isinstance(value, Path) else None


def constraints() -> dict[str, str]:
    """The version of each distribution."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def extras() -> set[str]:
    """Of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return set(project["optional-dependencies"])


def documents(path: Path) -> list[dict[str, Any]]:
    """Of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def of_kind(path: Path, kind: str) -> dict[str, Any]:
    """The first Kubernetes object of a kind."""
    return next(document for document in documents(path) if document["kind"] == kind)


def given_commands() -> Iterator[GivenCommand]:
    """Of training and tuning, in scripts, comments, the README and manifests."""
    for path in FILES:
        yaml_file = path.suffix == ".yaml"
        text = path.read_text().replace("\\\n#", " ").replace("\\\n", " ")
        lines = [line for line in text.splitlines() if not yaml_file or line.startswith("#")]
        if path in KUBERNETES_FILES:
            for document in documents(path):
                lines.append(document.get("spec", {}).get("entrypoint", ""))
        for found in _ENTRY.finditer("\n".join(lines)):
            words = [word for word in shlex.split(found["words"], comments=True) if word != "--"]
            # `...` and "$@" stand for others.
            if words and not any("$" in word or word == "..." for word in words):
                entry = found["module"] or found["path"] or found["batch"].removeprefix("ray_")
                yield GivenCommand(str(path.relative_to(CLUSTER)), entry, words)
    pod = of_kind(CLUSTER / "k8s" / "train.yaml", "Job")["spec"]["template"]["spec"]
    yield GivenCommand("k8s/train.yaml", "train", pod["containers"][0]["args"])


def here(word: str) -> str:
    """A path in an image or on a node, as it is in this checkout."""
    return re.sub(r"^(/opt/dist_dml|/home/\w+/checkout)/", "", word)
