"""`dist-dml COMMAND`. Imports only the command that it runs."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from dist_dml.command_line import run_command
from dist_dml.data.pack_command import PackCommand

# Command -> module with `add_arguments(parser)` and `run(arguments) -> int`, and one line of help.
COMMANDS = {
    "train": ("dist_dml.train", "train an embedding (also under deepspeed, torchrun, srun)"),
    "tune": ("dist_dml.tune", "search configurations: Ray Tune, Optuna, the best confirmed"),
    "evaluate": ("dist_dml.evaluate", "score a run's checkpoint and write its report"),
    "embed": ("dist_dml.embed", "embeddings of any shards as Parquet, in parallel, resumable"),
    "protocol": ("dist_dml.protocol", "train and test class-disjoint folds, and write one table"),
    "compare": ("dist_dml.comparison", "methods against each other, each with the same trials"),
    "reference": ("dist_dml.reference_command", "published results of papers A, B and C"),
    "estimate": ("dist_dml.estimate", "memory and time of a run on machines that you name"),
    "config": ("dist_dml.config_command", "show, diff or describe configurations"),
    "doctor": ("dist_dml.doctor.command", "what would stop or slow a training here, and remedies"),
    "export": ("dist_dml.export", "safetensors, torch.export and ONNX, checked; MLflow, hub"),
    "classes carry": ("dist_dml.class_carry", "go on with other classes: new, dropped, merged"),
    "classes export": ("dist_dml.class_export", "class weights to Parquet or safetensors"),
    "classes import": ("dist_dml.class_import", "class weights from files, Partial FC's too"),
    "search build": ("dist_dml.search.build_command", "index a gallery; recall is measured"),
    "search query": ("dist_dml.search.query_command", "the nearest items to images"),
    "search serve": ("dist_dml.search.serve_command", "a page on which one drops an image"),
    "pack glyphs": ("dist_dml.data.pack.glyphs", "draw characters of the installed typefaces"),
    "pack folder": ("dist_dml.data.pack.folder", "pack a class_name/image.jpg tree"),
    "pack cifar": ("dist_dml.data.pack.cifar", "pack CIFAR-10 or CIFAR-100's binary archive"),
    "pack cub": ("dist_dml.data.pack.cub", "pack CUB-200-2011"),
    "pack cars": ("dist_dml.data.pack.cars", "pack Cars196 in any of its layouts"),
    "pack products": ("dist_dml.data.pack.online_products", "pack Stanford Online Products"),
    "pack inshop": ("dist_dml.data.pack.inshop", "pack In-Shop: train, query, gallery"),
    "pack inaturalist": ("dist_dml.data.pack.inaturalist", "pack iNaturalist 2018"),
    "pack landmarks": ("dist_dml.data.pack.landmarks", "pack Google Landmarks v2"),
    "pack recordio": ("dist_dml.data.pack.recordio", "pack MXNet RecordIO (MS1M, WebFace)"),
    "pack manifest": ("dist_dml.data.pack.manifest", "pack what a CSV or Parquet file lists"),
    "pack hub": ("dist_dml.data.pack.hub", "pack a Hugging Face datasets image set"),
    "pack synthetic": ("dist_dml.data.pack.synthetic", "draw up to millions of seeded classes"),
    "pack digits": ("dist_dml.data.pack.digits", "pack scikit-learn's digits"),
    "index": ("dist_dml.data.index_command", "index anybody's WebDataset tars, local or remote"),
    "verify": ("dist_dml.data.verify", "decode every image; --fix leaves damaged ones out"),
    "leaks": ("dist_dml.data.leaks", "find images shared by splits, and label conflicts"),
    "track": ("dist_dml.tracking.track_command", "runs into MLflow (sync) or tables (export)"),
    "ui": ("dist_dml.tracking.ui_command", "open the MLflow UI on this machine"),
}
GROUPS = ("pack", "classes", "search")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake ends in one line and exit code 2."""
    try:
        exit_code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # A reader that is gone is noticed here, not at the interpreter's end.
        return exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has had enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(arguments: list[str]) -> int:
    name = " ".join(arguments[:2]) if arguments[:1] and arguments[0] in GROUPS else ""
    name = name if name in COMMANDS else (arguments[0] if arguments else "")
    if name not in COMMANDS:
        return _print_help(arguments)
    module = importlib.import_module(COMMANDS[name][0])
    command = PackCommand(module) if name.startswith("pack ") else module
    return run_command(f"dist-dml {name}", command, arguments[len(name.split()) :])


def _print_help(arguments: list[str]) -> int:
    """All commands, or those of a group; exit code 2 unless help was asked for."""
    group = arguments[0] if arguments and arguments[0] in GROUPS else ""
    shown = [name for name in COMMANDS if name.startswith(group)]
    asked = any(text in ("-h", "--help") for text in arguments)
    stream = sys.stdout if asked else sys.stderr
    if arguments and not asked and not group:
        near = difflib.get_close_matches(arguments[0], [*COMMANDS, *GROUPS], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"dist-dml: unknown command {arguments[0]!r}{hint}", file=stream)
    print(f"usage: dist-dml {group or 'COMMAND'} ...   (each command has --help)\n", file=stream)
    for name in shown:
        print(f"  {name:<16} {COMMANDS[name][1]}", file=stream)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
