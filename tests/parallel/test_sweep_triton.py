"""The Triton kernels against the dense float64 twin: on a CUDA device, or interpreted on a CPU."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    BACKWARD_CASES,
    FORWARD_CASES,
    TOLERANCES,
    KernelCase,
    check_backward,
    check_forward,
)
from kernel_update_cases import UPDATE_CASES, UpdateCase, check_filter, check_updates

from dist_dml.errors import UsageError
from dist_dml.parallel.class_sweeps import KernelBackend, KernelClasses
from dist_dml.parallel.sweep_triton import TritonBackend, triton_backend
from dist_dml.parallel.triton_blocks import launch_classes

ON_CUDA = torch.cuda.is_available()
with pytest.MonkeyPatch.context() as patch:
    # Read once, when a kernel is made, and triton's own library has some: before its first import.
    # Processes that other tests start must not see it.
    if not ON_CUDA:
        patch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="triton is not installed")
    importlib.import_module("dist_dml.parallel.triton_backward")

interpreter = pytest.mark.skipif(ON_CUDA, reason="with a CUDA device the kernels run there")
gpu = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")


@pytest.fixture(scope="module")
def backend() -> Iterator[TritonBackend]:
    """One for all tests of the file: what a case leaves in its buffers must not matter."""
    with pytest.MonkeyPatch.context() as patch:
        if not ON_CUDA:
            patch.setenv("TRITON_INTERPRET", "1")
        found = triton_backend()
        assert isinstance(found, TritonBackend), found
        assert isinstance(found, KernelBackend)
        yield found


def test_without_a_device_and_the_interpreter_the_reason_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = triton_backend()
    assert isinstance(found, TritonBackend) if ON_CUDA else found == "there is no CUDA device"


@interpreter
@pytest.mark.parametrize("case", FORWARD_CASES, ids=str)
def test_interpreted_sums_are_the_twins(backend: TritonBackend, case: KernelCase) -> None:
    check_forward(backend, case)


@interpreter
@pytest.mark.parametrize("case", BACKWARD_CASES, ids=str)
def test_interpreted_gradients_are_the_twins(backend: TritonBackend, case: KernelCase) -> None:
    check_backward(backend, case)


@interpreter
@pytest.mark.parametrize("case", UPDATE_CASES, ids=str)
def test_interpreted_updates_in_place_are_the_twins(
    backend: TritonBackend, case: UpdateCase
) -> None:
    check_updates(backend, case, num_steps=2)


@interpreter
def test_interpreted_filter_leaves_out_no_more_than_it_reports(backend: TritonBackend) -> None:
    check_filter(backend)


def test_more_features_than_a_core_holds_are_refused(backend: TritonBackend) -> None:
    classes = KernelClasses(torch.zeros(3, 513))
    with pytest.raises(UsageError, match=r"up to 512 features, got 513; set classes\.backend="):
        backend.forward(torch.zeros(2, 513), torch.zeros(2).long(), classes, False, False, False)


def test_a_launch_has_a_block_for_every_core_and_then_what_the_cache_holds() -> None:
    # 132 cores, blocks of 64: what 1024 rows leave is 3 KiB a class, 26 MB for one wave.
    assert launch_classes(1024, 2, 1024, 132, 64, 50 * 2**20) == 132 * 64
    # 64 rows leave 1.1 KiB a class: two waves are 19 MB of the 21 that may be used.
    assert launch_classes(64, 2, 1024, 132, 64, 50 * 2**20) == 2 * 132 * 64


def on_cuda(case: KernelCase) -> KernelCase:
    """Sizes that fill several real blocks, with ragged ends."""
    return replace(case, num_rows=case.num_rows * 3 + 1, num_classes=case.num_classes * 9 + 5)


# `ex2.approx` is off by 2 units in the last place, and cuBLAS sums in another order.
CUDA_TOLERANCES = {
    dtype: replace(tolerance, logits=1e-6, products=2 * tolerance.products)
    for dtype, tolerance in TOLERANCES.items()
}


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BACKWARD_CASES, ids=str)
def test_sums_and_gradients_on_cuda_are_the_twins(
    backend: TritonBackend, case: KernelCase, operands: torch.dtype
) -> None:
    for sized in (case, on_cuda(case)):
        wanted = replace(sized, operand_dtype=operands)
        check_forward(backend, wanted, CUDA_TOLERANCES[operands], "cuda")
        check_backward(backend, wanted, CUDA_TOLERANCES[operands], "cuda")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("num_features", [256, 512])
def test_wide_embeddings_on_cuda_are_the_twins(backend: TritonBackend, num_features: int) -> None:
    for operands in (torch.float32, torch.bfloat16):
        case = KernelCase(200, 20_000, num_features, operand_dtype=operands, bias=True)
        check_forward(backend, case, CUDA_TOLERANCES[operands], "cuda")
        check_backward(backend, case, CUDA_TOLERANCES[operands], "cuda")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("case", UPDATE_CASES, ids=str)
def test_updates_in_place_on_cuda_are_the_twins(backend: TritonBackend, case: UpdateCase) -> None:
    check_updates(backend, case, device="cuda")


@gpu
@pytest.mark.gpu
def test_the_filter_on_cuda_leaves_out_no_more_than_it_reports(backend: TritonBackend) -> None:
    check_filter(backend, "cuda")


@pytest.mark.slow
def test_the_kernels_compile_for_hopper_and_fit_a_core() -> None:
    """The interpreter accepts what the compiler does not: types that change in a loop, for one."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    here = Path(__file__).resolve()
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parents[2]), str(here.parents[1])])
    command = [sys.executable, str(here.parents[1] / "compile_triton.py")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
