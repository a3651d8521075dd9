"""Who may import what, read from the source: levels, owners of heavy libraries, process groups."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module's level is that of its longest prefix here. It imports its level or below. A module that
# only commands may import stands on their level, however little it imports itself.
LEVELS = {
    **dict.fromkeys(("train", "tune", "evaluate", "cli"), 4),
    **dict.fromkeys(
        (
            "entry",
            "agreement",
            "damage_report",
            "journal",
            "not_finite",
            "recovery",
            "resuming",
            "saving",
            "training_evaluation",
            "training_run",
            "class_beginnings",
            "class_carry",
            "class_export",
            "export",
            "export_card",
            "class_import",
            "class_mapping",
            "training_head",
            "proxy_pool",
            "training_diagnosis",
            "reference_command",
            "protocol",
            "protocol_folds",
            "protocol_guard",
            "protocol_jobs",
            "protocol_measure",
            "protocol_scores",
            "protocol_launch",
            "protocol_table",
            "comparison",
            "comparison_picture",
            "comparison_plan",
            "comparison_table",
            "measurement",
            "tuning",
            "split_embedding",
            "split_vectors",
            "embed",
            "embedding_parts",
            "evaluate_embeddings",
            "file_scores",
            "config_command",
            "command_line",
            "resources",
            "search",
            "report",
            "estimate",
            "estimate_embedder",
            "estimate_head",
            "estimate_tables",
            "estimate_validate",
            "doctor",
        ),
        4,
    ),
    **dict.fromkeys(
        (
            "engine",
            "engine_deepspeed",
            "batch_ledger",
            "checkpoint",
            "checkpoint_manifest",
            "checkpoint_writer",
            "run_lock",
            "skipped_batches",
            "stop_request",
            "class_store",
            "retrieval",
            "tracking",
            "ccp_phases",
            "parallel.classifier",
            "parallel.proxy_head",
            "parallel.participants",
        ),
        3,
    ),
    **dict.fromkeys(("models", "data"), 2),
    **dict.fromkeys(
        (
            "parallel.backends",
            "parallel.class_kernels",
            "parallel.class_optim",
            "parallel.class_parallel",
            "parallel.class_problem",
            "parallel.class_scores",
            "parallel.sampling",
            "parallel.torch_sweeps",
        ),
        2,
    ),
    **dict.fromkeys(("losses", "parallel"), 1),
    **dict.fromkeys(("config", "config_loading", "errors", "keyed_random", "schedule"), 0),
    **dict.fromkeys(
        (
            "listening",
            "whole_files",
            "restarts",
            "strict_json",
            "plain_yaml",
            "process_pool",
            "control_groups",
            "usable",
            "class_config",
            "config_types",
            "credentials",
            "data_config",
            "evaluation_config",
            "loss_config",
            "proxy_config",
            "loss_tables",
            "reference_tables",
            "metric_parameters",
        ),
        0,
    ),
    "": 0,  # The package itself, which holds the version.
}
# Heavy libraries and the one part of the package that imports them, inside functions. Matplotlib
# may be imported anywhere, inside functions as well.
OWNERS = {
    "deepspeed": "engine_deepspeed",
    "ray": "tuning",
    "optuna": "tuning",
    "mlflow": "tracking",
    "onnx": "models",
    "onnxruntime": "models",
    "onnxscript": "models",
    "huggingface_hub": "models",
    "faiss": "retrieval",
    "webdataset": "data",
    "timm": "models",
    "starlette": "search",
    "uvicorn": "search",
    "matplotlib": "",
}
# Entries hand ranks and groups on; all others get a group as an argument.
PROCESS_GROUP_USERS = (
    "parallel",
    "engine",
    "engine_deepspeed",
    "checkpoint",
    "train",
    "tune",
    "evaluate",
    "entry",
    "doctor.links",
    "doctor.meeting",
)


@dataclass(frozen=True)
class Import:
    """One imported name: its full dotted path, its line, and where the statement stands."""

    target: str
    line: int
    in_function: bool
    for_types_only: bool


def imports_of(source: str) -> list[Import]:
    """Every import of a module, those through `importlib.import_module("...")` included.

    `from a import b` counts as `a.b`, because `b` may be a module.
    """
    found: list[Import] = []

    def visit(node: ast.AST, in_function: bool, for_types_only: bool) -> None:
        for target in _targets(node):
            found.append(Import(target, getattr(node, "lineno", 0), in_function, for_types_only))
        in_function |= isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                visit(child, in_function, True)
            for child in node.orelse:
                visit(child, in_function, for_types_only)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, in_function, for_types_only)

    visit(ast.parse(source), False, False)
    return found


def _targets(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        yield from (str(a.value) for a in node.args if isinstance(a, ast.Constant))
    elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
        yield "torch.distributed"


def is_within(name: str, prefix: str) -> bool:
    return prefix == "" or name == prefix or name.startswith(f"{prefix}.")


def level_of(name: str) -> int:
    """The level of a module below `dist_dml`, or of a name in it."""
    fits = [prefix for prefix in LEVELS if prefix and is_within(name, prefix)]
    assert fits or not name, f"dist_dml.{name} has no level; add it to LEVELS and to DESIGN's list"
    return LEVELS[max(fits, key=len, default="")]


def level_problems(name: str, source: str) -> list[str]:
    """Imports of this package from above the module's own level."""
    own = level_of(name)
    return [
        f"{name}:{found.line} (level {own}) imports {found.target}"
        for found in imports_of(source)
        if found.target.startswith("dist_dml.")
        and not found.target.startswith("dist_dml.__")
        and level_of(found.target.removeprefix("dist_dml.")) > own
    ]


# Its classes derive from a library's, so that it cannot wait; it is imported inside functions.
DERIVED = {"tuning.source": "ray"}


def owner_problems(name: str, source: str) -> list[str]:
    """Heavy libraries imported by another part than their owner, or outside a function."""
    problems = []
    for found in imports_of(source):
        library = found.target.split(".")[0]
        if library not in OWNERS or found.for_types_only:
            continue
        if not is_within(name, OWNERS[library]):
            problems.append(f"{name}:{found.line} imports {library} of {OWNERS[library]}")
        if not found.in_function and DERIVED.get(name) != library:
            problems.append(f"{name}:{found.line} imports {library} outside a function")
    return problems


def group_problems(name: str, source: str) -> list[str]:
    """`torch.distributed` used by parts that get a group as an argument."""
    if any(is_within(name, user) for user in PROCESS_GROUP_USERS):
        return []
    return [
        f"{name}:{found.line} uses {found.target}"
        for found in imports_of(source)
        if found.target.startswith(("torch.distributed", "torch._C._distributed"))
    ]


@cache
def modules() -> dict[str, str]:
    """Source by module name below `dist_dml`."""
    package = ROOT / "dist_dml"
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = path.read_text("utf-8")
    assert len(names) > 30
    return names


RULES = {"levels": level_problems, "owners": owner_problems, "process groups": group_problems}


@pytest.mark.parametrize("rule", RULES)
def test_every_module_keeps_the_import_rules(rule: str) -> None:
    problems = [text for name, source in modules().items() for text in RULES[rule](name, source)]
    assert problems == []


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        ("levels", "losses.softmax", "from dist_dml.engine import Engine"),
        ("levels", "losses.softmax", "import dist_dml.models.neck"),
        ("levels", "data.plan", "def f():\n    from dist_dml import checkpoint"),
        ("levels", "parallel.class_parallel", "from dist_dml.parallel import classifier"),
        ("levels", "models.neck", "import importlib\nimportlib.import_module('dist_dml.train')"),
        ("owners", "train", "def f():\n    import mlflow"),
        ("owners", "tracking.plots", "from mlflow.entities import Run"),
        ("owners", "tracking_more", "def f():\n    import mlflow.entities"),
        ("owners", "data.shards", "if True:\n    from webdataset.writer import TarWriter"),
        ("process groups", "losses.softmax", "import torch\nx = torch.distributed.get_rank()"),
        ("process groups", "data.loader", "from torch import distributed"),
        ("process groups", "models.neck", "from torch._C._distributed_c10d import Store"),
    ],
)
def test_a_breach_of_an_import_rule_is_found(rule: str, name: str, source: str) -> None:
    assert len(RULES[rule](name, source)) == 1


def test_what_the_import_rules_allow_is_not_reported() -> None:
    allowed = {
        "tracking.plots": "if TYPE_CHECKING:\n    import mlflow\ndef f():\n    import matplotlib",
        "engine_deepspeed": "import torch.distributed\ndef f():\n    import deepspeed",
        "parallel.classifier": "from dist_dml.parallel.class_parallel import class_parallel_loss",
        "train": "from dist_dml.entry import run_worker\nfrom dist_dml import __version__",
    }
    for name, source in allowed.items():
        assert [rule(name, source) for rule in RULES.values()] == [[], [], []]


def test_no_module_carries_the_name_of_the_standard_library_or_a_dependency() -> None:
    # A file run by path puts its own folder first on sys.path, where it would hide the library.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(text for extra in extras for text in extra)]
    plain = {re.split(r"[\[<>=!~; ]", text)[0].lower().replace("_", "-") for text in wanted}
    taken = set(sys.stdlib_module_names) | {"ray", "triton"}
    for package, distributions in packages_distributions().items():
        if any(name.lower().replace("_", "-") in plain for name in distributions):
            taken.add(package)
    assert {"faiss", "cv2", "yaml", "PIL", "torch"} <= taken
    own = {part for name in modules() for part in name.split(".")}
    assert own & (taken - {"dist_dml"}) == set()


def test_nearly_all_functions_fit_a_screen() -> None:
    lengths = {
        f"{name}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, source in modules().items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    long = [name for name, length in lengths.items() if length > 65]
    assert len(long) <= 0.05 * len(lengths), long


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint()\nprint(*{{n.split('.')[0] for n in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {*OWNERS, "torch", "numpy", "pyarrow", "cv2"}


def test_the_command_line_imports_only_the_command_it_runs() -> None:
    assert loaded_after("import dist_dml.cli") & (HEAVY | {"pydantic", "yaml"}) == set()
    shows = "from dist_dml.cli import main; main(['config', 'schema'])"
    assert loaded_after(shows) & HEAVY == set()


def test_the_main_path_loads_no_library_that_it_may_not_need() -> None:
    loaded = loaded_after("import dist_dml.train, dist_dml.tune")
    assert "torch" in loaded
    assert loaded & set(OWNERS) == set()
