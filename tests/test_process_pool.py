"""Processes of a pool know the environment of the time at which the pool was made."""

from __future__ import annotations

import os

import pytest

from dist_dml.process_pool import process_pool


def values(*names: str) -> list[str | None]:
    return [os.environ.get(name) for name in names]


def set_variable(name: str, value: str) -> None:
    os.environ[name] = value


def test_a_variable_set_or_removed_after_the_forkserver_started_is_so_in_its_processes(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("DIST_DML_TEST_OLD", "old")
    monkeypatch.delenv("DIST_DML_TEST_NEW", raising=False)
    names = ("DIST_DML_TEST_OLD", "DIST_DML_TEST_NEW")
    with process_pool(1) as pool:
        assert pool.submit(values, *names).result(60) == ["old", None]
    monkeypatch.delenv("DIST_DML_TEST_OLD")
    monkeypatch.setenv("DIST_DML_TEST_NEW", "new")
    with process_pool(1) as pool:
        assert pool.submit(values, *names).result(60) == [None, "new"]


def test_each_process_is_started_with_what_is_given():
    with process_pool(1, set_variable, "DIST_DML_TEST_START", "here") as pool:
        assert pool.submit(values, "DIST_DML_TEST_START").result(60) == ["here"]
    assert "DIST_DML_TEST_START" not in os.environ
