"""Texts that once came out as tracebacks, or as something else than they say: one line each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from dist_dml.cli import main
from dist_dml.config_loading import resolve
from dist_dml.errors import UsageError
from dist_dml.plain_yaml import load_plain

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)

# What is wrong -> what the line says.
REFUSED = {
    "run: {name: !!int abc}": r"line 1: abc is no whole number of 64 bits",
    "run: {name: !!int ''}": r"is no whole number of 64 bits",
    "run: {seed: 0b_}": r"0b_ is no whole number",
    "run: {seed: " + "9" * 5000 + "}": r"9{30} is no whole number",
    # Read without complaint, and then too long to be shown, stored or hashed.
    "training: {epochs: 0x" + "f" * 5000 + "}": r"0xf{28} is no whole number",
    "run: {name: !!float x}": r"'x' is no number",
    "run: {name: !!float ''}": r"'' is no number",
    "run: {name: !!bool maybe}": r"'maybe' is neither true nor false",
    "run: {name: !!timestamp x}": r"timestamp' is none of a plain value",
    # Of a set every worker would see another order, and hence another configuration.
    "evaluation: {distances: !!set {cosine, l2}}": r"set' is none of a plain value",
    "run: {name: !!binary aGVsbG8=}": r"binary' is none of a plain value",
    "run: !!python/object/apply:os.system [true]": r"apply:os\.system' is none of a plain value",
    "!!map abc": r"map' is of another kind of value",
    "run: {name: !!str [a]}": r"str' is of another kind of value",
    "run: {name: !a%0Ab x}": r"'!a\\nb' is none of a plain value",
    'run: {name: "a\\0b"}': r"a text with a zero byte or half a character",
    'run: {name: "\\ud800"}': r"a text with a zero byte or half a character",
    "loss: {scale: " + "[" * 5000: r"more than 50 levels of nesting",
    "loss: &a {scale: *a}": r"more than 50 levels of nesting",
    "data: {path: &a [*a]}": r"more than 50 levels of nesting",
    BOMB: r"more than 100000 values",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:40])
def test_what_is_no_plain_value_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "strange.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=REFUSED[text]) as caught:
        resolve(path, [])
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{path} is not valid YAML")
    assert len(message) < len(str(path)) + 200


def test_plain_values_are_what_they_were() -> None:
    text = "a: [1, -2, 0x1F, 1e-3, 1.5, .inf, true, null, ~, no, 2026-01-31, '1', =, <<: 3]"
    assert load_plain(text.replace(", <<: 3", "")) == {
        "a": [1, -2, 31, 1e-3, 1.5, float("inf"), True, None, None, "no", "2026-01-31", "1", "="]
    }
    assert load_plain("b: &b {c: 1}\nd: {<<: *b, e: 2}") == {"b": {"c": 1}, "d": {"c": 1, "e": 2}}
    assert load_plain("# nothing") is None


# An argument -> what the line says.
ARGUMENTS = {
    "loss.base=.nan": r"loss\.base=nan: .*finite number",
    "data.image.mean=[.inf, 0, 0]": r"data\.image\.mean\.0=inf: .*finite number",
    "optimizer.momentum"
    + ".x" * 5000
    + "=1": r"unknown key 'optimizer\.momentum\.x.*\.\.\.; known",
    "optimizer.momentum" + ".x" * 14 + "=" + "[" * 40 + "]" * 40: r"optimizer\.momentum=\{'x': ",
    "optimizer=" + "x" * 5000: r"optimizer is a section and got 'x+\.\.\.; set one",
    "tracking=http://ann:hunter2@host": r"tracking is a section and got 'http://ann:\*\*\*@host'",
    'loss.label_sets="a\\nb"': r"^loss\.label_sets=a b is not read by",
}


@pytest.mark.parametrize("argument", ARGUMENTS, ids=lambda text: text[:40])
def test_messages_are_one_line_and_bounded(argument: str) -> None:
    with pytest.raises(UsageError, match=ARGUMENTS[argument]) as caught:
        resolve(None, [argument])
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("given", ["a\0b.yaml", "a\0b.yaml:c", "x" * 300 + ":c", "x" * 300])
def test_a_name_that_no_file_can_have_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match=r"--config .* cannot be read \("):
        resolve(given, [])


def test_a_variant_may_have_a_number_for_a_name(tmp_path: Path) -> None:
    path = tmp_path / "numbers.yaml"
    path.write_text("variants:\n  7: {run: {seed: 7}}\n")
    assert resolve(f"{path}:7", []).config.run.seed == 7


def test_show_writes_each_value_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.yaml")
    text = "one\ntwo " + "word " * 4000
    Path(path).write_text(yaml.safe_dump({"run": {"name": text}}))
    assert main(["config", "show", "--changed", "--config", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert yaml.safe_load(lines[1].partition("#")[0]) == {"name": text}
    assert lines[1].endswith(r"# \udcff.yaml")
