"""The factor of the learning rate at each step: warm-up, then constant, cosine or steps down."""

from __future__ import annotations

import math

from dist_dml.config import ScheduleConfig


def learning_rate_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """The factor for the update that follows `step` finished ones, in (0, 1].

    The smaller of the warm-up (step + 1) / warmup_steps and the schedule, as in paper B's code:
    min((i + 1) / 100, (1 + cos(pi * i / total)) / 2) is `cosine` with 100 warm-up steps.

    Args:
        step: steps already done, from 0.
        total_steps: steps of the whole training.
    """
    done = step / total_steps
    if config.name == "cosine":
        final = config.final_factor
        factor = final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
    elif config.name == "step":
        factor = config.decay ** sum(done >= milestone for milestone in config.milestones)
    else:
        factor = 1.0
    if config.warmup_steps > 0:
        factor = min(factor, (step + 1) / config.warmup_steps)
    return factor
