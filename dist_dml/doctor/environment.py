"""Variables that are known traps, and files that hide installed packages."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import dist_dml
from dist_dml.doctor.findings import Finding, Level, Setting, ok
from dist_dml.doctor.versions import FAISS, TESTED


@dataclass(frozen=True)
class Trap:
    """A variable whose value does harm.

    Attributes:
        name: of the variable.
        harms: whether a value does.
        level: of the finding.
        effect: what it does; its value stands before.
        remedy: what to do.
    """

    name: str
    harms: Callable[[str], bool]
    level: Level
    effect: str
    remedy: str


def _is_on(value: str) -> bool:
    return value.strip().lower() not in ("", "0", "false", "no", "off")


def _is_off(value: str) -> bool:
    return value.strip().lower() in ("0", "false", "no", "off")


def _is_set(value: str) -> bool:
    return bool(value.strip())


def _is_wordy(value: str) -> bool:
    return value.strip().upper() in ("INFO", "TRACE", "DETAIL", "ABORT")


TRAPS: tuple[Trap, ...] = (
    Trap(
        "CUDA_LAUNCH_BLOCKING",
        _is_on,
        "warning",
        "the host waits for each GPU kernel, several times slower",
        "unset CUDA_LAUNCH_BLOCKING outside of debugging",
    ),
    Trap(
        "PYTORCH_NO_CUDA_MEMORY_CACHING",
        _is_on,
        "warning",
        "every tensor is allocated by the driver, many times slower",
        "unset PYTORCH_NO_CUDA_MEMORY_CACHING",
    ),
    Trap(
        "TRITON_INTERPRET",
        _is_on,
        "warning",
        "Triton kernels run in an interpreter, whose bfloat16 products are wrong",
        "unset TRITON_INTERPRET",
    ),
    Trap(
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
        _is_on,
        "warning",
        "float32 products have 10 bits of mantissa",
        "unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE; engine.precision chooses the precision",
    ),
    Trap(
        "NVIDIA_TF32_OVERRIDE",
        _is_on,
        "warning",
        "float32 products have 10 bits of mantissa, whatever PyTorch is told",
        "unset NVIDIA_TF32_OVERRIDE",
    ),
    Trap(
        "TORCH_DISTRIBUTED_DEBUG",
        _is_wordy,
        "warning",
        "every collective is checked by another one",
        "unset TORCH_DISTRIBUTED_DEBUG outside of debugging",
    ),
    Trap(
        "TORCH_NCCL_BLOCKING_WAIT",
        _is_on,
        "warning",
        "the host waits in each NCCL collective, so that nothing overlaps",
        "unset TORCH_NCCL_BLOCKING_WAIT",
    ),
    Trap(
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        _is_off,
        "warning",
        "a worker whose peer died waits for ever",
        "unset TORCH_NCCL_ASYNC_ERROR_HANDLING",
    ),
    Trap(
        "NCCL_DEBUG",
        _is_wordy,
        "note",
        "NCCL writes many lines for each worker",
        "unset NCCL_DEBUG, or NCCL_DEBUG=WARN, when all is well",
    ),
    Trap(
        "NCCL_P2P_DISABLE",
        _is_on,
        "warning",
        "GPUs of a host exchange through its memory instead of NVLink",
        "unset NCCL_P2P_DISABLE, unless this machine hangs without it",
    ),
    Trap(
        "NCCL_SHM_DISABLE",
        _is_on,
        "warning",
        "workers of a host exchange through sockets",
        "unset NCCL_SHM_DISABLE and make /dev/shm large enough",
    ),
    Trap(
        "OMP_PROC_BIND",
        _is_on,
        "note",
        "threads are bound to cores; several workers of a host may share the same ones",
        "unset OMP_PROC_BIND, or bind each worker to cores of its own (srun --cpu-bind=cores)",
    ),
    Trap(
        "GOMP_CPU_AFFINITY",
        _is_set,
        "note",
        "threads are bound to these cores, those of every worker to the same ones",
        "unset GOMP_CPU_AFFINITY, or set it for each worker",
    ),
    Trap(
        "MLFLOW_TRACKING_URI",
        _is_set,
        "note",
        "is not read: the store is tracking.mlflow_uri",
        "tracking.mlflow_uri=... in the configuration",
    ),
    Trap(
        "MLFLOW_TRACKING_INSECURE_TLS",
        _is_on,
        "warning",
        "the certificate of the MLflow server is not checked",
        "MLFLOW_TRACKING_SERVER_CERT_PATH=FILE with its certificate instead",
    ),
    Trap(
        "PYTHONOPTIMIZE",
        _is_on,
        "note",
        "checks of invariants (assert) are left out",
        "unset PYTHONOPTIMIZE",
    ),
    Trap(
        "PYTHONHOME",
        _is_set,
        "warning",
        "another Python's standard library may be loaded",
        "unset PYTHONHOME",
    ),
    Trap(
        "LD_PRELOAD",
        _is_set,
        "note",
        "these libraries come before all others, in every process",
        "unset LD_PRELOAD, unless you know what it is for",
    ),
)


def trap_findings(setting: Setting) -> Iterator[Finding]:
    """Variables of this environment that are traps."""
    yield from traps(setting.environment)


def traps(environment: Mapping[str, str]) -> Iterator[Finding]:
    """As `trap_findings`, of any environment."""
    found = 0
    for trap in TRAPS:
        value = environment.get(trap.name)
        if value is not None and trap.harms(value):
            found += 1
            # The values of these are no secrets, but an address may hold one.
            yield Finding(trap.name, trap.level, f"is {value}: {trap.effect}", trap.remedy)
    if not found:
        yield ok("variables", f"none of {len(TRAPS)} known traps is set")


def shadow_findings(setting: Setting) -> Iterator[Finding]:
    """Files before the installed packages that hide them, and packages installed twice."""
    wanted = _import_names()
    yield ok("dist_dml", f"{dist_dml.__version__} from {Path(dist_dml.__file__).parent}")
    first = [Path(entry or ".") for entry in sys.path[:1]]
    given = setting.environment.get("PYTHONPATH", "")
    listed = [Path(entry) for entry in given.split(":") if entry]
    hidden = list(shadows([*first, *listed], wanted))
    yield from hidden
    if listed and not hidden:
        yield ok("PYTHONPATH", f"{given}: hides none of the packages that are used")
    yield from twice(_locations())


def shadows(folders: Iterable[Path], wanted: Iterable[str]) -> Iterator[Finding]:
    """Modules in `folders` that hide the standard library's or a package's of the same name.

    Args:
        folders: those that Python looks into before the installed packages.
        wanted: names that packages are imported by.
    """
    names = {*sys.stdlib_module_names, *wanted}
    for folder in dict.fromkeys(path.absolute() for path in folders):
        if folder.name in ("site-packages", "dist-packages") or not folder.is_dir():
            continue
        modules = {path.stem for path in folder.glob("*.py")}
        # A folder without __init__.py gives way to a package of that name further on.
        modules |= {path.parent.name for path in folder.glob("*/__init__.py")}
        if hidden := sorted(modules & names):
            yield Finding(
                "hidden modules",
                "problem",
                f"{', '.join(hidden[:5])} in {folder} come(s) before the installed one",
                f"rename these, or take {folder} out of PYTHONPATH and of the folders you start in",
            )


def twice(locations: Mapping[str, Iterable[str]]) -> Iterator[Finding]:
    """Packages that are installed in two places, of which Python takes the first.

    Args:
        locations: by package, the folders that hold one.
    """
    for name, places in locations.items():
        folders = list(dict.fromkeys(places))
        if len(folders) > 1:
            yield Finding(
                f"{name} twice",
                "warning",
                f"{name} is in {' and in '.join(folders)}; the first one counts",
                f"pip uninstall {name} in one of them, or PYTHONNOUSERSITE=1 for the user's own",
            )


def _import_names() -> set[str]:
    """The names that the packages of `TESTED` are imported by."""
    wanted = {*TESTED, *FAISS}
    by_module = metadata.packages_distributions()
    return {
        module
        for module, distributions in by_module.items()
        if any(_normal(name) in wanted for name in distributions)
    }


def _locations() -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for distribution in metadata.distributions():
        name = _normal(distribution.metadata["Name"] or "")
        if name in TESTED:
            found[name].append(str(Path(str(distribution.locate_file(""))).resolve()))
    return found


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")
