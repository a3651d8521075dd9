"""GPUs: what the driver says, what PyTorch sees, and whether the two fit one another."""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from dist_dml.doctor.findings import (
    Finding,
    Setting,
    gibibytes,
    note,
    ok,
    problem,
    skipped,
    warning,
)
from dist_dml.parallel.world import Ranks

_ASK_SECONDS = 10.0
_FIELDS = (
    *("index", "name", "driver_version", "memory.total", "mig.mode.current"),
    *("ecc.errors.uncorrected.volatile.total", "persistence_mode"),
)
# Nothing of ours is there yet: what is taken is somebody else's.
_TAKEN_SHARE = 0.1


@dataclass(frozen=True)
class DriverGpu:
    """A GPU as `nvidia-smi` lists it; `[N/A]` where the driver does not say."""

    index: str
    name: str
    driver: str
    mebibytes: str
    mig: str
    errors: str
    persistence: str


@dataclass(frozen=True)
class Gpu:
    """A GPU as PyTorch sees it.

    Attributes:
        index: among those that this process may use.
        total: bytes of its memory.
        free: bytes that nobody has taken.
        capability: major and minor number.
        bf16: whether it computes in bfloat16 itself.
        compiled: whether this PyTorch has kernels for it.
    """

    index: int
    name: str
    total: int
    free: int
    capability: tuple[int, int]
    bf16: bool
    compiled: bool


def gpu_findings(setting: Setting) -> Iterator[Finding]:
    """The GPUs of this host."""
    if setting.config.engine.device == "cpu":
        yield skipped("GPUs", "engine.device=cpu")
        return
    hidden = setting.environment.get("CUDA_VISIBLE_DEVICES")
    yield from compare(
        ask_driver(),
        visible_gpus(),
        torch.version.cuda,
        hidden,
        setting.ranks,
        setting.config.engine.device,
    )
    yield from smoke_findings()


def ask_driver() -> list[DriverGpu]:
    """What `nvidia-smi` lists; nothing where there is none, or it fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    asked = [command, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=_ASK_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_driver(done.stdout) if done.returncode == 0 else []


def parse_driver(text: str) -> list[DriverGpu]:
    """The lines of `nvidia-smi --query-gpu=... --format=csv,noheader,nounits`."""
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    return [DriverGpu(*(word.strip() for word in row)) for row in rows if len(row) == len(_FIELDS)]


def visible_gpus() -> list[Gpu]:
    """The GPUs that PyTorch sees. Makes a context on each, some hundred MiB until the end."""
    if not torch.cuda.is_available():
        return []
    compiled = torch.cuda.get_arch_list()
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        capability = (facts.major, facts.minor)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            Gpu(
                *(index, facts.name, total, free, capability),
                bf16=capability >= (8, 0),
                compiled=has_kernels(compiled, capability),
            )
        )
    return found


def has_kernels(compiled: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a build for these architectures runs: same major and no higher minor, or any PTX.

    >>> has_kernels(["sm_80", "sm_90"], (8, 6)), has_kernels(["sm_80", "sm_90"], (7, 0))
    (True, False)
    """
    for name in compiled:
        kind, _, digits = name.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            continue
        version = (int(digits[:-1]), int(digits[-1]))
        same = version[0] == capability[0] and version <= capability
        if same or (kind == "compute" and version <= capability):
            return True
    return False


def compare(
    driver: Sequence[DriverGpu],
    visible: Sequence[Gpu],
    built_for: str | None,
    hidden: str | None,
    ranks: Ranks,
    device: str = "auto",
) -> Iterator[Finding]:
    """Findings about the GPUs of one host.

    Args:
        driver: those of the machine.
        visible: those that PyTorch sees.
        built_for: CUDA version of this PyTorch; None for a build without CUDA.
        hidden: CUDA_VISIBLE_DEVICES; None where it is not set.
        ranks: how many workers this host has.
        device: engine.device.
    """
    if not visible:
        yield _none_visible(driver, built_for, hidden, device)
        return
    versions = {gpu.driver for gpu in driver}
    of_driver = f", driver {', '.join(sorted(versions))}" if versions else ""
    for gpu in visible:
        yield _one(gpu, of_driver)
    if len(visible) < ranks.local_size:
        yield problem(
            "GPUs for workers",
            f"{ranks.local_size} workers on this host and {len(visible)} visible GPU(s)",
            f"start at most {len(visible)} here (--nproc-per-node), or engine.device=cpu",
        )
    if len({gpu.name for gpu in visible}) > 1:
        yield note(
            "kinds of GPUs",
            " and ".join(dict.fromkeys(gpu.name for gpu in visible)),
            "the slowest sets the pace: CUDA_VISIBLE_DEVICES chooses equal ones",
        )
    yield from _of_driver(driver)


def _none_visible(
    driver: Sequence[DriverGpu], built_for: str | None, hidden: str | None, device: str
) -> Finding:
    if not driver:
        if device == "cuda":
            remedy = "engine.device=auto or cpu, or a machine with GPUs and NVIDIA's driver"
            return problem("GPUs", "engine.device=cuda, and no GPU is seen", remedy)
        return ok("GPUs", "none: training runs on the CPU")
    there = f"{len(driver)} x {driver[0].name} with driver {driver[0].driver}"
    if built_for is None:
        return problem(
            "GPUs",
            f"{there}, and this PyTorch is built without CUDA",
            "pip install --force-reinstall torch torchvision from PyTorch's CUDA index "
            "(https://pytorch.org/get-started), with the versions of constraints.txt",
        )
    if hidden is not None:
        return problem(
            "GPUs",
            f"{there}, hidden by CUDA_VISIBLE_DEVICES={hidden!r}",
            "unset CUDA_VISIBLE_DEVICES; engine.device=cpu trains without a GPU",
        )
    return problem(
        "GPUs",
        f"{there}, and PyTorch for CUDA {built_for} sees none",
        f"a driver for CUDA {built_for} or newer (nvidia-smi states the newest that it runs), or "
        "the container without --gpus all",
    )


def _one(gpu: Gpu, of_driver: str) -> Finding:
    major, minor = gpu.capability
    name = f"GPU {gpu.index}"
    measured = (
        f"{gpu.name}, {gibibytes(gpu.free)} free of {gibibytes(gpu.total)}, capability "
        f"{major}.{minor}, {'bfloat16' if gpu.bf16 else 'no bfloat16'}{of_driver}"
    )
    values = asdict(gpu)
    if not gpu.compiled:
        remedy = "a build of PyTorch for this GPU (its release notes list architectures)"
        return problem(name, f"{measured}; this PyTorch has no kernels for it", remedy, **values)
    if gpu.total - gpu.free > _TAKEN_SHARE * gpu.total:
        measured += f"; {gibibytes(gpu.total - gpu.free)} are taken already"
        return warning(name, measured, "nvidia-smi names the processes that hold it", **values)
    if not gpu.bf16:
        return note(name, measured, "engine.precision=float32 and tile_dtype=float32", **values)
    return ok(name, measured, **values)


def _of_driver(driver: Sequence[DriverGpu]) -> Iterator[Finding]:
    for gpu in driver:
        if gpu.mig.lower() == "enabled":
            yield note(
                f"GPU {gpu.index} MIG",
                "divided into instances: a process sees one of them, and NCCL connects none",
                "one worker an instance cannot train together: use whole GPUs (the administrator "
                "sets nvidia-smi -mig 0), or single-worker runs",
            )
        if gpu.errors.isdigit() and int(gpu.errors):
            yield problem(
                f"GPU {gpu.index} memory",
                f"{gpu.errors} uncorrected memory error(s) since the driver was loaded",
                "have the GPU reset or replaced; until then leave it out of CUDA_VISIBLE_DEVICES",
            )
    if any(gpu.persistence.lower() == "disabled" for gpu in driver):
        yield note(
            "persistence mode",
            "off: the driver is loaded anew for every first process, some seconds",
            "the administrator runs nvidia-persistenced, or nvidia-smi -pm 1",
        )


def smoke_findings() -> Iterator[Finding]:
    """One product on each GPU, compared with the CPU's: the driver and PyTorch really fit."""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        yield smoke(torch.device("cuda", index))


def smoke(device: torch.device, wrong_by: float = 0.0) -> Finding:
    """A product of two 256 x 256 matrices of float32 on a device, against float64 on the CPU.

    Args:
        device: to compute on.
        wrong_by: added to one entry; for tests.
    """
    name = f"{device} computes"
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=draw, dtype=torch.float64) for _ in range(2))
    found = (a.float().to(device) @ b.float().to(device)).double().cpu()
    found[0, 0] += wrong_by
    error = float((found - a @ b).abs().max())
    # TensorFloat-32 would be off by some hundredths.
    if not error < 1e-3:
        remedy = "leave this GPU out of CUDA_VISIBLE_DEVICES; unset variables that force TF32"
        return problem(name, f"a float32 product is wrong by {error:.2g}", remedy, error=error)
    return ok(name, f"a float32 product is right to {error:.1g}", error=error)
