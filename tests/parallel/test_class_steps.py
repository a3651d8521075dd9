"""Steps that update classes in place: every backend, sweep, optimizer and dtype against one dense
twin under PyTorch's own optimizers; micro-batches, sampling, filtering, losses that are not finite.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from worker_group import run_workers

from dist_dml.class_config import ClassesConfig
from dist_dml.config import OptimizerConfig
from dist_dml.errors import UsageError
from dist_dml.loss_config import LossConfig
from dist_dml.parallel.class_partition import ClassPartition, part_bounds
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.collectives import gather_uneven

C, D, R, STEPS = 301, 12, 40, 50
SWEEPS = ("keep", "recompute", "row_chunked")
OPTIMIZERS = {
    "sgd": OptimizerConfig(name="sgd", learning_rate=0.5, class_weight_decay=1e-3),
    "nesterov": OptimizerConfig(name="sgd", learning_rate=0.5, nesterov=True),
    "plain sgd": OptimizerConfig(name="sgd", learning_rate=0.5, momentum=0.0),
    "adam": OptimizerConfig(name="adam", learning_rate=0.02, class_weight_decay=1e-3),
    "adamw": OptimizerConfig(name="adamw", learning_rate=0.02, class_weight_decay=0.1),
}
LOSSES = {
    "linear": LossConfig(init_std=0.5),
    "smoothed": LossConfig(init_std=0.5, label_smoothing=0.1),
    "arcface": LossConfig(name="arcface", scale=8.0, init_std=1.0),
    "balanced": LossConfig(name="balanced_softmax", init_std=0.5, class_weights="inverse"),
}
COUNTS = torch.arange(C) % 7 + 1


def classifier_of(
    loss: LossConfig,
    optimizer: OptimizerConfig,
    classes: ClassesConfig,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    num_workers: int = 1,
    group: ProcessGroup | None = None,
    micro_batches: int = 1,
) -> ClassParallelClassifier:
    partition = ClassPartition.of_worker(rank, num_workers, C, group)
    rows = -(-R // micro_batches)
    return ClassParallelClassifier(
        D, partition, loss, optimizer, 3, rows, "cpu", dtype, COUNTS, classes, micro_batches
    )


def swept(sweep: Any, backend: Any) -> ClassesConfig:
    """Several tiles, and several chunks of rows where they are cut."""
    chunk = 16 if sweep == "row_chunked" else 0
    return ClassesConfig(backend=backend, sweep=sweep, tile_classes=64, row_chunk=chunk)


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """Rows whose classes they resemble, so that the loss has somewhere to go."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, C, (R,), generator=generator)
    means = torch.randn(C, D, generator=torch.Generator().manual_seed(99))
    return means[labels] + 0.1 * torch.randn(R, D, generator=generator), labels


def logits_of(config: LossConfig, z: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    """A whole row of them, by formulas of the papers."""
    if config.name == "arcface":
        cosine = F.normalize(z, dim=1) @ F.normalize(w, dim=1).T
        angle = cosine.gather(1, y[:, None]).clamp(-1 + 1e-9, 1 - 1e-9).acos()
        moved = torch.where(
            angle + 0.5 > torch.pi, angle.cos() - 0.5 * 0.479425538604203, (angle + 0.5).cos()
        )
        return config.factor * cosine.scatter(1, y[:, None], moved)
    logits = z @ w.T + (0 if b is None else b)
    return logits + (COUNTS / COUNTS.sum()).log() if config.name == "balanced_softmax" else logits


def twin_steps(
    loss: LossConfig, optimizer: OptimizerConfig, steps: int
) -> tuple[Tensor, list[float], list[Tensor]]:
    """Weights after steps of a dense loss under torch.optim, in float64; losses; row gradients."""
    start = classifier_of(loss, optimizer, ClassesConfig(backend="torch"))
    w = start.weight.detach().double().requires_grad_()
    b = None if start.bias is None else start.bias.detach().double().requires_grad_()
    groups: list[dict[str, Any]] = [{"params": [w], "weight_decay": optimizer.class_weight_decay}]
    groups += [] if b is None else [{"params": [b], "weight_decay": 0.0}]
    kind: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    if optimizer.name == "sgd":
        own: Any = kind["sgd"](
            groups, optimizer.learning_rate, optimizer.momentum, nesterov=optimizer.nesterov
        )
    else:
        build = torch.optim.AdamW if optimizer.name == "adamw" else torch.optim.Adam
        own = build(groups, optimizer.learning_rate)
    class_weight = 1 / COUNTS.double()
    class_weight *= COUNTS.sum() / (class_weight * COUNTS).sum()
    losses, gradients = [], []
    for step in range(steps):
        rows, labels = batch_of(step)
        z = rows.double().requires_grad_()
        logits = logits_of(loss, z, w, b, labels)
        smoothing = loss.label_smoothing * C / (C - 1)
        values = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        if loss.class_weights == "inverse":
            values = values * class_weight[labels]
        own.zero_grad()
        values.mean().backward()
        own.step()
        losses.append(values.mean().item())
        assert z.grad is not None
        gradients.append(z.grad)
    return w.detach(), losses, gradients


def steps_of(
    classifier: ClassParallelClassifier, steps: int, micro_batches: int = 1
) -> tuple[list[float], list[Tensor]]:
    """The same steps in place; losses and row gradients."""
    losses, gradients = [], []
    for step in range(steps):
        rows, labels = batch_of(step)
        total, parts = 0.0, []
        for micro in range(micro_batches):
            start, stop = part_bounds(micro, micro_batches, R)
            own = rows[start:stop].clone().requires_grad_()
            output = classifier(
                own,
                labels[start:stop],
                (stop - start,),
                R,
                factor=1.0,
                last=micro == micro_batches - 1,
            )
            output.loss.backward()
            total += output.loss.item()
            assert own.grad is not None
            parts.append(own.grad)
        losses.append(total)
        gradients.append(torch.cat(parts))
    return losses, gradients


def assert_same_steps(
    classifier: ClassParallelClassifier,
    loss: LossConfig,
    optimizer: OptimizerConfig,
    steps: int,
    tolerance: float,
    micro_batches: int = 1,
) -> None:
    weight, losses, gradients = twin_steps(loss, optimizer, steps)
    got_losses, got_gradients = steps_of(classifier, steps, micro_batches)
    assert losses[-1] < losses[0] or steps < 10  # It learns: the twin is no standstill.
    torch.testing.assert_close(
        torch.tensor(got_losses),
        torch.tensor(losses),
        rtol=tolerance,
        atol=tolerance,
        check_dtype=False,
    )
    for got, want in zip(got_gradients, gradients, strict=True):
        allowed = max(tolerance, 1e-6)  # The rows, and hence their gradients, are float32.
        assert (got - want).abs().max() <= allowed * max(1e-3, want.abs().max().item())
    assert (classifier.weight - weight).abs().max() <= tolerance * weight.abs().max()
    assert classifier.weight.grad is None  # No gradient of the weights' size ever existed.


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_50_steps_in_place_equal_torch_optim(backend: Any, name: str) -> None:
    optimizer = OPTIMIZERS[name]
    classifier = classifier_of(LOSSES["linear"], optimizer, ClassesConfig(backend=backend))
    assert_same_steps(classifier, LOSSES["linear"], optimizer, STEPS, 3e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_split_operands_follow_the_dense_twin(loss: str) -> None:
    config = LOSSES[loss].model_copy(update={"tile_dtype": "bfloat16x3"})
    for backend in ("native", "torch"):
        classes = ClassesConfig.model_validate({"backend": backend})
        classifier = classifier_of(config, OPTIMIZERS["sgd"], classes)
        assert not (backend == "torch" and classifier.split)  # It computes in float32.
        assert_same_steps(classifier, config, OPTIMIZERS["sgd"], 20, 2e-3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_every_sweep_equals_the_dense_twin(backend: Any, sweep: Any, loss: str) -> None:
    classes = swept(sweep, backend)
    classifier = classifier_of(LOSSES[loss], OPTIMIZERS["sgd"], classes)
    assert classifier.plan.sweep == sweep
    assert_same_steps(classifier, LOSSES[loss], OPTIMIZERS["sgd"], 8, 1e-4)


@pytest.mark.parametrize("name", ["adaface", "proxy_anchor"])
def test_rows_that_belong_together_are_not_cut(name: Any) -> None:
    config = LossConfig(name=name, init_std=1.0)
    found = []
    for sweep in ("recompute", "row_chunked"):
        classifier = classifier_of(config, OPTIMIZERS["sgd"], swept(sweep, "torch"))
        found.append((*steps_of(classifier, 1), classifier.weight.detach()))
    (losses, gradients, weight), (others, theirs, other_weight) = found
    assert losses == pytest.approx(others, rel=1e-5)
    torch.testing.assert_close(torch.cat(gradients), torch.cat(theirs), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(weight, other_weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_equals_the_dense_twin_to_float64(sweep: Any) -> None:
    classes = swept(sweep, "torch")
    classifier = classifier_of(LOSSES["linear"], OPTIMIZERS["adamw"], classes, torch.float64)
    start = classifier_of(LOSSES["linear"], OPTIMIZERS["adamw"], ClassesConfig(backend="torch"))
    with torch.no_grad():
        classifier.weight.copy_(start.weight)
    assert_same_steps(classifier, LOSSES["linear"], OPTIMIZERS["adamw"], STEPS, 1e-10)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_micro_batches_make_one_update_with_the_whole_gradient(backend: Any, loss: str) -> None:
    classes = ClassesConfig(backend=backend, sweep="recompute", tile_classes=64)
    classifier = classifier_of(LOSSES[loss], OPTIMIZERS["sgd"], classes, micro_batches=3)
    assert_same_steps(classifier, LOSSES[loss], OPTIMIZERS["sgd"], 8, 1e-4, micro_batches=3)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_adagrad_keeps_one_number_a_class(backend: Any) -> None:
    optimizer = OptimizerConfig(name="sgd", learning_rate=0.1)
    classes = ClassesConfig(backend=backend, optimizer="adagrad")
    classifier = classifier_of(LOSSES["linear"], optimizer, classes)
    w, total = classifier.weight.detach().double(), torch.zeros(C, dtype=torch.float64)
    b, of_bias = torch.zeros(C, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)
    for step in range(5):
        rows, labels = batch_of(step)
        leaf, bias = w.clone().requires_grad_(), b.clone().requires_grad_()
        F.cross_entropy(rows.double() @ leaf.T + bias, labels).backward()
        assert leaf.grad is not None
        assert bias.grad is not None
        total += leaf.grad.square().mean(1)
        w = w - 0.1 * leaf.grad / (total.sqrt() + 1e-8)[:, None]
        of_bias += bias.grad.square()
        b = b - 0.1 * bias.grad / (of_bias.sqrt() + 1e-8)
    steps_of(classifier, 5)
    assert classifier.optimizer.state["sum"].shape == (C,)
    torch.testing.assert_close(classifier.weight.double(), w, rtol=1e-4, atol=1e-5)
    assert classifier.bias is not None
    torch.testing.assert_close(classifier.bias.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_bfloat16_weights_follow_float32_ones(backend: Any, rounding: Any) -> None:
    """Updates far smaller than a bfloat16's spacing add up: plain rounding would lose them all."""
    optimizer = OptimizerConfig(name="sgd", learning_rate=0.02, momentum=0.5)
    exact, *_ = twin_steps(LOSSES["linear"], optimizer, STEPS)
    classes = ClassesConfig(
        backend=backend, weight_dtype="bfloat16", state_dtype="bfloat16", rounding=rounding
    )
    classifier = classifier_of(LOSSES["linear"], optimizer, classes)
    start = classifier.weight.detach().double()
    steps_of(classifier, STEPS)
    assert classifier.weight.dtype == torch.bfloat16
    assert classifier.optimizer.state["momentum_buffer"].dtype == torch.bfloat16
    moved, wanted = classifier.weight.double() - start, exact - start
    if rounding == "kahan":
        moved = moved + classifier.optimizer.state["compensation"].double()
    error = (moved - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    spacing = start.abs().mean() * 2**-8
    # Rounding to nearest alone would leave most numbers where they are.
    assert wanted.abs().median() / STEPS < spacing / 4
    assert error < (0.15 if rounding == "kahan" else 0.8)
    along = (moved * wanted).sum() / wanted.square().sum()
    assert 0.93 < along < 1.07  # In the mean the movement is right.


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_both_backends_round_bfloat16_weights_by_the_same_chance(backend: Any) -> None:
    optimizer = OptimizerConfig(name="adam", learning_rate=0.02)
    weights = []
    for name in ("torch", backend):
        classes = ClassesConfig(backend=name, weight_dtype="bfloat16", state_dtype="bfloat16")
        classifier = classifier_of(LOSSES["linear"], optimizer, classes)
        steps_of(classifier, 1)
        weights.append(classifier.weight.detach())
    same = (weights[0] == weights[1]).double().mean()
    assert same > 0.99  # Sums in another order cross a threshold of the hash now and then.


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_loss_that_is_not_finite_changes_nothing(backend: Any) -> None:
    classes = ClassesConfig(backend=backend)
    classifier = classifier_of(LOSSES["linear"], OPTIMIZERS["sgd"], classes)
    steps_of(classifier, 2)
    before = {name: value.clone() for name, value in classifier.shard_tensors().items()}
    rows, labels = batch_of(3)
    rows[7, 2] = torch.nan
    output = classifier(rows.requires_grad_(), labels, (R,), R, factor=1.0)
    output.loss.backward()
    assert output.loss.isnan()
    after = classifier.shard_tensors()
    assert before.pop("weight|step") + 1 == after.pop("weight|step")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_rows_of_a_class_are_clipped_by_themselves(backend: Any) -> None:
    optimizer = OptimizerConfig(name="sgd", learning_rate=1.0, momentum=0.0)
    classes = ClassesConfig(backend=backend, clip_row_norm=0.01)
    classifier = classifier_of(LOSSES["linear"], optimizer, classes)
    before = classifier.weight.detach().clone()
    rows, labels = batch_of(0)
    leaf = before.double().requires_grad_()
    F.cross_entropy(rows.double() @ leaf.T, labels).backward()
    assert leaf.grad is not None
    norm = torch.linalg.vector_norm(leaf.grad, dim=1, keepdim=True)
    assert 0 < (norm > 0.01).sum() < C
    wanted = before - leaf.grad * (0.01 / norm).clamp_max(1)
    steps_of(classifier, 1)
    torch.testing.assert_close(classifier.weight.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_sampled_classes_alone_take_part_and_are_moved(backend: Any, name: str) -> None:
    optimizer = OPTIMIZERS[name]
    classes = ClassesConfig(backend=backend, sample="random", sample_rate=0.2, tile_classes=32)
    classifier = classifier_of(LOSSES["arcface"], optimizer, classes)
    steps_of(classifier, 3)  # All momenta of the early steps' classes would move on.
    before = classifier.weight.detach().clone()
    rows, labels = batch_of(3)
    active = classifier._participants.of_step(
        labels, classifier.weight.detach(), classifier.optimizer.num_steps
    )
    assert active is not None
    own = rows.clone().requires_grad_()
    output = classifier(own, labels, (R,), R, factor=1.0)
    output.loss.backward()
    z, w = rows.double().requires_grad_(), before[active.ids].double().requires_grad_()
    assert active.correction is not None
    positions = torch.searchsorted(active.ids, labels)
    logits = logits_of(LOSSES["arcface"], z, w, None, positions) + active.correction.double()
    loss = F.cross_entropy(logits, positions)
    loss.backward()
    assert abs(output.loss.item() - loss.item()) < 1e-5
    assert own.grad is not None
    assert z.grad is not None
    assert (own.grad - z.grad).abs().max() < 1e-6
    moved = (classifier.weight != before).any(1).nonzero().squeeze(1)
    assert torch.equal(moved, active.ids)


@pytest.mark.parametrize("sample", ["random", "neighbours"])
def test_sampling_everything_is_exact(sample: Any) -> None:
    more = {"sample_rate": 1.0} if sample == "random" else {"num_neighbours": C}
    classes = ClassesConfig.model_validate({"sample": sample, **more})
    classifier = classifier_of(LOSSES["linear"], OPTIMIZERS["sgd"], classes)
    try:
        assert_same_steps(classifier, LOSSES["linear"], OPTIMIZERS["sgd"], 5, 1e-4)
    finally:
        classifier.close()


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_filtered_tiles_are_counted_and_what_is_left_out_is_bounded(backend: Any) -> None:
    """Classes that no row resembles give nothing; the error is within the reported mass."""
    loss = LossConfig(init_std=0.5, bias=False)
    optimizer = OptimizerConfig(name="sgd", learning_rate=1.0, momentum=0.0)
    results = []
    for below in (0.0, 1e-4):
        classes = ClassesConfig(backend=backend, filter_below=below, tile_classes=16, row_chunk=64)
        classifier = classifier_of(loss, optimizer, classes)
        rows, labels = batch_of(0)
        labels = labels % 100
        with torch.no_grad():  # From class 200 on, all rows are far.
            classifier.weight[200:] = -2 * rows.mean(0) / rows.mean(0).norm()
            rows = rows + 4 * rows.mean(0) / rows.mean(0).norm()
        leaf = rows.requires_grad_()
        classifier(leaf, labels, (R,), R, factor=1.0).loss.backward()
        results.append((classifier, classifier.weight.detach().clone(), leaf.grad))
    (_, exact, gradient), (filtered, weight, got) = results
    memory = filtered.memory
    assert 50 <= int(memory.filtered_classes) <= 101
    mass = float(memory.filtered_mass)
    assert 0 < mass < 1e-2
    reach = batch_of(0)[0].abs().sum(1).max() + 40
    assert 0 < (exact - weight).abs().max() <= mass * reach
    assert (gradient - got).abs().max() <= mass * weight.abs().max()


def worker_steps(
    rank: int, num_workers: int, group: ProcessGroup | None, backend: Any, sample: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and losses of 4 steps of uneven rows, all together."""
    more = {"num_neighbours": 20} if sample == "neighbours" else {}
    classes = ClassesConfig.model_validate({"backend": backend, "sample": sample, **more})
    classifier = classifier_of(
        LOSSES["arcface"], OPTIMIZERS["sgd"], classes, torch.float32, rank, num_workers, group
    )
    losses, gradients = [], []
    counts = {1: (R,), 2: (13, R - 13), 3: (1, 20, R - 21)}[num_workers]
    first = sum(counts[:rank])
    for step in range(4):
        rows, labels = batch_of(step)
        own = rows[first : first + counts[rank]].clone().requires_grad_()
        mine = labels[first : first + counts[rank]]
        output = classifier(own, mine, counts, R, factor=1.0)
        output.loss.backward()
        assert own.grad is not None
        losses.append(output.loss.detach())
        gradients.append(own.grad / num_workers)
    sizes = tuple(
        stop - start for start, stop in (part_bounds(w, num_workers, C) for w in range(num_workers))
    )
    weight = gather_uneven(classifier.weight.detach(), sizes, group)
    rows = gather_uneven(torch.stack(gradients, 1), counts, group)
    classifier.close()
    return weight, torch.stack(losses), rows


@pytest.mark.parametrize("sample", ["all", "random", "neighbours"])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_workers_make_the_steps_of_one_process(backend: Any, sample: Any, tmp_path: Any) -> None:
    alone = worker_steps(0, 1, None, backend, sample)
    for num_workers in (2, 3):
        folder = tmp_path / str(num_workers)
        folder.mkdir()
        for results in run_workers(worker_steps, num_workers, folder, backend, sample):
            for got, want in zip(results, alone, strict=True):
                torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


def test_a_tile_that_cannot_fit_is_refused_before_the_first_step() -> None:
    config = LossConfig(tile_mebibytes=0.001)
    with pytest.raises(UsageError, match=r"loss\.tile_mebibytes=0\.001 is too small .* set it to"):
        classifier_of(config, OPTIMIZERS["sgd"], ClassesConfig(backend="torch"))


def test_kept_logits_that_cannot_fit_are_refused_before_the_first_step() -> None:
    config = LossConfig(tile_mebibytes=0.04)
    with pytest.raises(UsageError, match=r"classes\.sweep=keep"):
        classifier_of(config, OPTIMIZERS["sgd"], ClassesConfig(backend="torch", sweep="keep"))


def test_kernels_refuse_losses_that_they_do_not_know() -> None:
    config = LossConfig(name="l2", p=0.99)
    with pytest.raises(UsageError, match=r"classes\.backend=native cannot run loss\.name=l2"):
        classifier_of(config, OPTIMIZERS["sgd"], ClassesConfig(backend="native"))
    assert classifier_of(config, OPTIMIZERS["sgd"], ClassesConfig()).backend is None


def test_triton_without_a_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match=r"classes\.backend=triton cannot run"):
        classifier_of(LOSSES["linear"], OPTIMIZERS["sgd"], ClassesConfig(backend="triton"))
