"""What computes outside PyTorch: FAISS, the CPU kernels and their compiler."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.doctor.findings import Finding, Setting, note, ok, problem, skipped, warning
from dist_dml.doctor.versions import FAISS, version_of
from dist_dml.parallel.machine import cpu_flags
from dist_dml.parallel.native_build import cache_folder, find_compiler

_COMPILE_SECONDS = 20.0
_PROGRAM = """#include <cstddef>
#include <span>
extern "C" float sum(const float* values, std::size_t n) {
    float total = 0;
    for (float value : std::span<const float>(values, n)) total += value;
    return total;
}
"""
# Sets that matter here, as Linux names them, from the widest.
_SETS = {
    "amx_bf16": "AMX bfloat16",
    "avx512_bf16": "AVX-512 bfloat16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}


def processor_findings(_: Setting) -> Iterator[Finding]:
    """Instruction sets of the processor."""
    yield processor(cpu_flags())


def processor(flags: frozenset[str]) -> Finding:
    """The finding about a processor with these features; none where the system does not say."""
    if not flags:
        return skipped("processor", "/proc/cpuinfo lists no flags")
    there = [name for flag, name in _SETS.items() if flag in flags]
    if "avx2" not in flags:
        remedy = "a processor of after 2013 for FAISS and the CPU kernels, or a GPU"
        return warning("processor", "no AVX2: vectors of 4 numbers at most", remedy)
    return ok("processor", ", ".join(there), sets=there)


def faiss_findings(setting: Setting) -> Iterator[Finding]:
    """FAISS: which packages, which build, and whether its neighbours are right."""
    yield from faiss_packages({name: version_of(name) for name in FAISS})
    from dist_dml.retrieval.faiss_threads import faiss_with_worker_threads

    try:
        faiss: Any = faiss_with_worker_threads()
    except ImportError as error:
        yield problem(
            "FAISS", f"cannot be loaded: {error}", "pip install --force-reinstall faiss-cpu"
        )
        return
    options = str(faiss.get_compile_options()).split()
    level = faiss.SIMDConfig.get_level_name() if hasattr(faiss, "SIMDConfig") else ""
    gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else None
    yield faiss_build(faiss.__version__, options, level, gpus, cpu_flags())
    backend = setting.config.evaluation.search_backend
    if backend == "faiss_gpu" and not gpus:
        yield problem(
            "FAISS on GPU",
            "evaluation.search_backend=faiss_gpu, and this FAISS has no GPU",
            "evaluation.search_backend=auto, or faiss-gpu instead of faiss-cpu",
        )
    yield neighbours(faiss)


def faiss_packages(versions: Mapping[str, str | None]) -> Iterator[Finding]:
    """Findings where several packages brought a `faiss`, or none did.

    Args:
        versions: of every package that does; None where it is not installed.
    """
    there = [name for name, version in versions.items() if version]
    if len(there) > 1:
        yield problem(
            "FAISS packages",
            f"{' and '.join(there)} are installed: each has overwritten files of the other",
            f"pip uninstall -y {' '.join(there)}, then pip install the one that is wanted",
        )
    elif there:
        yield ok("FAISS packages", f"{there[0]} {versions[there[0]]}")


def faiss_build(
    version: str, options: Sequence[str], level: str, gpus: int | None, flags: frozenset[str]
) -> Finding:
    """The finding about a build of FAISS on this processor.

    Args:
        version: of FAISS.
        options: it was compiled with.
        level: instruction set that it chose; "" where it does not say.
        gpus: that it sees; None for a build without GPUs.
        flags: of the processor.
    """
    words = {word.upper() for word in options}
    best = level or next((w for w in ("AVX512_SPR", "AVX512", "AVX2") if w in words), "GENERIC")
    on_gpu = "CPU only" if gpus is None else f"{gpus} GPU(s)"
    measured = f"{version}, {best}, {on_gpu}"
    values = {"instructions": best, "options": " ".join(options), "gpus": gpus}
    if best.upper() in ("GENERIC", "NONE") and "avx2" in flags:
        remedy = "pip install --force-reinstall faiss-cpu; unset FAISS_OPT_LEVEL, FAISS_SIMD_LEVEL"
        return warning("FAISS", f"{measured}, on a processor with AVX2", remedy, **values)
    return ok("FAISS", measured, **values)


def neighbours(faiss: Any) -> Finding:
    """The finding about 100 queries in 5,000 vectors of 64 numbers, against numpy.

    Args:
        faiss: the library.
    """
    draw = np.random.default_rng(0)
    gallery = draw.standard_normal((5000, 64), dtype=np.float32)
    queries = draw.standard_normal((100, 64), dtype=np.float32)
    started = time.perf_counter()
    scores, _ = faiss.knn(queries, gallery, 5, faiss.METRIC_INNER_PRODUCT)
    seconds = time.perf_counter() - started
    expected = -np.sort(-(queries @ gallery.T), axis=1)[:, :5]
    error = float(np.abs(scores - expected).max())
    if not error < 1e-3:
        remedy = "pip install --force-reinstall faiss-cpu, of the version in constraints.txt"
        return problem("FAISS neighbours", f"scores are wrong by {error:.2g}", remedy, error=error)
    measured = f"right to {error:.1g}; {100 / seconds:,.0f} queries/s in 5,000 vectors"
    return ok("FAISS neighbours", measured, error=error, seconds=seconds)


def compiler_findings(setting: Setting) -> Iterator[Finding]:
    """The compiler of the CPU kernels, and where it puts them."""
    if setting.environment.get("DIST_DML_NATIVE") == "0":
        remedy = "unset DIST_DML_NATIVE; without kernels a step on a CPU takes several times longer"
        yield note("CPU kernels", "switched off by DIST_DML_NATIVE=0", remedy)
        return
    command = find_compiler()
    if command is None:
        yield warning(
            "C++ compiler",
            "none of $CXX, g++, c++, clang++ is on the PATH: the CPU kernels cannot be built",
            "apt-get install g++ (on GPUs it is not needed, except by torch.compile)",
        )
        return
    yield compiles(command, cache_folder())


def compiles(command: Sequence[str], folder: Path) -> Finding:
    """The finding about a compiler: a C++20 library for this processor, built and loaded.

    Args:
        command: of the compiler.
        folder: where the kernels are kept.
    """
    import ctypes

    shown = shlex.join(command)
    kept = sorted(folder.glob("sweeps-*.so")) if folder.is_dir() else []
    with tempfile.TemporaryDirectory(prefix="dist_dml-doctor-") as own:
        source, library = Path(own) / "probe.cpp", Path(own) / "probe.so"
        source.write_text(_PROGRAM, encoding="utf-8")
        flags = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-shared")
        remedy = "g++ 10 or clang++ 12 at least (CXX=/path/to/it), which is tried again by itself"
        try:
            subprocess.run(
                [*command, *flags, str(source), "-o", str(library)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_COMPILE_SECONDS,
            )
            ctypes.CDLL(str(library))
        except subprocess.CalledProcessError as error:
            lines = [line for line in (error.stderr or "").splitlines() if "error" in line]
            measured = f"{shown} cannot build C++20: {(lines or ['no reason given'])[0][:160]}"
            return warning("C++ compiler", measured, remedy)
        except (OSError, subprocess.SubprocessError) as error:
            return warning(
                "C++ compiler",
                f"{shown}: {str(error)[:160]}",
                "TMPDIR and the kernels' cache on file systems that allow programs (no noexec)",
            )
    state = f"kernels kept in {folder}" if kept else f"kernels are built at first use, in {folder}"
    return ok("C++ compiler", f"{shown} builds C++20; {state}", kept=bool(kept))
