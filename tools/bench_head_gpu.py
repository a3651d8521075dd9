"""The GPU rows of `bench_head`: shares of the floor, Partial FC, and whether the largest heads fit.

Without a GPU every row says that it was not measured.

Dimensions: R rows, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from bench_head_compare import Comparison, compare, dtype_of, measure_errors, measure_memory
from bench_head_measure import Spread, report_progress, step_of
from bench_head_peers import PEERS, PUBLISHED, SAMPLED
from bench_head_variants import DEFAULTS, Size, Variant, batch, project_head, project_variants
from bench_head_verdicts import Verdict, inverse

LARGE, NARROW = Size(10_000_000, 512, 1024), Size(10_000_000, 128, 1024)
MEDIUM = Size(1_000_000, 512, 1024)
SIZES = (MEDIUM, LARGE, NARROW)
LARGEST = (Size(30_000_000, 512, 1024), Size(100_000_000, 128, 1024))
TRAINING_STEPS = 20
# So that twenty steps on one batch are enough to see the loss fall.
_TRAINING_RATE = 1.0
ABSENT = "no GPU at hand"


@dataclass(frozen=True)
class Training:
    """A head that was trained for some steps.

    Attributes:
        first: loss of the first step.
        last: loss of the last step.
        peak_bytes: most memory allocated, weights and state included; 0 on a CPU.
        problem: why it could not be trained, or nothing.
    """

    size: Size
    first: float
    last: float
    peak_bytes: int
    problem: str = ""

    @property
    def falls(self) -> bool:
        """Whether it fits and the loss falls."""
        return not self.problem and self.last < self.first


def train(variant: Variant, size: Size, device: torch.device, steps: int) -> Training:
    """Real steps on one batch: loss, gradients, update with momentum."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        head = project_head(variant, size, device, _TRAINING_RATE)
        rows, labels = batch(size, device)
        step = step_of(head, rows, labels)
        losses = torch.stack([step() for _ in range(steps)]).tolist()
    except torch.OutOfMemoryError:
        return Training(size, 0.0, 0.0, 0, "out of memory")
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Training(size, losses[0], losses[-1], peak)


def gpu_names(size: Size, device: torch.device) -> list[str]:
    """All variants for the smallest size; for larger ones Partial FC and cross-entropy in bf16."""
    found = project_variants(device)
    if size == MEDIUM:
        return [*PEERS, *found]
    # Cosines draw their starting weights on the CPU, which takes minutes for 10^7 x 512.
    large = (v for v in found.values() if (v.operand, v.loss) == ("bfloat16", "cross_entropy"))
    return [PUBLISHED, SAMPLED, *(variant.name for variant in large)]


def measure_gpu(
    device: torch.device, repeats: int, sizes: Sequence[Size] = SIZES
) -> list[Comparison]:
    """The comparisons that the rows need."""
    found = []
    for size in sizes:
        report_progress(f"GPU, {size}")
        comparison = compare(gpu_names(size, device), size, device, repeats)
        torch.cuda.empty_cache()
        measure_memory(comparison, together=True)
        measure_errors(comparison)
        found.append(comparison)
    return found


def train_largest(device: torch.device, sizes: Sequence[Size] = LARGEST) -> list[Training]:
    """Whether the largest heads fit and learn, with the backend that is meant for a GPU."""
    variant = replace(DEFAULTS["bfloat16"], backend="triton" if device.type == "cuda" else "auto")
    found = []
    for size in sizes:
        found.append(train(variant, size, device, TRAINING_STEPS))
        report_progress(f"  {size}: {found[-1]}")
    return found


def best(comparison: Comparison) -> str | None:
    """The project's fastest exact variant with bf16 operands."""
    names = [
        name
        for name in comparison.times
        if name not in PEERS and dtype_of(name) == "bfloat16" and "cosface" not in name
    ]
    return min(names, key=lambda name: comparison.seconds(name).median, default=None)


def gemm_bound_share(comparison: Comparison, name: str) -> Spread:
    """Share of a step that 8RCD operations at the measured GEMM rate would take."""
    size = comparison.size
    operations = 8.0 * size.rows * size.num_classes * size.embedding_dim
    pairs = zip(comparison.rates[dtype_of(name)], comparison.times[name], strict=True)
    return Spread.of(operations * a / b for a, b in pairs if a is not None and b is not None)


def gpu_verdicts(comparisons: Sequence[Comparison], trainings: Sequence[Training]) -> list[Verdict]:
    """The GPU rows of the table of goals."""
    by_size = {comparison.size: comparison for comparison in comparisons}
    found = []
    for size, asked in ((LARGE, 0.7), (NARROW, 0.5)):
        comparison = by_size.get(size)
        name = None if comparison is None else best(comparison)
        reached = gemm_bound_share(comparison, name) if comparison and name else None
        found.append(
            Verdict(
                f"{name or 'dist_dml, bf16'}, share of the floor",
                f"GPU, {size}",
                "8RCD at the measured GEMM rate",
                asked,
                "x",
                True,
                reached,
                note="" if reached else ABSENT,
            )
        )
    by_training = {training.size: training for training in trainings}
    for size in LARGEST:
        training = by_training.get(size)
        reached, note = None, ABSENT
        if training is not None and training.problem:
            note = training.problem
        elif training is not None:
            ratio = training.last / training.first
            reached = Spread(ratio, ratio, ratio)
            note = f"{training.peak_bytes / 2**30:.0f} GiB at the peak"
        what = "fits and learns: last loss over first"
        where = f"GPU, {size}, exact, momentum"
        found.append(Verdict(what, where, "itself", 0.999, "x", False, reached, note=note))
    for size in (MEDIUM, LARGE):
        for other, asked in ((PUBLISHED, 4.0), (SAMPLED, 1.2)):
            found.append(_against(by_size.get(size), size, other, asked))
    return found


def _against(comparison: Comparison | None, size: Size, other: str, asked: float) -> Verdict:
    name = None if comparison is None else best(comparison)
    reached, note = None, ABSENT
    if comparison is not None and name is not None:
        note = comparison.refused.get(other, "")
        if other in comparison.times:
            reached = inverse(comparison.over(name, other))
    what = f"{name or 'dist_dml, bf16'} faster"
    return Verdict(what, f"GPU, {size}", other, asked, "x", True, reached, note=note)
