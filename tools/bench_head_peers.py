"""The peers of `bench_head`: what one writes today instead of this project's head.

All share one set of float32 weights, whose gradient autograd makes in their full size and
`torch.optim.SGD` consumes. Partial FC is a model written from the published description of its
one-process step (Partial FC, CVPR 2022, and what its code is known to materialise): it is neither
its code nor faster or slower on purpose, and where there was a choice the cheaper way was taken
(CosFace's margin, which touches the label's logit only, no bias, no weight decay).

Dimensions: R rows, C classes, n classes that take part, D features.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench_head_variants import LEARNING_RATE, MARGIN, MOMENTUM, SCALE, Head
from torch import Tensor, nn

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A loss of (rows, weight, labels) under autograd.

    Attributes:
        exact: over all classes; else a sample of them.
        dtype: of the matrix products. Verdicts compare with exact float32 peers.
        loss: which loss it computes, to compare with the same one in float64.
    """

    function: LossFunction
    exact: bool = True
    dtype: str = "float32"
    loss: str = "cross_entropy"


def plain(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`F.cross_entropy` over whole rows of logits."""
    return F.cross_entropy(F.linear(rows, weight), labels)


def autocast(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`plain` under bfloat16 autocast."""
    with torch.autocast(rows.device.type, dtype=torch.bfloat16):
        return plain(rows, weight, labels)


def unchunked(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """PyTorch's function on its reference path."""
    return F.linear_cross_entropy(rows, weight, labels)


def chunked(rows: Tensor, weight: Tensor, labels: Tensor, batch_chunk_size: int | None) -> Tensor:
    """PyTorch's own answer to large logits, which cuts the batch instead of the classes."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=batch_chunk_size)
    return F.linear_cross_entropy(rows, weight, labels, options=options)


class _ProbabilitiesInPlace(torch.autograd.Function):
    """Mean cross-entropy whose logits become probabilities in place and keep the memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        logits.sub_(logits.max(dim=1, keepdim=True).values)
        logits.exp_()
        logits.div_(logits.sum(dim=1, keepdim=True))
        ctx.save_for_backward(logits, labels)
        return logits.gather(1, labels[:, None]).clamp_min_(1e-30).log_().mean().neg_()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        probabilities, labels = ctx.saved_tensors
        one_hot = torch.zeros_like(probabilities)
        one_hot.scatter_(1, labels[:, None], 1.0)
        probabilities.sub_(one_hot)
        probabilities.div_(len(labels))
        return probabilities * grad_outputs[0].item(), None


def sampled_classes(labels: Tensor, num_classes: int, rate: float) -> tuple[Tensor, Tensor]:
    """Partial FC's sample: the batch's labels and uniform others, and the labels' places in it.

    Returns:
        Ascending class ids (n,), where n is `rate * num_classes`, or the number of distinct labels
        if that is larger; and each label's position among them (R,).
    """
    present = labels.unique()
    # Drawn by the CPU's generator whatever the device, as published.
    chance = torch.rand(num_classes).to(labels.device)
    chance[present] = 2.0
    count = max(int(rate * num_classes), len(present))
    index = chance.topk(count).indices.sort().values
    return index, torch.searchsorted(index, labels)


def partial_fc(rows: Tensor, weight: Tensor, labels: Tensor, rate: float) -> Tensor:
    """A model of Partial FC's step on one process, `rate` of the classes taking part.

    The active weights are copied out of `weight`, normalised into another copy, multiplied,
    clamped, moved by the margin and scaled into a third copy of the logits. Autograd's backward of
    the copy makes a gradient of the size of all weights.
    """
    active = weight
    if rate < 1.0:
        index, labels = sampled_classes(labels, len(weight), rate)
        active = weight[index]
    logits = F.linear(F.normalize(rows), F.normalize(active)).clamp(-1.0, 1.0)
    with torch.no_grad():
        each = torch.arange(len(labels), device=labels.device)
        logits[each, labels] -= MARGIN
    return _ProbabilitiesInPlace.apply(logits * SCALE, labels)  # pyright: ignore[reportReturnType]


def cosface(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss that Partial FC computes with all classes, dense and under autograd."""
    cosines = F.linear(F.normalize(rows), F.normalize(weight))
    margin = MARGIN * F.one_hot(labels, len(weight)).to(rows.dtype)
    return F.cross_entropy(SCALE * (cosines - margin), labels)


def _liger(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    module = importlib.import_module("liger_kernel.transformers")
    return module.LigerFusedLinearCrossEntropyLoss()(weight, rows, labels)


def _cut_cross_entropy(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    module = importlib.import_module("cut_cross_entropy")
    # The exact setting: the default one leaves out gradients below 2.4e-4, that is most of them.
    return module.linear_cross_entropy(rows.bfloat16(), weight.bfloat16(), labels, impl="cce_exact")


PLAIN, SAMPLED, PUBLISHED = "F.linear + F.cross_entropy", "Partial FC r = 0.1", "Partial FC r = 1"
PEERS = {
    PLAIN: Peer(plain),
    "F.linear_cross_entropy": Peer(unchunked),
    "F.linear_cross_entropy, auto chunks": Peer(partial(chunked, batch_chunk_size=None)),
    "F.linear_cross_entropy, 128-row chunks": Peer(partial(chunked, batch_chunk_size=128)),
    PUBLISHED: Peer(partial(partial_fc, rate=1.0), loss="cosface"),
    SAMPLED: Peer(partial(partial_fc, rate=0.1), exact=False, loss="cosface"),
    f"{PLAIN}, bf16 autocast": Peer(autocast, dtype="bfloat16"),
}
_GPU_PEERS = {
    "Liger": ("liger_kernel", Peer(_liger)),
    "ml-cross-entropy, exact": ("cut_cross_entropy", Peer(_cut_cross_entropy, dtype="bfloat16")),
}
PEERS |= {
    name: peer
    for name, (module, peer) in _GPU_PEERS.items()
    if torch.cuda.is_available() and importlib.util.find_spec(module)
}


def fused_is_faster(weight: nn.Parameter) -> bool:
    """Whether peers are better off with `fused=True`, by the median of three updates each."""
    weight.grad = torch.zeros_like(weight)
    times: dict[bool, list[float]] = {True: [], False: []}
    optimizers = {fused: _sgd(weight, fused, learning_rate=0.0) for fused in times}
    for repetition in range(4):
        for fused, optimizer in optimizers.items():
            _synchronise(weight.device)
            started = time.perf_counter()
            optimizer.step()
            _synchronise(weight.device)
            if repetition:  # The first one makes the state.
                times[fused].append(time.perf_counter() - started)
    weight.grad = None
    return statistics.median(times[True]) < statistics.median(times[False])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sgd(weight: nn.Parameter, fused: bool, learning_rate: float) -> torch.optim.SGD:
    """PyTorch's SGD with momentum, one of its two implementations for a single tensor."""
    return torch.optim.SGD([weight], learning_rate, MOMENTUM, fused=fused)


def peer_heads(
    names: Iterable[str],
    weight: nn.Parameter,
    fused: bool,
    momentum: Tensor | None = None,
    learning_rate: float = LEARNING_RATE,
) -> dict[str, Head]:
    """Peers over one set of weights and one optimizer, which take turns.

    A gradient is dropped after a step, PyTorch's default.

    Args:
        names: of `PEERS`.
        weight: (C, D).
        fused: which SGD.
        momentum: (C, D), to be used as SGD's state; None lets it make its own.
        learning_rate: of SGD.
    """
    optimizer = _sgd(weight, fused, learning_rate)
    if momentum is not None:
        optimizer.state[weight]["momentum_buffer"] = momentum

    def step(function: LossFunction, rows: Tensor, labels: Tensor) -> Tensor:
        loss = function(rows, weight, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def state() -> dict[str, Tensor]:
        return {"weight|momentum_buffer": optimizer.state[weight]["momentum_buffer"]}

    return {name: Head(weight, partial(step, PEERS[name].function), state) for name in names}
