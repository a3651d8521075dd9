"""Images a second and core from shards to batches, beside WebDataset and torchvision, in one run.

On seeded synthetic photographs in a temporary folder:
  container   bytes of every sample: index, reads by offset and checksums, against WebDataset's
              plain pipeline (tars parsed and grouped, nothing decoded)
  end to end  256-pixel JPEGs to batches of 224-pixel crops, mirrored at random, as uint8 tensors;
              0, 1 and 2 loader processes
  large JPEGs 1024-pixel JPEGs to views, decoded reduced and decoded whole
  memory      of a loader process under an index of a million samples
  waiting     of a run (--run): the share of training time that it waited for data

    python tools/bench_loader.py                          about 4 minutes
    python tools/bench_loader.py --quick                  half a minute, figures without meaning
    python tools/bench_loader.py --run runs/demo --json loader.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import torch
from bench_head_measure import Spread, paired, report_progress
from bench_head_report import load_warning, machine, machine_line
from bench_loader_figures import Memory, loader_memory, waiting_share
from bench_loader_images import QUALITY, Images, jpeg, make_images
from bench_loader_measure import (
    Measured,
    compare_functions,
    compare_streams,
    large_image_functions,
)
from bench_loader_readers import (
    OURS,
    PREFETCH,
    SIZE,
    WEBDATASET,
    config_of,
    container_seconds_of_ours,
    container_seconds_of_webdataset,
    one_thread,
    torchvision_refusal,
)

# Asked for by what this project promises.
CONTAINER_SHARE, END_TO_END, WAITING = 1 / 3, 1.5, 0.05
LARGE_SIDE = 1024


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    images: int
    side: int
    batch_size: int
    batches: int
    processes: tuple[int, ...]
    repeats: int
    large: int
    index: int


FULL = Sizes(2000, 256, 64, 8, (0, 1, 2), 7, 40, 1_000_000)
QUICK = Sizes(160, 256, 16, 2, (0, 1), 2, 4, 100_000)


@dataclass
class Report:
    """What was found: text to print, rows to write."""

    texts: list[str]
    rows: list[dict[str, Any]]
    verdicts: list[str]
    where: dict[str, Any]

    def add_row(
        self, name: str, variant: str, config: dict[str, Any], seconds: Spread, **more: Any
    ) -> None:
        """One row as all benchmarks write it; seconds of processor time an image."""
        self.rows.append(
            {
                "name": name,
                "variant": variant,
                "config": config,
                "seconds_median": seconds.median,
                "seconds_spread": seconds.high - seconds.low,
                "extra_bytes": more.pop("extra_bytes", None),
                "error": None,
                **more,
                "machine": machine_line(self.where),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )

    def judge(self, claim: str, value: float, holds: bool) -> None:
        """One line that says whether what is asked for was reached."""
        self.verdicts.append(f"{'PASS' if holds else 'MISS'}  {claim}: {value:.3g}")
        self.rows.append({"name": "verdict", "variant": claim, "value": value, "holds": holds})


def container(report: Report, images: Images, sizes: Sizes) -> None:
    """(a) Bytes of every sample, without decoding: processor time in turns, one process."""
    times: dict[str, list[float]] = {"dist_dml": [], "webdataset": []}
    measure = {
        "dist_dml": lambda: container_seconds_of_ours(images.index, sizes.batch_size),
        "webdataset": lambda: container_seconds_of_webdataset(images),
    }
    for repetition in range(sizes.repeats + 1):
        names = list(measure) if repetition % 2 else list(measure)[::-1]
        for name in names:
            seconds = measure[name]()
            if repetition:  # The first round brings the shards into the page cache.
                times[name].append(seconds)
    lines = [
        f"### container: {images.count} samples of {images.bytes_each / 1e3:.1f} KB, bytes only",
        "",
        "| reader | CPU us a sample (quartiles) | samples/s per core |",
        "|---|---:|---:|",
    ]
    config = {"samples": images.count, "bytes_each": images.bytes_each}
    for name, values in times.items():
        lines.append(f"| {name} | {_micro(Spread.of(values))} | {_rate(values)} |")
        report.add_row("container", name, config, Spread.of(values))
    report.texts.append("\n".join(lines))
    share = paired(times["dist_dml"], times["webdataset"]).median
    claim = "container: CPU time over webdataset's, at most 1/3"
    report.judge(claim, share, share <= CONTAINER_SHARE)


def end_to_end(report: Report, images: Images, sizes: Sizes) -> None:
    """(b) From shards to batches of crops."""
    with one_thread():
        found = compare_streams(
            images, sizes.batch_size, sizes.batches, sizes.processes, sizes.repeats
        )
    lines = [
        f"### end to end: {images.side}-pixel JPEGs (quality {QUALITY}, "
        f"{images.bytes_each / 1e3:.1f} KB) to {sizes.batch_size} x 3 x {SIZE} x {SIZE} uint8",
        "",
        "| loader processes | reader | images/s (quartiles) | images/s per core | x webdataset "
        "| x per core | private MiB a process |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    ratios = []
    for (name, count), measured in found.items():
        base = found[WEBDATASET, count]
        faster = paired(base.wall, measured.wall).median
        by_core = paired(base.cpu, measured.cpu).median
        wall, memory = Spread.of(measured.wall), measured.process_bytes
        cells = [
            str(count),
            name,
            f"{1 / wall.median:,.0f} ({1 / wall.high:,.0f} to {1 / wall.low:,.0f})",
            _rate(measured.cpu),
            f"{faster:.2f}",
            f"{by_core:.2f}",
            "-" if memory is None else f"{memory / 2**20:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        config = {
            "loader_processes": count,
            "batch_size": sizes.batch_size,
            "prefetch": PREFETCH,
            "repeats": sizes.repeats,
        }
        report.add_row(
            "end to end",
            name,
            config,
            Spread.of(measured.cpu),
            extra_bytes=memory,
            images_per_second=1 / wall.median,
            times_webdataset=faster,
            times_webdataset_per_core=by_core,
        )
        ratios += [faster] if name == OURS else []
    refusal = torchvision_refusal()
    lines += [f"\ntorchvision ImageFolder: not measured: {refusal}"] if refusal else []
    report.texts.append("\n".join(lines))
    claim = "end to end: rate over webdataset with PIL, lowest of all loader processes, at least"
    report.judge(f"{claim} {END_TO_END:g}", min(ratios), min(ratios) >= END_TO_END)


def large(report: Report, sizes: Sizes) -> None:
    """(c) Views of large JPEGs with reduced decoding and without."""
    data = [jpeg(number, LARGE_SIDE) for number in range(min(sizes.large, 16))]
    config = config_of(1, 0)
    functions = large_image_functions(data, config.image, config.augment)
    found = compare_functions(functions, sizes.large, sizes.repeats)
    side = f"{LARGE_SIDE}-pixel JPEGs of {len(data[0]) / 1e3:.0f} KB to {SIZE} x {SIZE}"
    lines = [
        f"### large JPEGs: {side}, one process",
        "",
        "| what | CPU us an image (quartiles) | images/s per core | x decoded whole |",
        "|---|---:|---:|---:|",
    ]
    for name, measured in found.items():
        whole: Measured = found[name if "whole" in name else f"{name}, decoded whole"]
        faster = paired(whole.cpu, measured.cpu).median
        spread = Spread.of(measured.cpu)
        lines.append(f"| {name} | {_micro(spread)} | {_rate(measured.cpu)} | {faster:.2f} |")
        report.add_row("large JPEGs", name, {"side": LARGE_SIDE}, spread, times_whole=faster)
    report.texts.append("\n".join(lines))


def memory(report: Report, images: Images, sizes: Sizes) -> None:
    """Of one loader process, under a long index."""
    with one_thread():
        found: Memory = loader_memory(images.index, sizes.index, sizes.batch_size)
    mebibyte = 2**20
    report.texts.append(
        f"### memory: one loader process, {found.samples:,} samples in the index\n\n"
        f"private {found.private / mebibyte:.0f} MiB, resident {found.resident / mebibyte:.0f} "
        f"MiB; a batch has {found.batch / mebibyte:.1f} MiB, {PREFETCH} wait in shared memory. It "
        "holds no index: paths of shards, one image being decoded, one batch being made."
    )
    config = {"samples": found.samples, "batch_bytes": found.batch, "prefetch": PREFETCH}
    zero = Spread(0.0, 0.0, 0.0)
    report.add_row("memory", "loader process", config, zero, extra_bytes=found.private)


def waiting(report: Report, folder: Path) -> None:
    """(d) What a run recorded."""
    share, later = waiting_share(folder)
    report.texts.append(
        f"### waiting for data: {share:.1%} of the training time of the run, {later:.1%} after its "
        "first record"
    )
    claim = "share of training time that the run waited for data, below 0.05"
    report.judge(claim, share, share < WAITING)


def _micro(spread: Spread) -> str:
    low, median, high = (value * 1e6 for value in (spread.low, spread.median, spread.high))
    return f"{median:,.1f} ({low:,.1f} to {high:,.1f})"


def _rate(seconds: Sequence[float]) -> str:
    return f"{1 / Spread.of(seconds).median:,.0f}"


def run(sizes: Sizes, folder: Path | None) -> Report:
    """Measure everything. Shows what is under way on stderr."""
    where = machine(torch.device("cpu"))
    report = Report([], [], [], where)
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as temporary:
        report_progress(f"drawing {sizes.images} photographs")
        images = make_images(Path(temporary), sizes.images, sizes.side, seed=0)
        report_progress("container")
        container(report, images, sizes)
        report_progress("end to end")
        end_to_end(report, images, sizes)
        report_progress("large JPEGs")
        large(report, sizes)
        report_progress("memory")
        memory(report, images, sizes)
    if folder is not None:
        waiting(report, folder)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few images: a test of the tool")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a run of dist-dml train")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    arguments = parser.parse_args(argv)
    if arguments.run is not None and not (arguments.run / "metrics.jsonl").is_file():
        parser.error(f"--run={arguments.run} has no metrics.jsonl; name the folder of a run")
    cv2.setNumThreads(0)
    report = run(QUICK if arguments.quick else FULL, arguments.run)
    print(f"{machine_line(report.where)}\n")
    warning = load_warning(report.where)
    print("\n\n".join([*([warning] if warning else []), *report.texts]))
    print("\n" + "\n".join(report.verdicts))
    if arguments.json:
        arguments.json.write_text(json.dumps(report.rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
