"""Start weights from a local file, read without executing anything in it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_dml.errors import UsageError

# First parts of the names of classifiers, which an embedder does not have.
_CLASSIFIERS = ("fc.", "classifier.", "head.", "head_dist.", "last_linear.")


def load_weights(module: nn.Module, path: str) -> None:
    """Load every parameter and buffer of `module` from `path` (safetensors, or .pth of tensors).

    Classifier layers in the file that `module` lacks are left out, a `state_dict` or `model` entry
    and a `module.` prefix are looked through, leading dimensions of size 1 are dropped (old ports
    of Caffe models store norms as (1, C)), and counters of batch norm may be missing.

    Raises:
        UsageError: in one line, if the file cannot be read, is not made of tensors only, or has
            other names or shapes than `module`.
    """
    wanted = module.state_dict()
    given = {
        name: tensor
        for name, tensor in _read(Path(path)).items()
        if name in wanted or not name.startswith(_CLASSIFIERS)
    }
    missing = [
        name for name in wanted if name not in given and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in given if name not in wanted]
    if missing or unexpected:
        raise UsageError(
            f"model.weights={path} does not fit the backbone: {_some('missing', missing)}; "
            f"{_some('unexpected', unexpected)}; give the file of this architecture, or change "
            "model.backbone"
        )
    fitted = {name: _fit(name, tensor, wanted[name], path) for name, tensor in given.items()}
    module.load_state_dict(fitted, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(f"model.weights={path} is no file; give a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(
            f"model.weights={path} holds Python objects, or is damaged; only tensors are read: "
            "save its state_dict() as .safetensors"
        ) from None
    except Exception as error:  # Each format has its own kinds of damage.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"model.weights={path} cannot be read ({reason}); give a .safetensors or .pth file"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UsageError(
            f"model.weights={path} is no table of names and tensors; save state_dict() there"
        )
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _some(kind: str, names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{kind} {', '.join(names[:3]) or 'nothing'}{rest}"


def _fit(name: str, given: Tensor, wanted: Tensor, path: str) -> Tensor:
    fitted = given
    while fitted.dim() > wanted.dim() and fitted.shape[0] == 1:
        fitted = fitted[0]
    if fitted.shape != wanted.shape:
        raise UsageError(
            f"model.weights={path} has {name} of shape {tuple(given.shape)}, the backbone of "
            f"{tuple(wanted.shape)}; check model.backbone, data.image.channels and data.image.size"
        )
    return fitted
