"""`dist-dml config show|diff|schema`."""

from __future__ import annotations

import argparse
import json
import math

import yaml

from dist_dml.command_line import add_config_option
from dist_dml.config import Config
from dist_dml.config_loading import config_hash, differences, resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the three forms of the command."""
    forms = parser.add_subparsers(dest="form", required=True)
    show = forms.add_parser("show", help="the resolved configuration with the origin of each value")
    add_config_option(show)
    show.add_argument("--changed", action="store_true", help="only what is not a default")
    show.add_argument("overrides", nargs="*", metavar="section.key=value")
    diff = forms.add_parser("diff", help="the keys in which two configurations differ")
    diff.add_argument("first", help="YAML file")
    diff.add_argument("second", help="YAML file")
    forms.add_parser("schema", help="JSON Schema of a configuration file, for editors")


def run(arguments: argparse.Namespace) -> int:
    """Print what was asked for."""
    if arguments.form == "schema":
        print(json.dumps(Config.model_json_schema(), indent=2))
    elif arguments.form == "diff":
        _print_differences(arguments.first, arguments.second)
    else:
        resolved = resolve(arguments.config, arguments.overrides)
        _print_with_origins(
            resolved.config.model_dump(mode="json"), resolved.origins, "", arguments.changed
        )
        print(f"# hash {config_hash(resolved.config)}")
    return 0


def _print_differences(first_path: str, second_path: str) -> None:
    first, second = resolve(first_path, []).config, resolve(second_path, []).config
    rows = differences(first, second)
    width = max((len(key) for key, _, _ in rows), default=0)
    for key, ours, theirs in rows:
        print(f"{key:<{width}}  {_inline(ours)} -> {_inline(theirs)}")
    if not rows:
        print("no differences")


def _print_with_origins(tree: dict, origins: object, prefix: str, changed: bool) -> None:
    assert isinstance(origins, dict)
    indent = "  " * (prefix.count(".") + bool(prefix))
    for name, value in tree.items():
        key = f"{prefix}.{name}" if prefix else name
        # The entries of a mapping came with it.
        origin = origins.get(key, origins.get(prefix, "default"))
        if isinstance(value, dict) and value:
            inside = any(
                f"{k}.".startswith(f"{key}.") and o != "default" for k, o in origins.items()
            )
            if inside or not changed:
                print(f"{indent}{name}:")
                _print_with_origins(value, origins, key, changed)
        elif not changed or origin != "default":
            # A file's name may hold bytes that are no text.
            origin = origin.encode("utf-8", "backslashreplace").decode()
            print(f"{f'{indent}{name}: {_inline(value)}':<56}  # {origin}")


def _inline(value: object) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf).strip()
    text = text.removesuffix("...").strip()
    # YAML writes a text with line breaks on several lines; JSON, which is YAML too, escapes them.
    return json.dumps(value) if "\n" in text else text
