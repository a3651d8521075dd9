"""Safetensors, `torch.export` and ONNX: each written to a file, and read back as a user would.

Dimensions: n images, S = `data.image.size`, C channels, D features of an embedding.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from torch.export import Dim, ExportedProgram

from dist_dml.errors import RunError, UsageError
from dist_dml.models.export_module import ImageEmbedder, rebuild

FILES = {"safetensors": "model.safetensors", "pt2": "model.pt2", "onnx": "model.onnx"}
"""The file of each format."""

Run = Callable[[np.ndarray], np.ndarray]
"""Pixels (n, S, S, C) uint8 to embeddings (n, D) float32."""

_MOST_PROTOBUF = 1_800_000_000
"""Bytes of weights in the ONNX file itself; a protobuf ends at 2 GiB, larger ones lie beside it."""


def check_packages(formats: tuple[str, ...]) -> None:
    """Refuse, before any work, formats whose packages are absent.

    Raises:
        UsageError: names the package and how to install it.
    """
    if "onnx" not in formats:
        return
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--formats onnx needs {error.name}, which is not installed; run "
            "`pip install 'dist_dml[export]'`, or leave onnx out of --formats"
        ) from None


def write_formats(
    module: ImageEmbedder,
    config: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    example: UInt8[Tensor, "n S S C"],
    formats: tuple[str, ...],
    folder: Path,
) -> None:
    """Write `config.json` and the file of each format into a folder.

    Nothing in them names a path of this machine: the exporters note the source line of every node,
    which is taken out.

    Args:
        module: what is exported.
        config: see `export_module.export_config`.
        preprocessing: see `export_module.preprocessing_of`; also stored within the ONNX file.
        example: two or more images; torch takes a dimension of 1 for a constant.
        formats: keys of `FILES`.
        folder: exists.

    Raises:
        RunError: the network holds something that a format cannot say; names the format.
    """
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    if "safetensors" in formats:
        from safetensors.torch import save

        tensors = {k: v.contiguous() for k, v in module.embedder.state_dict().items()}
        data = save(tensors, metadata={"format": "pt"})
        # Not its own `save_file`, which lets nobody but the writer read the file.
        (folder / FILES["safetensors"]).write_bytes(data)
    if {"pt2", "onnx"} & set(formats):
        with _refusing("torch.export"):
            program = _program(module, example)
        if "pt2" in formats:
            with _refusing("pt2"):
                torch.export.save(program, folder / FILES["pt2"])
        if "onnx" in formats:
            with _refusing("onnx"):
                _write_onnx(program, example, preprocessing, folder / FILES["onnx"])


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """The exporters' many kinds of error as one line; their deprecation warnings left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except OSError:  # Of the disk.
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"this network cannot be written as {what} ({type(error).__name__}: {reason:.200}); "
            "leave that format out of --formats"
        ) from error


def _program(module: ImageEmbedder, example: Tensor) -> ExportedProgram:
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=({0: Dim("n")},))
    for graph_module in program.graph_module.modules():
        for node in graph_module.graph.nodes:  # pyright: ignore
            node.meta.pop("stack_trace", None)
    return program


def _write_onnx(
    program: ExportedProgram, example: Tensor, preprocessing: Mapping[str, Any], path: Path
) -> None:
    import onnx

    written = torch.onnx.export(
        program,
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=["embeddings"],
        verbose=False,
    )
    assert written is not None
    symbol = str(written.model.graph.inputs[0].shape[0].value)  # pyright: ignore
    for graph in written.model.graphs():
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            node.metadata_props.clear()
            values += node.outputs
        for value in values:
            value.metadata_props.clear()
            for i, dim in enumerate(value.shape or ()):
                if not isinstance(dim, int) and dim.value is not None:
                    assert value.shape is not None
                    value.shape[i] = re.sub(rf"\b{symbol}\b", "n", dim.value)
    written.model.metadata_props["preprocessing"] = json.dumps(preprocessing)
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    written.save(path, external_data=size > _MOST_PROTOBUF)
    onnx.checker.check_model(path)


def read_format(folder: Path, name: str) -> Run:
    """An exported file as a function, read by what its users read it with.

    Args:
        folder: of the export.
        name: a key of `FILES`.
    """
    path = folder / FILES[name]
    if name == "onnx":
        return onnx_session(path)
    if name == "pt2":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.export.load(path).module()
    else:
        from safetensors.torch import load_file

        module = rebuild(json.loads((folder / "config.json").read_text("utf-8")), load_file(path))

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(images)).numpy()

    return run


def onnx_session(path: Path) -> Run:
    """An ONNX file in onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Its own threads would come on top of torch's.
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: UInt8[np.ndarray, "n S S C"]) -> Float32[np.ndarray, "n D"]:
        return np.asarray(session.run(["embeddings"], {"images": images})[0])

    return run


def read_onnx(path: Path) -> Any:
    """The ONNX model as a protobuf, for libraries that take that."""
    import onnx

    return onnx.load(str(path))
