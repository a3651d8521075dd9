"""What replicates the embedder over the workers: one protocol, three engines.

The class-parallel loss is the mean over the whole batch already and its embedding gradient arrives
multiplied by the number of workers, so that an engine's average over workers is the gradient of one
process on the whole batch.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dist_dml.config import Config, OptimizerConfig
from dist_dml.models.embedder import Embedder, parameter_groups
from dist_dml.parallel.class_optim import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from dist_dml.parallel.world import World


@runtime_checkable  # The tests execute all annotations.
class Engine(Protocol):
    """The embedder as it trains. All methods are called by all workers together."""

    embedder: Embedder
    gradient_names: tuple[str, ...]
    """What `gradient_norms` has a number of: parameters, or `all` where they are not told apart."""

    def __call__(
        self, images: Tensor, row_keys: Int[Tensor, " r"], last: bool
    ) -> Float[Tensor, "r D"]:
        """Embeddings of this worker's rows of a micro-batch, for training.

        Args:
            images: uint8 (r, channels, size, size).
            row_keys: the rows' keys of random numbers.
            last: whether the batch is complete with this micro-batch, so that its backward reduces.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of the micro-batch of the last call."""
        ...

    def step(self, factor: float) -> None:
        """After each micro-batch. Clips and updates when the batch is complete.

        Args:
            factor: the schedule's factor of the learning rate.
        """
        ...

    def gradient_norms(self) -> Float[Tensor, " p"]:
        """L2 norms of the last update's gradients before clipping, on the device, by
        `gradient_names`: the same on every worker. Costs one pass over the gradients."""
        ...

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Optimizer state by `parameter|key`, the same for every engine and number of workers."""
        ...

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `optimizer_tensors`."""
        ...


def build_engine(config: Config, embedder: Embedder, world: World) -> Engine:
    """The engine that `engine.name` asks for; `embedder` holds its starting weights already."""
    if engine_name(config, world) == "deepspeed":
        from dist_dml.engine_deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, embedder)
    return TorchEngine(config, embedder, world)


def engine_name(config: Config, world: World) -> str:
    """`auto` resolved: DDP for several workers, otherwise one process."""
    if config.engine.name == "auto":
        return "ddp" if world.size > 1 else "single"
    return config.engine.name


def autocast(config: Config, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast of the embedder, or nothing."""
    if config.engine.precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


class TorchEngine:
    """One process, or DistributedDataParallel where there are several."""

    def __init__(self, config: Config, embedder: Embedder, world: World) -> None:
        self.embedder = embedder
        self._config = config
        self._device = world.device
        groups = groups_for_optimizer(embedder, config.optimizer)
        self._optimizer = build_optimizer(groups, config.optimizer, fused=False)
        self._base_rates = [group["lr"] for group in self._optimizer.param_groups]
        self._batch_is_complete = False
        self.gradient_names = tuple(
            name for name, parameter in embedder.named_parameters() if parameter.requires_grad
        )
        self._norms = torch.zeros(len(self.gradient_names), device=world.device)
        self._module: nn.Module = embedder
        if world.size > 1:
            # Buffers are equal on all workers by construction: batch norm sees the whole batch.
            self._module = nn.parallel.DistributedDataParallel(
                embedder,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
            )
            # Images are channels-last, weights contiguous: gradients of 1x1 and grey kernels differ
            # in the strides of dimensions of size 1, which say nothing, but DDP compares them.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket", UserWarning)
            self._settle_buckets()

    def _settle_buckets(self) -> None:
        """Run one step on blank images and forget it.

        DDP lays out its buckets anew after the first backward. The layout decides the order in
        which a ring adds up gradients, hence their last bits: without this, the first step of a
        resumed run would differ from the same step of an uninterrupted one on three and more
        workers.
        """
        state = {name: buffer.clone() for name, buffer in self.embedder.named_buffers()}
        image = self._config.data.image
        images = torch.zeros(
            2, image.channels, image.size, image.size, dtype=torch.uint8, device=self._device
        )
        self.embedder.train()
        self(images, torch.arange(2, device=self._device), last=True).sum().backward()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for name, buffer in self.embedder.named_buffers():
                buffer.copy_(state[name])

    def __call__(
        self, images: Tensor, row_keys: Int[Tensor, " r"], last: bool
    ) -> Float[Tensor, "r D"]:
        """See `Engine`; DDP reduces in the last micro-batch's backward only."""
        self._batch_is_complete = last
        if isinstance(self._module, nn.parallel.DistributedDataParallel):
            # What DDP's `no_sync` sets; it is read in forward and in backward.
            self._module.require_backward_grad_sync = last
        with autocast(self._config, self._device):
            return self._module(images, row_keys)

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        loss.backward()

    def step(self, factor: float) -> None:
        """See `Engine`."""
        if not self._batch_is_complete:
            return
        clip_norm = self._config.optimizer.clip_norm
        self._norms = norms_of_gradients(self.embedder)
        if clip_norm > 0:
            total = torch.linalg.vector_norm(self._norms)
            torch.nn.utils.clip_grads_with_norm_(self.embedder.parameters(), clip_norm, total)
        set_learning_rate(self._optimizer, self._base_rates, factor)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def gradient_norms(self) -> Float[Tensor, " p"]:
        """See `Engine`."""
        return self._norms

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return optimizer_tensors(self._optimizer, parameter_names(self.embedder))

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """See `Engine`."""
        load_optimizer_tensors(self._optimizer, parameter_names(self.embedder), tensors)


def norms_of_gradients(embedder: nn.Module) -> Float[Tensor, " p"]:
    """L2 norm of each trained parameter's gradient, in the order of `named_parameters`."""
    trained = [parameter for parameter in embedder.parameters() if parameter.requires_grad]
    # A parameter that takes no part in the loss has no gradient.
    grads = [p.new_zeros(()) if p.grad is None else p.grad for p in trained]
    # What PyTorch's own clipping calls: one launch for all.
    return torch.stack(torch._foreach_norm(grads))  # pyright: ignore[reportPrivateImportUsage]


def parameter_names(embedder: nn.Module) -> dict[Tensor, str]:
    """The name of each parameter."""
    return {parameter: name for name, parameter in embedder.named_parameters()}


def groups_for_optimizer(embedder: Embedder, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameter groups without the names, which an optimizer would carry along for nothing."""
    groups = parameter_groups(embedder, config)
    return [{key: value for key, value in group.items() if key != "names"} for group in groups]
