"""Before any test is collected."""

from __future__ import annotations

import contextlib
import os

import torch

if not torch.cuda.is_available():
    # Without a GPU the kernels' tests run in Triton's interpreter. Triton asks the environment when
    # it is first imported, which timm or another library would do earlier than those tests.
    # Processes that tests start must not see the variable.
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401
    del os.environ["TRITON_INTERPRET"]
