"""The factor of the learning rate at each step: warm-up, then constant, cosine or steps down."""

from __future__ import annotations

import math

from dist_dml.config import ScheduleConfig

# The step in which time runs out still has a rate.
_LAST_SHARE = 0.999


def learning_rate_factor(
    step: int, total_steps: int, config: ScheduleConfig, time_share: float = 0.0
) -> float:
    """The factor for the update that follows `step` finished ones, in (0, 1].

    The smaller of the warm-up (step + 1) / warmup_steps and the schedule, as in paper B's code:
    min((i + 1) / 100, (1 + cos(pi * i / total)) / 2) is `cosine` with 100 warm-up steps.

    Args:
        step: steps already done, from 0.
        total_steps: steps of the whole training.
        config: warm-up, which counts steps, and schedule, which follows the share that is done.
        time_share: what is spent of `training.max_seconds`, 0..1: it counts where it is more than
            that of steps.
    """
    done = max(step / total_steps, min(time_share, _LAST_SHARE))
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
