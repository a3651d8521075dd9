"""Defaults <- YAML files <- `section.key=value`: one configuration and each value's origin.

A file may hold variants of itself, mappings of the same form under names of their own:

    data: {path: datasets/cub}
    variants:
      c1: {loss: {name: c1}}
      c2: {loss: {name: c2, negative_margin: 0.3841}}

`FILE` is what stands outside `variants`, `FILE:c2` that with the variant merged into it key by key.
Of several files each later one is merged into those before in the same way.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from dist_dml.config import Config
from dist_dml.credentials import check_values
from dist_dml.errors import UsageError

# Keys that say where a run lives, not what it computes: they are left out of the hash.
_PLACE_KEYS = ("run.name", "run.root", "run.resume")


VARIANTS = "variants"

_FLOAT = re.compile(r"^[-+]?([0-9][0-9_]*)(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_BOOLEAN = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values, and no key twice.

    PyYAML follows 1.1, where `1e-3` is text (it asks for a point), `no` is false and 2026-01-01 a
    date: `resume: no` and `name: 2026-01-01` mean text here.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, form) for tag, form in forms if not tag.endswith((":bool", ":timestamp"))]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses what PyYAML answers by silently keeping the last of equal keys."""
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {key.value!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOLEAN, list("tTfF"))
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


@dataclass(frozen=True)
class Resolved:
    """A configuration, and each dotted key's origin.

    An origin is `default`, a file's name, `FILE:VARIANT` or `argument`.
    """

    config: Config
    origins: Mapping[str, str]


def resolve(path: str | Path | Sequence[str | Path] | None, overrides: Sequence[str]) -> Resolved:
    """The configuration of `--config A --config B:VARIANT key=value ...`.

    Args:
        path: a file, `FILE:VARIANT`, several of these (later ones override), or nothing.
        overrides: `section.key=value`, after all files.

    Raises:
        UsageError: one line naming the key, what was given, what is expected, and near names.
    """
    origins = {key: "default" for key, _ in flatten(Config().model_dump())}
    tree: dict[str, Any] = {}
    for given in [path] if isinstance(path, (str, Path)) else path or ():
        if str(given):
            for layer, origin in _layers(str(given)):
                _merge(tree, layer, "", origins, origin)
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key.strip("-"):
            raise UsageError(
                f"argument {text!r} is not understood; override a value as section.key=value, "
                "for example optimizer.learning_rate=1e-3"
            )
        # Nothing after the sign is the empty text (`checkpoint.best_metric=`), not YAML's null.
        nested = _parse(value, f"argument {text!r}") if value.strip() else ""
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _merge(tree, nested, "", origins, "argument")
    check_values(tree)  # First of all: a refusal of another kind would repeat a secret.
    return Resolved(_validate(tree), origins)


def _layers(given: str) -> Iterator[tuple[dict[Any, Any], str]]:
    """What a file says outside its variants, then the one that is asked for, with their origins."""
    path, variant = Path(given), ""
    # A file whose name has a colon is still a file.
    if ":" in given and not path.is_file():
        file, _, variant = given.rpartition(":")
        path = Path(file)
        if not variant:
            raise UsageError(f"--config {given} names no variant; give {file} or {file}:NAME")
    tree = _read_yaml(path)
    variants = tree.pop(VARIANTS, None) or {}
    if not isinstance(variants, dict):
        kind = type(variants).__name__
        raise UsageError(f"{path}: variants holds a {kind}; expected a name with sections for each")
    yield tree, path.name
    if variant:
        yield _variant(variants, variant, path), f"{path.name}:{variant}"


def variant_names(path: str | Path) -> list[str]:
    """The variants of a file, in its order.

    Raises:
        UsageError: if it cannot be read.
    """
    variants = _read_yaml(Path(path)).get(VARIANTS) or {}
    return [str(name) for name in variants] if isinstance(variants, dict) else []


def _variant(variants: Mapping[Any, Any], name: str, path: Path) -> dict[Any, Any]:
    known = [str(key) for key in variants]
    if name not in variants:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {path}:{near[0]}? It has {', '.join(known)}" if near else ""
        hint = hint or (f"it has {', '.join(known)}" if known else "it has none")
        raise UsageError(f"--config {path}:{name}: the file has no variant {name!r}; {hint}")
    tree = variants[name]
    if tree is not None and not isinstance(tree, dict):
        raise UsageError(f"{path}: variant {name} is {tree!r}; expected sections such as `loss:`")
    return tree or {}


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(
            f"--config {path} cannot be read ({reason}); give the path of a YAML file, "
            "for example configs/demo.yaml"
        ) from None
    tree = _parse(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{path} holds a {type(tree).__name__}; expected sections such as `data:`")
    return tree


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise UsageError(f"{source} is not valid YAML{line}: {problem}; mend it there") from None


def _merge(
    tree: dict[str, Any], update: Any, prefix: str, origins: dict[str, str], origin: str
) -> None:
    """Put `update` into `tree`, refusing unknown keys while their file is still known."""
    model = _model_at(prefix)
    if not isinstance(update, dict):
        keys = ", ".join(model.model_fields)
        raise UsageError(
            f"{origin}: {prefix} is a section and got {update!r}; set one of its keys: {keys}"
        )
    for name, value in update.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if name not in model.model_fields:
            raise UsageError(f"{origin}: unknown key {key!r}; {_did_you_mean(key, prefix)}")
        annotation = model.model_fields[name].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            _merge(tree.setdefault(name, {}), value, key, origins, origin)
        else:
            tree[name] = value
            origins[key] = origin


def _model_at(prefix: str) -> type[BaseModel]:
    model: Any = Config
    for part in filter(None, prefix.split(".")):
        model = model.model_fields[part].annotation
    return model


def _did_you_mean(key: str, prefix: str) -> str:
    """Near names: first neighbours in the section, then the same last part anywhere."""
    known = [name for name, _ in flatten(Config().model_dump())]
    siblings = list(_model_at(prefix).model_fields)
    last = key.rsplit(".", 1)[-1]
    # `lr` and `wd` are what the field writes; no measure of likeness finds them.
    here = [f"{prefix}.{name}" for name in siblings] if prefix else []
    for name in (*here, *known):
        words = name.rsplit(".", 1)[-1].split("_")
        if len(words) > 1 and "".join(word[0] for word in words) == last:
            return f"did you mean {name}?"
    near = [
        f"{prefix}.{name}" if prefix else name for name in difflib.get_close_matches(last, siblings)
    ]
    near += [name for name in known if name.rsplit(".", 1)[-1] == last]
    near += difflib.get_close_matches(key, known, n=2, cutoff=0.75)
    if near:
        return f"did you mean {' or '.join(dict.fromkeys(near[:3]))}?"
    return f"known here: {', '.join(siblings)}"


def _validate(tree: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    """The first problem as one sentence, and how many more there are."""
    first, *more = error.errors(include_url=False)
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        sentence = message
    elif first["type"] == "extra_forbidden":
        known = _item_model(first["loc"]).model_fields
        sentence = f"unknown key {key!r}; known here: {', '.join(known)}"
    else:
        sentence = f"{key}={first['input']!r}: {message[:1].lower()}{message[1:]}"
    return sentence + (f" (and {len(more)} more)" if more else "")


def _item_model(location: tuple[int | str, ...]) -> type[BaseModel]:
    """The section of a list's items: unknown keys elsewhere are caught while merging."""
    field = _model_at(str(location[0])).model_fields[str(location[1])]
    return get_args(field.annotation)[0]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; lists are leaves."""
    for name, value in tree.items():
        key = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Mapping):
            yield from flatten(value, key)
        else:
            yield key, value


def config_hash(config: Config) -> str:
    """16 hexadecimal digits of what the run computes: equal for runs that differ in place only."""
    leaves = {
        key: value
        for key, value in flatten(config.model_dump(mode="json"))
        if key not in _PLACE_KEYS
    }
    return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:16]


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `resolve` reads back to an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def differences(first: Config, second: Config) -> list[tuple[str, Any, Any]]:
    """(key, first's value, second's value) wherever two configurations differ."""
    ours, theirs = (dict(flatten(config.model_dump(mode="json"))) for config in (first, second))
    return [(key, ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]]
