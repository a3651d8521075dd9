"""Embeddings of image files from an exported ONNX model; needs numpy, onnxruntime and OpenCV only.

    python embed_images.py a.jpg b.png --out embeddings.npy

`dist-dml export` puts this file beside the model. It prepares images as the evaluation of the
training program does: cut, resized by area averaging where they shrink, bilinear where they grow.
Bytes of a JPEG whose cut is at least twice, four or eight times as large as the model's input are
decoded at a half, a quarter or an eighth, as there.

Dimensions: n images, H, W pixels of a file, S of the model's input, C channels, D features.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

_LEAST_SIDE_TO_REDUCE = 128
_REDUCED = {
    1: {
        8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
        4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
        2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    },
    3: {
        8: cv2.IMREAD_REDUCED_COLOR_8,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        2: cv2.IMREAD_REDUCED_COLOR_2,
    },
}
"""OpenCV's flags by channels and reduction."""


def prepare(data: bytes, preprocessing: dict[str, Any]) -> np.ndarray:
    """The pixels (S, S, C) uint8 that the model takes, of an encoded JPEG, PNG or WebP.

    Args:
        data: the file's bytes.
        preprocessing: the content of `preprocessing.json`.

    Raises:
        ValueError: it is no such image.
    """
    size, resize = preprocessing["size"], preprocessing["resize"]
    image = _decode(data, preprocessing["channels"], None)
    height, width = image.shape[:2]
    box = _centre_box(height, width, size, resize)
    reduction = 1
    if data[:2] == b"\xff\xd8" and min(height, width) >= _LEAST_SIDE_TO_REDUCE:
        reduction = next((by for by in (8, 4, 2) if min(box[2:]) >= by * size), 1)
    if reduction > 1:
        image = _decode(data, preprocessing["channels"], reduction)
    return _cut(image, [side / reduction for side in box], size)


def _decode(data: bytes, channels: int, reduction: int | None) -> np.ndarray:
    """Grey (H, W) or RGB (H, W, 3), without the rotation that a camera may have noted."""
    flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    if reduction is not None:
        flag = _REDUCED[channels][reduction]
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise ValueError("it is not a JPEG, PNG or WebP image, or is damaged")
    return image if channels == 1 else np.ascontiguousarray(image[:, :, ::-1])


def _centre_box(height: int, width: int, size: int, resize: int) -> list[float]:
    """Left, top, width and height: size / resize of the short side, or everything."""
    if not resize:
        return [0.0, 0.0, float(width), float(height)]
    side = min(height, width) * size / resize
    return [(width - side) / 2, (height - side) / 2, side, side]


def _cut(image: np.ndarray, box: list[float], size: int) -> np.ndarray:
    height, width = image.shape[:2]
    w, h = min(max(round(box[2]), 1), width), min(max(round(box[3]), 1), height)
    left = min(max(round(box[0]), 0), width - w)
    top = min(max(round(box[1]), 0), height - h)
    part = image[top : top + h, left : left + w]
    if (h, w) != (size, size):
        shrinks = h >= size and w >= size
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        part = cv2.resize(part, (size, size), interpolation=method)
    return np.ascontiguousarray(part).reshape(size, size, -1)


def embed_files(model: Path, paths: list[Path], batch_size: int = 64) -> np.ndarray:
    """Embeddings (n, D) float32 of image files, in their order.

    Args:
        model: `model.onnx`, with `preprocessing.json` beside it.
        paths: JPEG, PNG or WebP files.
        batch_size: images at a time; any number gives the same embeddings.

    Raises:
        ValueError: a file is no image; names it.
    """
    import onnxruntime

    preprocessing = json.loads((model.parent / "preprocessing.json").read_text("utf-8"))
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    parts = []
    for start in range(0, len(paths), batch_size):
        images = []
        for path in paths[start : start + batch_size]:
            try:
                images.append(prepare(path.read_bytes(), preprocessing))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        parts.append(session.run(["embeddings"], {"images": np.stack(images)})[0])
    return np.concatenate(parts)


def main() -> None:
    """Embed the files named on the command line and write one array."""
    parser = argparse.ArgumentParser(description="embeddings of image files")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--model", type=Path, default=Path(__file__).with_name("model.onnx"))
    parser.add_argument("--out", type=Path, default=Path("embeddings.npy"))
    arguments = parser.parse_args()
    embeddings = embed_files(arguments.model, arguments.images)
    np.save(arguments.out, embeddings)
    print(f"{arguments.out}: {embeddings.shape[0]} embeddings of {embeddings.shape[1]} features")


if __name__ == "__main__":
    main()
