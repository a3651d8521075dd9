"""A small search over the digits, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_dml.data.pack.digits import pack_digits

SPACE: dict[str, Any] = {
    "optimizer.learning_rate": {"log_uniform": [1e-4, 1e-2]},
}
CONFIG: dict[str, Any] = {
    "run": {"name": "study"},
    "data": {
        "batch_size": 64,
        "loader_processes": 0,
        "image": {"size": 8, "channels": 1, "resize": 0, "mean": [0.5], "std": [0.25]},
    },
    "model": {"backbone": "small_conv", "norm": "batch"},
    "training": {"epochs": 2},
    "checkpoint": {"best_metric": "seen/cosine/map_at_r", "keep_last": 1},
    "evaluation": {
        "every_epochs": 1,
        "nmi": False,
        "distances": ["cosine"],
        "protocols": [
            {"name": "seen", "query": "seen", "gallery": "train"},
            {"name": "back", "query": "train", "gallery": "seen"},
        ],
    },
    "tracking": {"mlflow": False},
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    pack_digits(out)
    return out


def files(folder: Path, digits: Path, search: dict[str, Any]) -> list[str]:
    (folder / "search.yaml").write_text(yaml.safe_dump({"space": SPACE} | search))
    config = CONFIG | {"run": {"name": "study", "root": str(folder / "runs")}}
    config["data"] = CONFIG["data"] | {"path": str(digits)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return ["--search", str(folder / "search.yaml"), "--config", str(folder / "config.yaml")]
