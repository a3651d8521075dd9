"""Compiling at first use: what is reused, what is made again, what cannot be had."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from dist_dml.parallel import native_build
from dist_dml.parallel.native_build import cache_folder, find_compiler, load_library

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler here")


@pytest.fixture(autouse=True)
def _small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source of one line, which compiles in a moment, and an empty cache."""
    sources = tmp_path / "native"
    sources.mkdir()
    (sources / "sweeps.cpp").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(native_build, "SOURCES", sources)
    monkeypatch.setenv("DIST_DML_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DIST_DML_NATIVE", raising=False)
    native_build._load.cache_clear()


def answer_of(library: ctypes.CDLL | str) -> int:
    assert isinstance(library, ctypes.CDLL), library
    return library.answer()


def libraries() -> list[Path]:
    return sorted(cache_folder().glob("*.so"))


@needs_compiler
def test_a_library_is_compiled_once_and_nothing_else_is_left() -> None:
    assert answer_of(load_library()) == 42
    (library,) = libraries()
    made = library.stat().st_mtime_ns
    native_build._load.cache_clear()  # As another process would start.
    assert answer_of(load_library()) == 42
    assert library.stat().st_mtime_ns == made
    assert not list(cache_folder().glob("*.tmp"))


@needs_compiler
def test_changed_sources_make_another_library(tmp_path: Path) -> None:
    load_library()
    (tmp_path / "native" / "sweeps.cpp").write_text('extern "C" int answer() { return 43; }\n')
    native_build._load.cache_clear()
    assert answer_of(load_library()) == 43
    assert len(libraries()) == 2


@needs_compiler
def test_a_damaged_library_is_made_again() -> None:
    cache_folder().mkdir()
    key = native_build._key([*(find_compiler() or []), *native_build._FLAGS, *_flags()])
    (cache_folder() / f"sweeps-{key}.so").write_bytes(b"half a library")
    assert answer_of(load_library()) == 42
    assert len(libraries()) == 1


def _flags() -> list[str]:
    return native_build._torch_flags()


@needs_compiler
def test_a_folder_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("DIST_DML_CACHE", str(tmp_path / "file" / "cache"))
    assert answer_of(load_library()) == 42


@needs_compiler
def test_sources_that_do_not_compile_give_the_compilers_words(tmp_path: Path) -> None:
    (tmp_path / "native" / "sweeps.cpp").write_text("int answer( { return 42; }\n")
    found = load_library()
    assert isinstance(found, str)
    assert "did not compile" in found
    assert "error:" in found
    assert "\n" not in found
    assert not list(cache_folder().glob("*.tmp"))


def test_a_compiler_that_fails_and_none_at_all_give_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "false")
    found = load_library()
    assert isinstance(found, str)
    assert "did not compile (false)" in found
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert load_library() == "no C++ compiler: none of $CXX, g++, c++, clang++ is on the PATH"


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIST_DML_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/dist_dml")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/dist_dml")


@pytest.mark.slow
@needs_compiler
def test_workers_that_start_at_once_compile_the_real_sources_once() -> None:
    """Three processes, an empty cache: one library, and each can multiply with it."""
    program = (
        "from dist_dml.parallel.sweep_native import native_backend\n"
        "backend = native_backend()\n"
        "assert not isinstance(backend, str), backend\n"
    )
    workers = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0, 0]
    assert len(libraries()) == 1
    assert not list(cache_folder().glob("*.tmp"))
