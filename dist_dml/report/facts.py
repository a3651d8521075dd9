"""What a score rests on: data, training, speed, machine, versions; from the run's own files."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import numpy as np
import psutil
import torch

from dist_dml.checkpoint_manifest import Manifest
from dist_dml.config import Config
from dist_dml.credentials import redact
from dist_dml.data.index import Index
from dist_dml.tracking.recorder import Curve
from dist_dml.tracking.run_files import IDENTITY, read_json

Facts = list[tuple[str, str]]
_LIBRARIES = (
    "dist_dml",
    "torch",
    "numpy",
    "faiss-cpu",
    "faiss-gpu",
    "timm",
    "scikit-learn",
    "matplotlib",
)


def data_facts(index: Index, config: Config, left_out: Mapping[str, int]) -> Facts:
    """Images and classes of each split, what no score counts, the fingerprint."""
    facts = [("data set", redact(str(config.data.path)))]
    source = index.metadata.get("source")
    if isinstance(source, dict) and "kind" in source:
        facts.append(("source", redact(str(source["kind"]))))
    for code, split in enumerate(index.split_names):
        rows = index.split == code
        rows[index.quarantined] = False
        classes = len(np.unique(index.class_id[rows]))
        out = f", {left_out[split]} damaged and left out" if left_out.get(split) else ""
        facts.append((f"split {split}", f"{rows.sum():,} images of {classes:,} classes{out}"))
    facts.append(("classes trained", f"{index.num_classes:,}"))
    if len(index.quarantined):
        facts.append(("in quarantine", f"{len(index.quarantined):,} images, in no split"))
    facts.append(("fingerprint", index.fingerprint))
    return facts


def run_facts(run: Path, config: Config, checkpoint: str, manifest: Manifest) -> Facts:
    """Which training made these weights."""
    identity, progress = read_json(run / IDENTITY), manifest.progress
    facts = [("run", config.run.name), ("checkpoint", checkpoint)]
    if isinstance(started := identity.get("started_at"), (int, float)):
        moment = datetime.datetime.fromtimestamp(started, datetime.UTC)
        facts.append(("begun", f"{moment:%Y-%m-%d %H:%M} UTC"))
    facts += [
        ("steps", f"{progress.step:,}"),
        ("images seen", f"{progress.images_seen:,}"),
        ("training time", _duration(progress.seconds)),
        ("loss", f"{config.loss.name}, {manifest.num_classes:,} classes"),
        ("backbone", config.model.backbone),
        ("engine", f"{config.engine.name}, {config.engine.precision}"),
        ("configuration", f"hash {manifest.config_hash}"),
        ("seed", str(config.run.seed)),
    ]
    if commit := identity.get("git_commit"):
        facts.append(("source code", f"commit {str(commit)[:40]}"))
    trained_on = manifest.plan.get("fingerprint")
    facts.append(("trained on data", str(trained_on)))
    return facts


def throughput_facts(metrics: Mapping[str, Curve]) -> Facts:
    """Medians over the training's records; empty without any."""
    facts = []
    for name, label, form in (
        ("train/images_per_second", "images/s, median", "{:,.0f}"),
        ("train/data_wait_share", "time waiting for data, median", "{:.1%}"),
        ("memory/peak_mebibytes", "peak memory of the training, MiB", "{:,.0f}"),
        ("evaluation/seconds", "seconds of an evaluation, median", "{:,.1f}"),
    ):
        curve = metrics.get(name)
        if curve is not None and len(values := curve.value[np.isfinite(curve.value)]):
            value = values.max() if name.startswith("memory") else np.median(values)
            facts.append((label, form.format(value)))
    return facts


def machine_facts() -> Facts:
    """The machine that evaluates now, and versions of what computed the scores."""
    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else 0
    memory = psutil.virtual_memory().total / 2**30
    facts = [
        ("processor", f"{_processor()}, {cores or psutil.cpu_count()} cores, {memory:.0f} GiB"),
        ("operating system", f"{platform.system()} {platform.machine()}"),
    ]
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts.append((f"GPU {number}", torch.cuda.get_device_name(number)))
    facts.append(("python", platform.python_version()))
    for library in _LIBRARIES:
        try:
            facts.append((library, metadata.version(library)))
        except metadata.PackageNotFoundError:
            continue
    return facts


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    line = next((line for line in text.splitlines() if line.startswith("model name")), "")
    return line.partition(":")[2].strip() or platform.processor() or platform.machine()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min ({seconds:,.0f} s)"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
