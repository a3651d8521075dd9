"""CPU backend of the sweeps: C++ kernels that keep a tile in a core's L2 cache.

Logits of a tile stand transposed, one class a row, in a few hundred KiB; exponentials are computed
in one pass with the sums that need them; a tile's gradient is used while its weights are in the
cache. Matrix products are oneDNN's (AVX2, AVX-512, AMX for bfloat16 operands), through torch.
Memory beyond weights and state: less than an L2 cache a thread, and the rows once more in the
layouts of products. `native_build` compiles the sources of `native/` at first use.

Results are the same bits for the same inputs and number of threads (`torch.get_num_threads()`).

Dimensions: R rows, N rows of all micro-batches, c classes of this worker, n of them that take part,
D features.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.errors import RunError
from dist_dml.parallel.class_sweeps import (
    GradientTarget,
    KernelClasses,
    RowCoefficients,
    SoftmaxSums,
    SweepReport,
    UpdateTarget,
)
from dist_dml.parallel.native_build import load_library
from dist_dml.parallel.native_calls import (
    NativeStructure,
    native_address,
    native_call,
    native_fields,
)

_KINDS = {"sgd": 0, "adam": 1, "adamw": 2, "adagrad": 3}
_ROUNDINGS = {"nearest": 0, "stochastic": 1, "kahan": 2}
_SPLIT = 2  # `operand` of float32 as two bfloat16, beside those of `_DTYPES`.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class _Problem(NativeStructure):
    _fields_: ClassVar = native_fields(
        "*rows num_rows num_features *columns *weight *bias *active num_classes .scale "
        ".filter_below weight_is_half operand tile_classes row_chunk num_threads "
        "cache_bytes"
    )


class _ForwardResult(NativeStructure):
    _fields_: ClassVar = native_fields("*label *rival *mass *gap *pull *kept with_gap")


class _Update(NativeStructure):
    _fields_: ClassVar = native_fields(
        "kind .learning_rate .weight_decay .momentum .beta .beta_square .epsilon .clip_norm "
        "nesterov step rounding seed first_class *moment *square *compensation moment_is_half"
    )


class _BackwardTask(NativeStructure):
    _fields_: ClassVar = native_fields(
        "*normaliser *factor *offset *label *kept *bias_gradient *gradient accumulate *update "
        "*filtered_classes *filtered_mass"
    )


@dataclass(frozen=True)
class NativeBackend:
    """`KernelBackend` on CPUs.

    Attributes:
        library: the compiled kernels.
        cache_bytes: of the cache that a thread's tile should stay in.
    """

    library: ctypes.CDLL
    cache_bytes: int

    @property
    def pulls(self) -> bool:
        """The forward sweep gives `pull`, which costs less than a second sweep over the weights."""
        return True

    def supports(self, operand_dtype: torch.dtype) -> str:
        """Why there are no products of this dtype here, in words; empty where there are.

        A small product is really computed: bfloat16 needs AMX or AVX-512.
        """
        if operand_dtype not in _DTYPES:
            return f"the CPU kernels know float32 and bfloat16 operands, not {operand_dtype}"
        trouble = native_call(self.library, "dist_dml_try_product", _DTYPES[operand_dtype])
        if trouble:
            return f"no products of {operand_dtype} on this processor: {trouble}"
        return ""

    def forward(
        self,
        rows: Float[Tensor, "R D"],
        columns: Int[Tensor, " R"],
        classes: KernelClasses,
        with_gap: bool,
        with_pull: bool,
        keep: bool,
    ) -> SoftmaxSums:
        """See `KernelBackend.forward`. `kept` takes 4 n R bytes, R rounded up to full vectors."""
        problem, alive = self._problem(rows, columns, classes)
        label, rival, mass, gap = torch.empty(4, len(rows)).unbind()
        pull = torch.empty(rows.shape) if with_pull else None
        kept = None
        if keep:
            self.library.dist_dml_kept_size.restype = ctypes.c_int64
            kept = torch.empty(self.library.dist_dml_kept_size(ctypes.byref(problem)))
        result = _ForwardResult(
            *(native_address(part) for part in (label, rival, mass, gap, pull, kept)), with_gap
        )
        self._call("dist_dml_forward", problem, result)
        del alive
        return SoftmaxSums(label, rival, mass, gap, pull, kept)

    def backward(
        self,
        rows: Float[Tensor, "N D"],
        columns: Int[Tensor, " N"],
        coefficients: RowCoefficients,
        classes: KernelClasses,
        num_pulled: int,
        kept: Tensor | None,
        target: GradientTarget | UpdateTarget | None,
    ) -> SweepReport:
        """See `KernelBackend.backward`."""
        assert num_pulled == 0, "the forward sweep has pulled"
        problem, alive = self._problem(rows, columns, classes)
        parts = [part.float().contiguous() for part in coefficients]
        wanted = classes.with_bias_gradient
        bias_gradient = torch.empty(classes.num_classes if wanted else 0)
        filtered, mass = ctypes.c_int64(0), ctypes.c_double(0.0)
        gradient = target.gradient if isinstance(target, GradientTarget) else None
        assert gradient is None or gradient.dtype == torch.float32
        accumulate = isinstance(target, GradientTarget) and target.accumulate
        update = None
        if isinstance(target, UpdateTarget) and bool(target.apply):
            update = _update_of(target, classes.weight)
        task = _BackwardTask(
            *(native_address(part) for part in parts),
            native_address(kept),
            native_address(bias_gradient) if wanted else None,
            native_address(gradient),
            accumulate,
            None if update is None else ctypes.addressof(update),
            ctypes.addressof(filtered),
            ctypes.addressof(mass),
        )
        self._call("dist_dml_backward", problem, task)
        del alive, parts
        return SweepReport(None, bias_gradient, filtered.value, mass.value)

    def _problem(
        self, rows: Tensor, columns: Tensor, classes: KernelClasses
    ) -> tuple[_Problem, list[Tensor]]:
        """The problem, and the tensors that it points into."""
        assert rows.dtype == torch.float32, f"the CPU kernels got rows of {rows.dtype}"
        assert columns.dtype == torch.int64, f"the CPU kernels got columns of {columns.dtype}"
        alive = [rows.detach().contiguous(), columns.contiguous(), classes.weight.detach()]
        problem = _Problem(
            rows=native_address(alive[0]),
            num_rows=rows.shape[0],
            num_features=rows.shape[1],
            columns=native_address(alive[1]),
            weight=native_address(alive[2]),
            bias=native_address(classes.bias),
            active=native_address(classes.active),
            num_classes=classes.num_classes,
            scale=classes.scale or 0.0,
            filter_below=classes.filter_below,
            weight_is_half=_DTYPES[classes.weight.dtype],
            operand=_SPLIT if classes.split_operands else _DTYPES[classes.operand_dtype],
            tile_classes=classes.tile_classes,
            row_chunk=classes.row_chunk,
            num_threads=torch.get_num_threads(),
            cache_bytes=self.cache_bytes,
        )
        return problem, alive

    def _call(self, name: str, problem: _Problem, argument: NativeStructure) -> None:
        if trouble := native_call(self.library, name, problem, argument):
            raise RunError(f"the CPU kernels failed in {name}: {trouble}")


def _update_of(target: UpdateTarget, weight: Tensor) -> _Update:
    step, state = target.step, target.state
    moment = state.get("momentum_buffer", state.get("exp_avg"))
    square = state.get("exp_avg_sq", state.get("sum"))
    compensation = state.get("compensation") if step.rounding == "kahan" else None
    assert (moment is None) == (step.kind == "adagrad" or (step.kind, step.momentum) == ("sgd", 0))
    assert (square is None) == (step.kind == "sgd")
    assert all(part is None or part.shape == weight.shape for part in (moment, compensation))
    return _Update(
        kind=_KINDS[step.kind],
        learning_rate=step.learning_rate,
        weight_decay=step.weight_decay,
        momentum=step.momentum,
        beta=step.betas[0],
        beta_square=step.betas[1],
        epsilon=step.epsilon,
        clip_norm=step.clip_norm,
        nesterov=step.nesterov,
        step=step.step,
        rounding=_ROUNDINGS[step.rounding],
        seed=step.seed & 0xFFFFFFFF,
        first_class=step.first_class,
        moment=native_address(moment),
        square=native_address(square),
        compensation=native_address(compensation),
        moment_is_half=moment is not None and _DTYPES[moment.dtype],
    )


def level_2_cache_bytes() -> int:
    """Of one core; 2 MiB where the machine does not say."""
    try:
        found = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (OSError, ValueError):
        found = 0
    return found if found > 0 else 2 * 2**20


def native_backend(cache_bytes: int = 0) -> NativeBackend | str:
    """The backend, compiled at first use (a few seconds), or in words why it cannot be had.

    Args:
        cache_bytes: of the cache that a tile should stay in; 0 takes a core's L2.
    """
    library = load_library()
    if isinstance(library, str):
        return library
    backend = NativeBackend(library, cache_bytes or level_2_cache_bytes())
    return backend.supports(torch.float32) or backend
