"""DeepSpeed (ZeRO 0, 1, 2) behind the engine's protocol; the one module that knows it.

Its optimizer state leaves and enters by parameter name, so that a checkpoint fits every engine.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from dist_dml.config import Config
from dist_dml.engine import groups_for_optimizer, norms_of_gradients, parameter_names
from dist_dml.errors import UsageError
from dist_dml.models.embedder import Embedder
from dist_dml.parallel.class_optim import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)


class DeepSpeedEngine:
    """DeepSpeed with ZeRO 0, 1 or 2. The class weights stay outside: averaging destroys them."""

    def __init__(self, config: Config, embedder: Embedder) -> None:
        deepspeed = _import_deepspeed()
        self.embedder = embedder
        groups = groups_for_optimizer(embedder, config.optimizer)
        optimizer = build_optimizer(groups, config.optimizer, fused=False)
        self._base_rates = [group["lr"] for group in optimizer.param_groups]
        self._zero_stage = config.engine.zero_stage
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=embedder, optimizer=optimizer, config=deepspeed_config(config)
        )
        named = embedder.named_parameters()
        # With ZeRO a gradient lies in slices on several workers; only their common norm is known.
        self.gradient_names = ("all",)
        if self._zero_stage == 0:
            self.gradient_names = tuple(name for name, p in named if p.requires_grad)
        self._norms = torch.zeros(len(self.gradient_names))

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
        complete = self._engine.is_gradient_accumulation_boundary()
        if complete and self._zero_stage == 0:
            self._norms = norms_of_gradients(self.embedder)
        self._engine.step()
        if complete and self._zero_stage > 0:
            # Infinite where DeepSpeed has passed over the update because of its gradient.
            norm = self._engine.get_global_grad_norm()
            self._norms = torch.as_tensor(norm, dtype=torch.float32).detach().reshape(1)

    def gradient_norms(self) -> Float[Tensor, " p"]:
        """See `Engine`."""
        return self._norms

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """See `Engine`. With ZeRO every worker takes part, as each holds a slice of the state."""
        if self._zero_stage == 0:
            return optimizer_tensors(self._torch_optimizer(), parameter_names(self.embedder))
        names = parameter_names(self.embedder)
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
            load_optimizer_tensors(self._torch_optimizer(), parameter_names(self.embedder), tensors)
            return
        names = parameter_names(self.embedder)
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
