"""The CPU kernels against the dense float64 twin, and what they promise besides."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from dense_kernels import dense_forward, dense_update
from kernel_cases import (
    BACKWARD_CASES,
    FORWARD_CASES,
    SPLIT_TOLERANCE,
    KernelCase,
    check_backward,
    check_forward,
    coefficients_of,
)
from kernel_update_cases import UPDATE_CASES, UpdateCase, check_filter, check_updates
from torch import Tensor

from dist_dml.parallel.class_sweeps import (
    ClassStep,
    GradientTarget,
    KernelBackend,
    KernelClasses,
    RowCoefficients,
    SoftmaxSums,
    UpdateTarget,
)
from dist_dml.parallel.sweep_native import NativeBackend, native_backend

# More than 1000 classes in tiles of 64, so that two threads have several tiles each.
SEVERAL_TILES = KernelCase(70, 1001, 40, bias=True, tile_classes=64, row_chunk=32)


@pytest.fixture(scope="module")
def backend() -> NativeBackend:
    """The kernels; compiled once a machine."""
    found = native_backend()
    if isinstance(found, str):
        pytest.skip(found)
    assert isinstance(found, KernelBackend)
    return found


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def skip_without_products(backend: NativeBackend, dtype: torch.dtype) -> None:
    if reason := backend.supports(dtype):
        pytest.skip(reason)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("case", FORWARD_CASES, ids=str)
def test_sums_are_the_twins(backend: NativeBackend, case: KernelCase) -> None:
    skip_without_products(backend, case.operand_dtype)
    check_forward(backend, case)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("case", BACKWARD_CASES, ids=str)
def test_gradients_are_the_twins(backend: NativeBackend, case: KernelCase) -> None:
    skip_without_products(backend, case.operand_dtype)
    check_backward(backend, case)


FLOAT32_FORWARD = [case for case in FORWARD_CASES if case.operand_dtype == torch.float32]
FLOAT32_BACKWARD = [case for case in BACKWARD_CASES if case.operand_dtype == torch.float32]


@pytest.mark.parametrize("case", FLOAT32_FORWARD, ids=str)
def test_sums_of_split_operands_keep_16_bits(backend: NativeBackend, case: KernelCase) -> None:
    skip_without_products(backend, torch.bfloat16)
    check_forward(backend, replace(case, split_operands=True), SPLIT_TOLERANCE)


@pytest.mark.parametrize("case", FLOAT32_BACKWARD, ids=str)
def test_gradients_of_split_operands_keep_16_bits(backend: NativeBackend, case: KernelCase) -> None:
    skip_without_products(backend, torch.bfloat16)
    check_backward(backend, replace(case, split_operands=True), SPLIT_TOLERANCE)


def test_split_operands_are_between_bfloat16_and_float32(backend: NativeBackend) -> None:
    """Hundreds of times closer than bfloat16: the rest of each operand is not lost."""
    skip_without_products(backend, torch.bfloat16)
    rows, columns, classes = SEVERAL_TILES.tensors()
    wanted = dense_forward(rows, columns, classes, False)

    def error(other: KernelClasses) -> float:
        found = backend.forward(rows, columns, other, False, True, False)
        assert found.pull is not None
        assert wanted.pull is not None
        return ((found.pull - wanted.pull).abs().max() / wanted.pull.abs().max()).item()

    halves = error(replace(classes, operand_dtype=torch.bfloat16))
    split = error(replace(classes, split_operands=True))
    assert error(classes) < split < halves / 100


@pytest.mark.parametrize("case", UPDATE_CASES, ids=str)
def test_updates_in_place_are_the_twins(backend: NativeBackend, case: UpdateCase) -> None:
    skip_without_products(backend, case.operand_dtype)
    check_updates(backend, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_than_one_pass_takes_and_a_small_cache(
    backend: NativeBackend, dtype: torch.dtype
) -> None:
    """With 64 KiB of cache a pass takes 128 rows of 16 features: five passes, the last with 88."""
    skip_without_products(backend, dtype)
    small = replace(backend, cache_bytes=2**16)
    case = KernelCase(600, 130, 16, operand_dtype=dtype, smoothing=0.1, bias=True)
    for row_chunk in (0, 48):
        check_forward(small, replace(case, row_chunk=row_chunk))
        check_backward(small, replace(case, row_chunk=row_chunk))


def test_tiles_without_probability_are_left_out(backend: NativeBackend) -> None:
    check_filter(backend)


def problem_of(
    case: KernelCase, smoothing: float = 0.0
) -> tuple[Tensor, Tensor, KernelClasses, RowCoefficients]:
    rows, columns, classes = case.tensors()
    sums = dense_forward(rows, columns, classes, False)
    return rows, columns, classes, coefficients_of(sums, smoothing, case.num_classes)


def test_with_offsets_nothing_is_left_out(backend: NativeBackend) -> None:
    """Smoothing pulls every class, however improbable."""
    rows, columns, classes, coefficients = problem_of(SEVERAL_TILES, smoothing=0.1)
    found = []
    for filter_below in (0.0, 0.5):
        gradient = torch.zeros_like(classes.weight)
        chosen = replace(classes, filter_below=filter_below)
        target = GradientTarget(gradient)
        report = backend.backward(rows, columns, coefficients, chosen, 0, None, target)
        assert report.filtered_classes == 0
        found.append(gradient)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_bitwise_reproducible_and_hardly_depend_on_threads(
    backend: NativeBackend, dtype: torch.dtype
) -> None:
    skip_without_products(backend, dtype)
    rows, columns, classes, coefficients = problem_of(SEVERAL_TILES)
    classes = replace(classes, operand_dtype=dtype)
    before = torch.get_num_threads()
    results: list[list[Tensor]] = []
    for num_threads in (1, 2, 2):
        torch.set_num_threads(num_threads)
        sums = backend.forward(rows, columns, classes, True, True, False)
        gradient = torch.zeros_like(classes.weight)
        report = backend.backward(
            rows, columns, coefficients, classes, 0, None, GradientTarget(gradient)
        )
        assert sums.pull is not None
        results.append([*sums[:4], sums.pull, report.bias_gradient, gradient])
    torch.set_num_threads(before)
    for one, two, again in zip(*results, strict=True):
        assert torch.equal(two, again)
        finite = one.isfinite()
        assert torch.equal(one[~finite], two[~finite])  # Labels that are elsewhere.
        error = (one - two)[finite].abs().max() / one[finite].abs().max()
        assert error <= (1e-2 if dtype == torch.bfloat16 else 1e-5)
    # A tile's gradient depends on no other tile.
    assert torch.equal(results[0][-1], results[1][-1])


def test_exponentials_are_within_3e_7_and_far_from_0_within_4e_7(backend: NativeBackend) -> None:
    """Weights of 0 leave exp(bias) as the biases' gradient."""
    bias = torch.cat([torch.linspace(-87, 88, 20_001), torch.tensor([0.0, -100.0, -1e4, -1e30])])
    classes = KernelClasses(torch.zeros(len(bias), 1), bias)
    one = torch.ones(1)
    found = backend.backward(
        torch.ones(1, 1),
        torch.tensor([-1]),
        RowCoefficients(0 * one, one, 0 * one, 0 * one),
        classes,
        0,
        None,
        None,
    ).bias_gradient.double()
    wanted = bias.double().exp()
    error = (found / wanted - 1).abs()[:-3]
    assert float(error.max()) < 4e-7
    assert float(error[bias[:-3].abs() < 40].max()) < 3e-7
    assert found[-4] == 1
    assert not found[-3:].any()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_anywhere_makes_the_mass_no_number(
    backend: NativeBackend, bad: float, keep: bool
) -> None:
    """So that the step is refused, and not half done."""
    for dtype in (torch.float32, torch.bfloat16):
        if backend.supports(dtype):
            continue
        for case in (SEVERAL_TILES, replace(SEVERAL_TILES, cosine=False)):
            rows, columns, classes = case.tensors()
            classes = replace(classes, operand_dtype=dtype)
            broken = rows.clone()
            broken[3, 5] = bad
            mass = backend.forward(broken, columns, classes, False, True, keep).mass
            assert mass.isnan().tolist() == [i == 3 for i in range(len(rows))]
            weight = classes.weight.clone()
            weight[700, 2] = bad
            classes = replace(classes, weight=weight)
            mass = backend.forward(rows, columns, classes, False, True, keep).mass
            # An infinite weight gives an inner product of -inf to half of the rows, which is fine.
            assert mass.isnan().any() if classes.scale is None else mass.isnan().all()


def test_without_rows_decay_and_momentum_go_on(backend: NativeBackend) -> None:
    weight = torch.randn(100, 24, generator=torch.Generator().manual_seed(1))
    classes = KernelClasses(weight.clone(), scale=8.0)
    empty, none = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    sums = backend.forward(torch.zeros(0, 24), none, classes, True, True, True)
    assert sums.mass.shape == (0,)
    assert sums.pull is not None
    assert sums.pull.shape == (0, 24)
    state = {"momentum_buffer": torch.ones(100, 24)}
    step = ClassStep("sgd", 0.5, weight_decay=0.1, momentum=0.5, step=2)
    expected, new_state = dense_update(weight, torch.zeros(100, 24), state, step)
    backend.backward(
        torch.zeros(0, 24),
        none,
        RowCoefficients(empty, empty, empty, empty),
        classes,
        0,
        sums.kept,
        UpdateTarget(step, state, torch.tensor(True)),
    )
    torch.testing.assert_close(classes.weight, expected)
    torch.testing.assert_close(state["momentum_buffer"], new_state["momentum_buffer"])


@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "nearest"])
@pytest.mark.parametrize("num_features", [40, 7])
def test_rounding_is_the_twins_bit_by_bit(
    backend: NativeBackend, rounding: str, num_features: int
) -> None:
    """Where float32 is exact: a first step at a rate of 2, from this backend's own gradient."""
    case = KernelCase(37, 150, num_features, active=True, weight_dtype=torch.bfloat16)
    rows, columns, classes, coefficients = problem_of(case)
    gradient = torch.zeros(classes.weight.shape)
    inputs = rows, columns, coefficients, classes, 0, None
    backend.backward(*inputs, GradientTarget(gradient))
    step = ClassStep("sgd", 2.0, momentum=0.5, seed=2**40 + 3, first_class=2**32 - 20)
    step = replace(step, rounding=rounding)
    shape = classes.weight.shape
    state = {"momentum_buffer": torch.zeros(shape, dtype=torch.bfloat16)}
    if rounding == "kahan":
        state["compensation"] = torch.zeros(shape, dtype=torch.bfloat16)
    assert classes.active is not None
    weight, new_state = dense_update(
        classes.weight.clone(), gradient[classes.active], state, step, classes.active
    )
    before = classes.weight.clone()
    backend.backward(*inputs, UpdateTarget(step, state, torch.tensor(True)))
    assert not torch.equal(before, weight)
    assert torch.equal(classes.weight, weight)
    for name, value in new_state.items():
        assert torch.equal(state[name], value), name


def test_backward_leaves_kept_logits_as_they_are(backend: NativeBackend) -> None:
    rows, columns, classes, coefficients = problem_of(SEVERAL_TILES)
    kept = backend.forward(rows, columns, classes, False, True, True).kept
    found = []
    for _ in range(2):
        gradient = torch.zeros_like(classes.weight)
        target = GradientTarget(gradient)
        backend.backward(rows, columns, coefficients, classes, 0, kept, target)
        found.append(gradient)
    assert torch.equal(*found)


def forward_of(backend: NativeBackend) -> SoftmaxSums:
    return backend.forward(*SEVERAL_TILES.tensors(), True, True, False)


def test_a_forked_process_starts_threads_of_its_own(backend: NativeBackend) -> None:
    inputs = SEVERAL_TILES.tensors()
    wanted = backend.forward(*inputs, True, True, False).mass.tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forks and threads.
        child = os.fork()
    if child == 0:  # Nothing of torch's that might wait for threads that a fork has lost.
        os._exit(backend.forward(*inputs, True, True, False).mass.tolist() != wanted)
    deadline = time.monotonic() + 30
    found, status = os.waitpid(child, os.WNOHANG)
    while found == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
        found, status = os.waitpid(child, os.WNOHANG)
    if found == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert found == child, "the child hangs"
    assert status == 0


def test_calls_from_several_python_threads_wait_for_each_other(backend: NativeBackend) -> None:
    wanted = forward_of(backend)
    found: list[SoftmaxSums] = []
    callers = [threading.Thread(target=lambda: found.append(forward_of(backend))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 4
    assert all(torch.equal(sums.mass, wanted.mass) for sums in found)


def test_other_operands_are_refused_in_words(backend: NativeBackend) -> None:
    assert "not torch.float16" in backend.supports(torch.float16)
    assert backend.supports(torch.float32) == ""


def test_the_environment_switches_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_DML_NATIVE", "0")
    assert native_backend() == "the environment says DIST_DML_NATIVE=0"


def test_biases_that_nobody_trains_cost_nothing(backend: NativeBackend) -> None:
    rows, columns, classes, coefficients = problem_of(SEVERAL_TILES)
    found = []
    for asked in (True, False):
        own = replace(classes, with_bias_gradient=asked)
        target = GradientTarget(torch.zeros_like(classes.weight))
        report = backend.backward(rows, columns, coefficients, own, 0, None, target)
        assert len(report.bias_gradient) == (classes.num_classes if asked else 0)
        found.append(target.gradient)
    assert torch.equal(*found)
