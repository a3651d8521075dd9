"""Whatever a configuration's files and arguments say: a configuration, or one line that says why.

Hypothesis draws the same examples in every run.
"""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from fuzzing import FUZZED
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_dml.cli import main
from dist_dml.config import Config
from dist_dml.config_loading import config_hash, flatten, resolve, to_yaml
from dist_dml.errors import UsageError

DEFAULTS = dict(flatten(Config().model_dump()))
SECTIONS = sorted({key.rpartition(".")[0] for key in DEFAULTS})
WORDS = {word for key in DEFAULTS for word in key.split(".")}
SECRET = "hunter2-hunter2"

# What no key takes, or hardly one.
STRANGE: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63 - 1,
    10**300,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
    "",
    "no",
    "1e5",
    "=",
    "<<",
    "~",
    "a: b",
    "ü\u2028\x85\ufeff\N{GRINNING FACE}",
    "a\nb\n",
    " padded ",
    "\x1b[31m",
    "x" * 5000,
    [],
    {},
    [[]],
    {"": {}},
    {1: 2, None: 3},
    {"name": "a", "surprise": 1},
    [{"name": "a", "surprise": 1}],
    [{"path": "a", 1: 2}],
    ["metric(p=nan)", "metric(p=1e-400)", "metric(k=inf,p=1)", "metric(a=-1,p=1)"],
    f"http://ann:{SECRET}@host/",
    [f"http://ann:{SECRET}@host/"],
]
scalars = st.sampled_from(STRANGE) | st.text(max_size=8) | st.integers() | st.floats()
values = st.recursive(
    scalars,
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.dictionaries(st.sampled_from(sorted(WORDS)) | st.text(max_size=3), inside, max_size=3)
    ),
    max_leaves=6,
)


def near(key: str) -> st.SearchStrategy[Any]:
    """Values that a key may well take, from its type and its default."""
    section, _, name = key.rpartition(".")
    model: Any = Config
    for part in filter(None, section.split(".")):
        model = model.model_fields[part].annotation
    annotation, default = model.model_fields[name].annotation, DEFAULTS[key]
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(0, 64)
    if isinstance(default, str):
        return st.text(max_size=12)
    return st.just(default) | st.floats(0.001, 0.999)


keys = st.sampled_from(sorted(DEFAULTS))
near_pairs = keys.flatmap(lambda key: st.tuples(st.just(key), near(key)))
strange_pairs = st.tuples(keys | st.sampled_from(SECTIONS), values)


def tree_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Nested sections with some values in them; a later value takes the place of a section."""
    tree: dict[str, Any] = {}
    for key, value in pairs:
        *parts, last = key.split(".")
        place = tree
        for part in parts:
            inside = place.get(part)
            place[part] = inside if isinstance(inside, dict) else {}
            place = place[part]
        place[last] = value
    return tree


# Pieces of YAML that mean something to its readers, in any order.
PIECES = [
    *("&a ", "*a", "&b ", "*b", "<<: ", "? ", "- ", ": ", "{", "}", "[", "]", ", ", "|", ">", "#"),
    *("\n", "\n  ", "\n    ", "\t", "\n---\n", "\n...\n", "%YAML 1.1\n", "%TAG ! a:\n", "'", '"'),
    *("!!python/object:os.system ", "!!python/object/apply:os.system ", "!!set ", "!!omap "),
    *(
        "!!pairs ",
        "!!binary ",
        "!!timestamp ",
        "!!int ",
        "!!float ",
        "!!bool ",
        "!!null ",
        "!!str ",
    ),
    *("!!map ", "!!seq ", "!<", "!a%0Ab ", "! ", "~", "x", "0b_", "0x_", "1:2:3", ".nan", "-.inf"),
    *("1e999", "0o7", "0x" + "f" * 5000, "9" * 5000, '"\\ud800"', '"\\0"', '"\\x1b"', "\ufeff"),
    *("2026-01-01", "[" * 300, "{a: " * 300, "\x00", "\x85", "\u2028", "\ud7ff"),
    *(f"{name}: " for name in ("run", "name", "data", "image", "mean", "loss", "scale")),
    *("optimizer:\n  betas: ", "evaluation:\n  distances: ", "evaluation: {protocols: "),
    *("data:\n  mixture: ", "data:\n  batch_size: ", "variants:\n  v: "),
]
documents = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)


def file_in(folder: Path, content: bytes) -> Path:
    path = folder / "fuzzed.yaml"
    path.write_bytes(content)
    return path


def resolved(folder: Path, path: Path | None, overrides: list[str]) -> Config | None:
    """A configuration that comes back from its own text, or a refusal in one line."""
    try:
        config = resolve(path, overrides).config
    except UsageError as error:
        check_line(str(error))
        return None
    again = resolve(file_in(folder, to_yaml(config).encode()), []).config
    assert again == config
    assert config_hash(again) == config_hash(config)
    return config


def check_line(line: str) -> None:
    assert line.strip()
    assert len(line.splitlines()) == 1, line
    assert SECRET not in line, line
    assert len(line) < 2000, line
    assert "fuzzed.yaml" in line or "argument" in line or any(word in line for word in WORDS), line


def shown(*arguments: str) -> tuple[int, str]:
    """Exit code and output of `dist-dml config show`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["config", "show", *arguments])
    assert code in (0, 2)
    if code == 2:
        assert not out.getvalue()
        line = err.getvalue()
        assert line.startswith("dist_dml: error: ")
        check_line(line)
    else:
        assert not err.getvalue()
        assert "# hash " in out.getvalue()
    return code, out.getvalue()


@settings(FUZZED, max_examples=80)
@given(pairs=st.lists(near_pairs, min_size=1, max_size=4))
def test_sensible_values_make_a_configuration_that_comes_back(
    tmp_path: Path, pairs: list[tuple[str, Any]]
) -> None:
    path = file_in(tmp_path, yaml.safe_dump(tree_of(pairs)).encode())
    resolved(tmp_path, path, [])


@settings(FUZZED, max_examples=150)
@given(pairs=st.lists(near_pairs | strange_pairs | strange_pairs, min_size=1, max_size=3))
def test_strange_values_are_refused_in_one_line(
    tmp_path: Path, pairs: list[tuple[str, Any]]
) -> None:
    path = file_in(tmp_path, yaml.safe_dump(tree_of(pairs), allow_unicode=True).encode())
    resolved(tmp_path, path, [])


@settings(FUZZED, max_examples=350)
@given(text=documents)
def test_any_text_is_a_configuration_or_refused_in_one_line(tmp_path: Path, text: str) -> None:
    resolved(tmp_path, file_in(tmp_path, text.encode("utf-8", "surrogatepass")), [])


@settings(FUZZED, max_examples=80)
@given(content=st.binary(max_size=40))
def test_any_bytes_are_a_configuration_or_refused_in_one_line(
    tmp_path: Path, content: bytes
) -> None:
    resolved(tmp_path, file_in(tmp_path, content), [])


overrides = st.builds(
    "{}{}{}".format,
    keys | st.sampled_from(SECTIONS) | st.text(alphabet="abr.=-_ün:", max_size=8),
    st.just("=") | st.sampled_from(["", "==", ": ", ".x="]),
    documents | st.sampled_from([repr(value) for value in STRANGE]),
)


@settings(FUZZED, max_examples=200)
@given(texts=st.lists(overrides, min_size=1, max_size=2))
def test_any_argument_is_taken_or_refused_in_one_line(tmp_path: Path, texts: list[str]) -> None:
    resolved(tmp_path, None, texts)


@settings(FUZZED, max_examples=80)
@given(text=documents, texts=st.lists(overrides, max_size=2), variant=st.sampled_from(["", ":v"]))
def test_the_command_ends_with_a_configuration_or_one_line(
    tmp_path: Path, text: str, texts: list[str], variant: str
) -> None:
    path = file_in(tmp_path, text.encode("utf-8", "surrogatepass"))
    shown("--config", f"{path}{variant}", "--", *texts)
