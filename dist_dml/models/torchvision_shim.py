"""Make torchvision importable beside a torch that was built without CUDA."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

# A Library takes its operators along when it is collected.
_kept_alive: list[torch.library.Library] = []


def ensure_torchvision_imports() -> None:
    """Call before the first import of torchvision, hence of timm; calling it again does nothing.

    PyPI's torchvision is linked against CUDA. Beside a CPU build of torch its compiled part does
    not load, and `import torchvision` ends in `RuntimeError: operator torchvision::nms does not
    exist`, which no `except ImportError` catches. Where the compiled part loads, this changes
    nothing; where it does not, the two operators that torchvision asks for at import are declared
    without a body.
    """
    specification = importlib.util.find_spec("torchvision")
    if "torchvision" in sys.modules or specification is None or _kept_alive:
        return  # Absent: the importer's own ModuleNotFoundError says what to install.
    assert specification.submodule_search_locations is not None
    try:
        torch.ops.load_library(str(Path(specification.submodule_search_locations[0]) / "_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_alive.append(library)
