"""What replicates the embedder over the workers: one protocol, three engines.

The class-parallel loss is the mean over the whole batch already and its embedding gradient arrives
multiplied by the number of workers, so that an engine's average over workers is the gradient of one
process on the whole batch.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from dist_dml.config import Config
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

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Optimizer state by `parameter|key`, the same for every engine and number of workers."""
        ...

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `optimizer_tensors`."""
        ...


def build_engine(config: Config, embedder: Embedder, world: World) -> Engine:
    """The engine that `engine.name` asks for; `embedder` holds its starting weights already."""
    if engine_name(config, world) == "deepspeed":
        return DeepSpeedEngine(config, embedder, world)
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
        groups = parameter_groups(embedder, config.optimizer)
        self._optimizer = build_optimizer(_without_names(groups), config.optimizer, fused=False)
        self._base_rates = [group["lr"] for group in self._optimizer.param_groups]
        self._batch_is_complete = False
        self._module: nn.Module = embedder
        if world.size > 1:
            # Buffers are equal on all workers by construction: batch norm sees the whole batch.
            self._module = nn.parallel.DistributedDataParallel(
                embedder,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
            )
            if config.data.image.channels == 1:
                # The strides of a dimension of size 1 say nothing; DDP compares them all the same.
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
        if clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.embedder.parameters(), clip_norm)
        set_learning_rate(self._optimizer, self._base_rates, factor)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return optimizer_tensors(self._optimizer, _names(self.embedder))

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """See `Engine`."""
        load_optimizer_tensors(self._optimizer, _names(self.embedder), tensors)


def _names(embedder: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in embedder.named_parameters()}


def _without_names(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "names"} for group in groups]


class DeepSpeedEngine:
    """DeepSpeed with ZeRO 0, 1 or 2. The class weights stay outside: averaging destroys them."""

    def __init__(self, config: Config, embedder: Embedder, world: World) -> None:
        deepspeed = _import_deepspeed()
        self.embedder = embedder
        groups = parameter_groups(embedder, config.optimizer)
        optimizer = build_optimizer(_without_names(groups), config.optimizer, fused=False)
        self._base_rates = [group["lr"] for group in optimizer.param_groups]
        self._zero_stage = config.engine.zero_stage
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=embedder, optimizer=optimizer, config=deepspeed_config(config)
        )

    def __call__(
        self, images: Tensor, row_keys: Int[Tensor, " r"], last: bool
    ) -> Float[Tensor, "r D"]:
        """See `Engine`; DeepSpeed's own autocast surrounds the forward."""
        assert last == self._engine.is_gradient_accumulation_boundary()
        return self._engine(images, row_keys)

    def backward(self, loss: Tensor) -> None:
        """See `Engine`. The loss is divided by rows already, so not by micro-batches again."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, factor: float) -> None:
        """See `Engine`; DeepSpeed counts the micro-batches itself."""
        set_learning_rate(self._optimizer, self._base_rates, factor)
        self._engine.step()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """See `Engine`. With ZeRO every worker takes part, as each holds a slice of the state."""
        if self._zero_stage == 0:
            return optimizer_tensors(self._torch_optimizer(), _names(self.embedder))
        names = _names(self.embedder)
        tensors: dict[str, Tensor] = {}
        for flat, parameters in self._flat_groups():
            for key, value in self._torch_optimizer().state.get(flat, {}).items():
                if not isinstance(value, Tensor):
                    continue
                for parameter in parameters:
                    whole = value.clone() if value.ndim == 0 else _gather(value, parameter)
                    tensors[f"{names[parameter]}|{key}"] = whole
        return tensors

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """See `Engine`. With ZeRO this worker takes its slice of each parameter's state."""
        if self._zero_stage == 0:
            load_optimizer_tensors(self._torch_optimizer(), _names(self.embedder), tensors)
            return
        names = _names(self.embedder)
        for flat, parameters in self._flat_groups():
            state: dict[str, Tensor] = {}
            for parameter in parameters:
                prefix = f"{names[parameter]}|"
                for full_name, value in tensors.items():
                    if full_name.startswith(prefix):
                        _put_fragment(state, full_name[len(prefix) :], value, parameter, flat)
            if state:
                self._torch_optimizer().state[flat] = state

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer if self._zero_stage == 0 else self._optimizer.optimizer

    def _flat_groups(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """ZeRO's flat slice of each parameter group, beside the parameters it was cut from."""
        zero = self._optimizer
        return list(zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True))


def _fragment(parameter: nn.Parameter) -> tuple[slice, slice] | None:
    """Where this worker's slice of a parameter lies: in the parameter, in ZeRO's flat group."""
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None  # This parameter lies in other workers' slices.
    own, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    return (
        slice(own.start, own.start + own.numel),
        slice(flat.start, flat.start + flat.numel),
    )


def _gather(flat_state: Tensor, parameter: nn.Parameter) -> Tensor:
    """One parameter's whole state. Slices do not overlap, so adding zeros changes no bit of them.

    DeepSpeed's own `safe_get_full_optimizer_state` needs links that it makes in its second step.
    """
    whole = torch.zeros(parameter.numel(), dtype=flat_state.dtype, device=flat_state.device)
    if (fragment := _fragment(parameter)) is not None:
        whole[fragment[0]] = flat_state[fragment[1]]
    dist.all_reduce(whole)
    return whole.view_as(parameter)


def _put_fragment(
    state: dict[str, Tensor], key: str, value: Tensor, parameter: nn.Parameter, flat: Tensor
) -> None:
    if value.ndim == 0:
        state[key] = value.clone()
        return
    whole = state.setdefault(key, torch.zeros_like(flat))
    if (fragment := _fragment(parameter)) is not None:
        whole[fragment[1]] = value.flatten()[fragment[0]].to(flat.device)


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's own configuration, made from ours: one source for every value."""
    return {
        # Rows may be uneven, so DeepSpeed's bookkeeping of batch sizes is not used; it needs
        # numbers.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.training.accumulate,
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_optimization": {"stage": config.engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {
            "enabled": config.engine.precision == "bfloat16",
            "dtype": "bfloat16",
        },
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def _import_deepspeed() -> Any:
    from dist_dml.errors import UsageError

    # DeepSpeed 0.19 calls a collective by the name it had before torch 2.13.
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into", FutureWarning)
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UsageError(
            f"engine.name=deepspeed, but it cannot be imported ({error}); install the extra "
            "dist_dml[deepspeed] through constraints.txt, or set engine.name=ddp"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On CPU DeepSpeed would compile an operator that only its inference uses: a minute at first
    # start, and fatal without a compiler. Results are the same without it.
    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if compatible is not None:
        compatible["deepspeed_shm_comm"] = False
    return deepspeed
