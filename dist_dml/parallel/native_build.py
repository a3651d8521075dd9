"""Compiling the CPU kernels at first use, and keeping the library for later processes.

The wheel stays pure Python: `native/` holds C++ sources, which need a C++20 compiler, torch's own
headers and libraries, and a few seconds once. The library is made for this machine's processor. It
lies in `$DIST_DML_CACHE`, else `$XDG_CACHE_HOME/dist_dml`, else `~/.cache/dist_dml`, under a name
that changes with all it depends on. `DIST_DML_NATIVE=0` switches the kernels off.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "native"
# Compilers wait for one another, so that 64 workers of a machine do not compile at once.
_LOCK_SECONDS = 120.0
_COMPILE_SECONDS = 300.0
# Neither switch touches infinities and NaN, as -ffast-math would. Fused products are needed: see
# `exp_of_nonpositive` in lanes.hpp.
_FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-pthread"),
    *("-w", "-Wno-psabi"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
# Values of neighbours are the same bits wherever they are computed: see exact_values.hpp.
_OWN_FLAGS = {"neighbours": ("-ffp-contract=off",)}


def load_library(source: str = "sweeps") -> ctypes.CDLL | str:
    """The compiled kernels of `native/SOURCE.cpp`, or in words why there are none."""
    if os.environ.get("DIST_DML_NATIVE") == "0":
        return "the environment says DIST_DML_NATIVE=0"
    compiler = find_compiler()
    if compiler is None:
        return "no C++ compiler: none of $CXX, g++, c++, clang++ is on the PATH"
    # What the build depends on, so that a changed environment is looked at anew.
    return _load(source, tuple(compiler), cache_folder())


def find_compiler() -> list[str] | None:
    """The command of the first C++ compiler that there is."""
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    return None


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    if folder := os.environ.get("DIST_DML_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "dist_dml"
    return Path.home() / ".cache" / "dist_dml"


@functools.cache
def _load(source: str, compiler: tuple[str, ...], folder: Path) -> ctypes.CDLL | str:
    command = [*compiler, *_FLAGS, *_OWN_FLAGS.get(source, ()), *_torch_flags()]
    try:
        name = f"{source}-{_key(command)}.so"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _one_at_a_time(folder / f"{name}.lock"):
                return _build_and_open(source, command, folder / name)
        except OSError:
            # Read-only or full: the library serves this process only. A fixed name under /tmp could
            # be anyone's.
            with tempfile.TemporaryDirectory(prefix="dist_dml-") as own:
                return _build_and_open(source, command, Path(own) / name)
    except (OSError, subprocess.SubprocessError) as error:
        return f"the kernels did not compile ({shlex.join(compiler)}): {_last_words(error)}"


def _build_and_open(source: str, command: list[str], library: Path) -> ctypes.CDLL:
    if library.exists():
        # A library that does not open (a torch of the same version with another ABI, a damaged
        # disk) is made again.
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(library))
    own = library.with_suffix(f".{os.getpid()}.tmp")
    try:
        subprocess.run(
            [*command, str(SOURCES / f"{source}.cpp"), *_libraries(), "-o", str(own)],
            check=True,
            capture_output=True,
            text=True,
            timeout=_COMPILE_SECONDS,
        )
        own.replace(library)
    finally:
        own.unlink(missing_ok=True)
    return ctypes.CDLL(str(library))


def _torch_flags() -> list[str]:
    include = Path(torch.__file__).parent / "include"
    abi = int(torch.compiled_with_cxx11_abi())
    return [f"-I{include}", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]


def _libraries() -> list[str]:
    # torch has loaded both: the linker needs them, not the loader.
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]


def _key(command: list[str]) -> str:
    """A hash of sources, command, compiler, torch and processor."""
    version = subprocess.run(
        [command[0], "--version"], check=True, capture_output=True, timeout=60
    ).stdout
    digest = hashlib.sha256(version)
    digest.update("\0".join([*command, str(torch.__version__), _processor()]).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """What -march=native looks at: machines that share a home folder may differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return os.uname().machine
    kinds = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Holds the lock of a file, if it can be had in time: without it, work is only done twice.

    A lock ends with the process that holds it, however it ends.
    """
    with path.open("w") as stream:
        deadline = time.monotonic() + _LOCK_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # A file system without locks.
                break
        yield


def _last_words(error: Exception) -> str:
    """One line: a compiler's first error, or what Python says."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or "").splitlines()
        errors = [line for line in lines if "error" in line] or lines[-1:]
        return errors[0].strip() if errors else f"exit code {error.returncode}"
    return " ".join(str(error).split())
