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
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from dist_dml.config import Config
from dist_dml.credentials import check_values, redact
from dist_dml.errors import UsageError
from dist_dml.plain_yaml import PlainDumper, load_plain

# Keys that say where a run lives, not what it computes: they are left out of the hash.
_PLACE_KEYS = ("run.name", "run.root", "run.resume", "tracking.parent")
_PLACE_MAPPING = "tracking.tags."


VARIANTS = "variants"
_MOST_SHOWN = 120
"""Characters of a value in a message."""
_MOST_PARTS = 16
"""Of a dotted key, far more than there are."""


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
                f"argument {_shown(text)} is not understood; override a value as "
                "section.key=value, for example optimizer.learning_rate=1e-3"
            )
        # Nothing after the sign is the empty text (`checkpoint.best_metric=`), not YAML's null.
        nested = _parse(value, f"argument {_shown(text)}") if value.strip() else ""
        parts = key.split(".")
        if len(parts) > _MOST_PARTS:  # What goes through the values goes through them by recursion.
            raise UsageError(f"argument: unknown key {_shown(key)}; {_did_you_mean(key, '')}")
        for part in reversed(parts):
            nested = {part: nested}
        _merge(tree, nested, "", origins, "argument")
    check_values(tree)  # First of all: a refusal of another kind would repeat a secret.
    return Resolved(_validate(tree), origins)


def _layers(given: str) -> Iterator[tuple[dict[Any, Any], str]]:
    """What a file says outside its variants, then the one that is asked for, with their origins."""
    path, variant = Path(given), ""
    # A file whose name has a colon is still a file.
    if ":" in given and not os.path.isfile(given):
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
    by_name = {str(key): tree for key, tree in variants.items()}
    known = list(by_name)
    if name not in by_name:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {path}:{near[0]}? It has {', '.join(known)}" if near else ""
        hint = hint or (f"it has {', '.join(known)}" if known else "it has none")
        raise UsageError(f"--config {path}:{name}: the file has no variant {name!r}; {hint}")
    tree = by_name[name]
    if tree is not None and not isinstance(tree, dict):
        raise UsageError(
            f"{path}: variant {name} is {_shown(tree)}; expected sections such as `loss:`"
        )
    return tree or {}


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # Of a zero byte in the path, the latter.
        decoding = isinstance(error, UnicodeDecodeError)
        reason = "it is not UTF-8 text" if decoding else getattr(error, "strerror", None) or error
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
        return load_plain(text)
    except ValueError as error:
        raise UsageError(f"{source} is not valid YAML{redact(str(error))}; mend it there") from None


def _merge(
    tree: dict[str, Any], update: Any, prefix: str, origins: dict[str, str], origin: str
) -> None:
    """Put `update` into `tree`, refusing unknown keys while their file is still known."""
    model = _model_at(prefix)
    if not isinstance(update, dict):
        keys = ", ".join(model.model_fields)
        raise UsageError(
            f"{origin}: {prefix} is a section and got {_shown(update)}; set one of its keys: {keys}"
        )
    for name, value in update.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if name not in model.model_fields:
            raise UsageError(f"{origin}: unknown key {_shown(key)}; {_did_you_mean(key, prefix)}")
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
        sentence = f"unknown key {_shown(key)}; known here: {', '.join(known)}"
    else:
        sentence = f"{key}={_shown(first['input'])}: {message[:1].lower()}{message[1:]}"
    # Messages of validators have values of texts in them.
    return redact(" ".join(sentence.split())) + (f" (and {len(more)} more)" if more else "")


def _shown(value: Any) -> str:
    """A value for a message: one line, without secrets, and not all of a long one."""
    text = redact(repr(value))
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


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
        if key not in _PLACE_KEYS and not key.startswith(_PLACE_MAPPING)
    }
    return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:16]


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `resolve` reads back to an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=PlainDumper, sort_keys=False)


def differences(first: Config, second: Config) -> list[tuple[str, Any, Any]]:
    """(key, first's value, second's value) wherever two configurations differ.

    An entry that only one of two mappings has is None in the other.
    """
    ours, theirs = (dict(flatten(config.model_dump(mode="json"))) for config in (first, second))
    every = ((key, ours.get(key), theirs.get(key)) for key in {**ours, **theirs})
    return [(key, mine, other) for key, mine, other in every if mine != other]
