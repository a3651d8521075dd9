"""Installed versions against those that were tested together (`constraints.txt`)."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata

from dist_dml.doctor.findings import Finding, Setting, note, ok, problem, warning

# A test compares these with constraints.txt, which no wheel holds.
TESTED: dict[str, str] = {
    "torch": "2.13.0",
    "torchvision": "0.28.0",
    "triton": "3.7.1",
    "deepspeed": "0.19.8",
    "ray": "2.60.0",
    "mlflow": "3.17.2",
    "faiss-cpu": "1.15.1",
    "webdataset": "1.0.2",
    "pyarrow": "25.0.1",
    "numpy": "2.4.6",
    "timm": "1.0.31",
    "pydantic": "2.14.3",
    "opencv-python-headless": "5.0.0.93",
    "simplejpeg": "1.9.0",
    "pillow": "13.0.0",
    "safetensors": "0.8.0",
    "scikit-learn": "1.9.1",
    "matplotlib": "3.11.2",
    "jaxtyping": "0.3.11",
    "psutil": "7.2.2",
    "pyyaml": "6.0.3",
}

OPTIONAL: dict[str, str] = {
    "triton": "GPU kernels: comes with PyTorch's CUDA build",
    "deepspeed": "the deepspeed launcher: pip install 'dist_dml[deepspeed]'",
    "ray": "dist-dml tune: pip install 'dist_dml[tune]'",
    "mlflow": "tracking: pip install 'dist_dml[mlflow]'",
    "webdataset": "tests only: pip install 'dist_dml[dev]'",
}
"""What works without, and what it is for."""

# Whichever of these is there stands for faiss-cpu.
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu12", "faiss-gpu-cu11")
# The others are listed where they differ; all are in the JSON.
_NAMED = ("torchvision", "deepspeed", "ray", "mlflow", "faiss-cpu", "webdataset", "pyarrow")
_LEAST = {"torch": (2, 13), "numpy": (2, 0), "pydantic": (2, 0)}


def version_findings(setting: Setting) -> Iterator[Finding]:
    """Python, PyTorch's build, every package, and packages that do not fit one another."""
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield ok("python", f"{platform.python_version()} on {platform.machine()}")
    yield ok("torch", f"{torch.__version__}, {built}", cuda=torch.version.cuda)
    found = installed_versions()
    yield from compare(found, setting.config.tracking.mlflow)
    yield from conflicts(_requirements(found), found)


def installed_versions() -> dict[str, str | None]:
    """The version of each package of `TESTED`; None where it is not installed."""
    found = {name: version_of(name) for name in TESTED}
    found["faiss-cpu"] = next((v for name in FAISS if (v := version_of(name))), None)
    return found


def compare(found: Mapping[str, str | None], tracks: bool) -> Iterator[Finding]:
    """Findings where a package is missing, or of another major or minor version than tested.

    Args:
        found: version by name, None for a missing package.
        tracks: whether the run is to be mirrored to MLflow.
    """
    as_tested, missing = [], []
    for name, tested in TESTED.items():
        version = found.get(name)
        install = f"pip install -c constraints.txt '{name}=={tested}'"
        if version is None and name in OPTIONAL:
            if name == "mlflow" and tracks:
                remedy = "pip install 'dist_dml[mlflow]', or tracking.mlflow=false"
                yield warning(name, "not installed, and tracking.mlflow=true", remedy)
            else:
                missing.append(name)
        elif version is None:
            yield problem(name, "not installed", install)
        elif _release(version) < _LEAST.get(name, (0, 0)):
            least = ".".join(map(str, _LEAST[name]))
            yield problem(name, f"{version} is older than {least}, the oldest that works", install)
        elif _release(version) == _release(tested):
            as_tested.append(f"{name} {version}")
        elif _release(version) < _release(tested):
            yield warning(name, f"{version} is older than the tested {tested}", install)
        else:
            yield note(name, f"{version} is newer than the tested {tested}", install)
    versions = {name: version for name, version in found.items() if version}
    named = [text for text in as_tested if text.split()[0] in _NAMED]
    more = len(as_tested) - len(named)
    yield ok("as tested", f"{', '.join(named)} and {more} more", **versions)
    if missing:
        remedy = "; ".join(f"{name}: {OPTIONAL[name]}" for name in missing)
        yield note("not installed", ", ".join(missing), f"only where it is wanted: {remedy}")


def conflicts(
    requirements: Mapping[str, Iterable[str]], found: Mapping[str, str | None]
) -> Iterator[Finding]:
    """Findings where one package asks for another version of a second one.

    Args:
        requirements: of each package, as its metadata states them (`torch==2.13.0`).
        found: version by name.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    wrong = []
    for name, texts in requirements.items():
        for text in texts:
            try:
                wanted = Requirement(text)
            except InvalidRequirement:
                continue
            version = found.get(wanted.name.lower().replace("_", "-"))
            if version is None or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
                continue
            if not wanted.specifier.contains(version, prereleases=True):
                wrong.append(
                    (f"{name} needs {wanted.name}{wanted.specifier}", wanted.name, version)
                )
    for text, name, version in wrong:
        remedy = "pip install -c constraints.txt -e '.[all]' brings versions that fit"
        yield problem(f"{name} version", f"{text}, and {version} is installed", remedy)
    if not wrong:
        yield ok("requirements", "the packages fit one another")


def differing(versions: Mapping[str, Mapping[str, str | None]]) -> Iterator[Finding]:
    """Findings where hosts have different versions of a package.

    Args:
        versions: by host, then by package.
    """
    if len(versions) < 2:
        return
    names = sorted({name for of_host in versions.values() for name in of_host})
    uneven = 0
    for name in names:
        hosts: dict[str, list[str]] = {}
        for host, of_host in versions.items():
            hosts.setdefault(of_host.get(name) or "not installed", []).append(host)
        if len(hosts) > 1:
            uneven += 1
            text = ", ".join(f"{version} on {_few(where)}" for version, where in hosts.items())
            yield problem(
                f"{name} everywhere",
                text,
                "install the same versions on all hosts (pip install -c constraints.txt)",
            )
    if not uneven:
        yield ok("everywhere", f"the same versions on all {len(versions)} hosts")


def _few(hosts: list[str]) -> str:
    return ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else "")


def version_of(name: str) -> str | None:
    """The installed version of a package; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements(found: Mapping[str, str | None]) -> dict[str, list[str]]:
    there = [name for name, version in found.items() if version and version_of(name)]
    return {name: metadata.requires(name) or [] for name in there}


def _release(version: str) -> tuple[int, int]:
    """Major and minor number."""
    numbers = [int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:2]]
    return (numbers[0], numbers[1] if len(numbers) > 1 else 0)
