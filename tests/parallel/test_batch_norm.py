"""Whole-batch normalisation equals torch's batch norm of one process, for every cut of the rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worker_group import WorkerFailed, run_workers

from dist_dml.errors import UsageError
from dist_dml.parallel.batch_norm import WholeBatchNorm, convert_batch_norm, freeze_batch_norm

DOUBLE = {"rtol": 1e-10, "atol": 1e-10}


def _case(dims: int, dtype: torch.dtype = torch.float64, rows: int = 11) -> tuple[Tensor, Tensor]:
    """Values far from zero mean, and an upstream gradient, of a whole batch."""
    generator = torch.Generator().manual_seed(dims)
    shape = (rows, 5, *(4, 3, 2)[: dims - 2])
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 7
    return values.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _norm(dims: int, affine: bool = True, momentum: float | None = 0.1) -> nn.Module:
    kinds = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    norm = kinds[dims](5, affine=affine, momentum=momentum).double()
    if affine:
        generator = torch.Generator().manual_seed(3)
        norm.weight.data.normal_(generator=generator)
        norm.bias.data.normal_(generator=generator)
    return norm


def _run(norm: nn.Module, values: Tensor, gradient: Tensor, steps: int = 3) -> dict[str, Any]:
    """Outputs, gradients and buffers after `steps` training steps and one evaluation."""
    result: dict[str, Any] = {}
    for _ in range(steps):
        norm.zero_grad()
        leaf = values.clone().requires_grad_()
        output = norm(leaf)
        output.backward(gradient)
        result["output"], result["values.grad"] = output.detach(), leaf.grad
    result |= {f"{name}.grad": p.grad for name, p in norm.named_parameters()}
    result |= {name: b.clone() for name, b in norm.named_buffers()}
    result["evaluated"] = norm.eval()(values).detach()
    return result


def _worker(
    rank: int, num_workers: int, group: Any, counts: list[int], dims: int, options: dict[str, Any]
) -> dict[str, Any]:
    start = sum(counts[:rank])
    own = slice(start, start + counts[rank])
    options = dict(options)
    channels_last = options.pop("channels_last", False)
    values, gradient = _case(dims)
    values, gradient = values[own], gradient[own]
    if channels_last:
        values = values.contiguous(memory_format=torch.channels_last)
    return _run(convert_batch_norm(_norm(dims, **options), group), values, gradient)


def _whole_from(parts: list[dict[str, Any]]) -> dict[str, Any]:
    whole = dict(parts[0])
    for name in ("output", "values.grad", "evaluated"):
        whole[name] = torch.cat([part[name] for part in parts])
    for name in ("weight.grad", "bias.grad"):
        if name in whole:
            whole[name] = sum(part[name] for part in parts)
    for part in parts:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(part[name], parts[0][name]), f"{name} differs between workers"
    return whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("counts", "dims", "options"),
    [
        ([6, 5], 4, {}),
        ([7, 1, 3], 4, {"channels_last": True}),
        ([8, 0, 3], 4, {"momentum": None}),
        ([4, 3, 4], 2, {"affine": False}),
        ([9, 2], 5, {}),
    ],
)
def test_workers_with_uneven_rows_equal_one_process(tmp_path, counts, dims, options):
    parts = run_workers(_worker, len(counts), tmp_path, counts, dims, options)
    expected_options = {key: value for key, value in options.items() if key != "channels_last"}
    expected = _run(_norm(dims, **expected_options), *_case(dims))
    actual = _whole_from(parts)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda m, n=name: f"{n}: {m}", **DOUBLE)


def _bfloat16_worker(rank: int, num_workers: int, group: Any) -> dict[str, Any]:
    values, gradient = _case(4, torch.bfloat16)
    own = slice(0, 4) if rank == 0 else slice(4, None)
    norm = convert_batch_norm(_norm(4), group).float()
    return _run(norm, values[own], gradient[own])


@pytest.mark.slow
def test_bfloat16_rows_have_float32_statistics(tmp_path):
    actual = _whole_from(run_workers(_bfloat16_worker, 2, tmp_path))
    values, gradient = _case(4, torch.bfloat16)
    expected = _run(_norm(4), values.double(), gradient.double())
    assert actual["output"].dtype == torch.bfloat16
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=1e-5, atol=1e-5)
    for name in ("output", "values.grad"):
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=1e-2, atol=2e-2)


def _collective_worker(rank: int, num_workers: int, group: Any) -> Tensor:
    norm = WholeBatchNorm(3, group)
    freeze_batch_norm(norm)
    norm.train()
    # Would wait for the other worker for ever, were a collective called.
    return norm(torch.ones(2, 3)) if rank == 0 else torch.zeros(0)


@pytest.mark.slow
def test_frozen_statistics_need_no_other_worker(tmp_path):
    output = run_workers(_collective_worker, 2, tmp_path)[0]
    torch.testing.assert_close(output, torch.full((2, 3), (1 + 1e-5) ** -0.5))


def _failing_worker(rank: int, num_workers: int, group: Any) -> None:
    if rank == 1:
        raise ValueError("the reason")
    group.barrier().wait()


@pytest.mark.slow
def test_a_failing_worker_is_reported_with_its_reason(tmp_path):
    with pytest.raises(WorkerFailed, match=r"(?s)worker 1 of 2 failed.*ValueError: the reason"):
        run_workers(_failing_worker, 2, tmp_path)


@pytest.mark.parametrize("dims", [2, 4, 5])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_one_process_equals_torch(dims, momentum):
    norm = _norm(dims, momentum=momentum)
    expected = _run(copy.deepcopy(norm), *_case(dims))
    actual = _run(convert_batch_norm(norm, None), *_case(dims))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **DOUBLE)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_of_one_value_gives_the_bias_and_leaves_the_statistics(momentum):
    norm = convert_batch_norm(_norm(2, momentum=momentum), None)
    values = torch.full((1, 5), 3.0, dtype=torch.float64, requires_grad=True)
    output = norm(values)
    output.sum().backward()
    torch.testing.assert_close(output, norm.bias.detach()[None])
    torch.testing.assert_close(values.grad, torch.zeros_like(values))
    assert torch.equal(norm.running_mean, torch.zeros(5).double())
    assert torch.equal(norm.running_var, torch.ones(5).double())


def test_conversion_keeps_names_and_tensors():
    module = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()))
    before = module.state_dict(keep_vars=True)
    converted = convert_batch_norm(module, None)
    after = converted.state_dict(keep_vars=True)
    assert list(before) == list(after)
    assert all(after[name] is before[name] for name in before)
    assert isinstance(converted[1][0], WholeBatchNorm)


def test_frozen_statistics_survive_train_while_weight_and_bias_learn():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.BatchNorm2d(5)).double()
    convert_batch_norm(model, None)
    values = torch.randn(
        4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    evaluated = model.eval()(values)
    freeze_batch_norm(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trained = model.train()(values)
    torch.testing.assert_close(trained, evaluated)
    trained.square().sum().backward()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_statistics_that_do_not_exist_cannot_be_frozen():
    model = convert_batch_norm(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), None)
    with pytest.raises(UsageError, match=r"frozen_batch_norm=true, but layer 0 "):
        freeze_batch_norm(model)
