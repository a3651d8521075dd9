"""`engine.deterministic`: what PyTorch and its libraries need to give equal bits twice.

See docs/determinism.md for what is equal without it, and between layouts.
"""

from __future__ import annotations

import os

import torch


def make_deterministic() -> None:
    """Have every operation add up in one order, or refuse; before the first use of a device.

    On CPUs nothing changes: all orders of sums there are fixed by the layout already. On GPUs cuDNN
    chooses among its deterministic algorithms alone and without trying them out, cuBLAS gets
    workspaces of its own for each stream, and scatters and interpolations take their slower forms.
    """
    # Read by cuBLAS when it starts; a value that the user has set is kept.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)
