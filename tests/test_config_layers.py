"""Layers of a configuration: several files, and the variants that a file holds of itself."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from dist_dml.command_line import add_config_option
from dist_dml.config import Config
from dist_dml.config_loading import resolve, to_yaml
from dist_dml.errors import UsageError

BASE = """
run: {name: base}
optimizer: {learning_rate: 0.5, momentum: 0.25}
data: {image: {size: 32, resize: 40}}
variants:
  sgd:
    optimizer: {name: sgd, momentum: 0.75}
  arcface:
    run: {name: base_arcface}
    loss: {name: arcface}
    data: {image: {size: 16}}
  unchanged:
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE, encoding="utf-8")
    return path


def refusal(path: object) -> str:
    """The message of what is refused; always one line."""
    with pytest.raises(UsageError) as caught:
        resolve(path, [])  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_variant_changes_the_keys_it_names_and_no_other(base: Path) -> None:
    plain, variant = resolve(base, []), resolve(f"{base}:arcface", [])
    assert plain.config.loss.name == "cross_entropy"
    assert (variant.config.loss.name, variant.config.run.name) == ("arcface", "base_arcface")
    assert (variant.config.data.image.size, variant.config.data.image.resize) == (16, 40)
    assert variant.config.optimizer == plain.config.optimizer
    assert variant.origins["data.image.size"] == "base.yaml:arcface"
    assert variant.origins["data.image.resize"] == "base.yaml"
    assert variant.origins["data.batch_size"] == "default"


def test_without_a_name_no_variant_is_taken(base: Path, tmp_path: Path) -> None:
    without = tmp_path / "without.yaml"
    without.write_text(BASE.partition("variants:")[0], encoding="utf-8")
    assert resolve(base, []).config == resolve(without, []).config
    assert resolve(f"{base}:unchanged", []).config == resolve(without, []).config


def test_a_stored_configuration_holds_the_variant_and_needs_it_no_more(
    base: Path, tmp_path: Path
) -> None:
    config = resolve(f"{base}:arcface", []).config
    stored = tmp_path / "stored.yaml"
    stored.write_text(to_yaml(config), encoding="utf-8")
    assert resolve(stored, []).config == config


def test_later_files_override_earlier_ones_and_arguments_all_files(
    base: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("optimizer: {momentum: 0.125}\nrun: {seed: 7}\n", encoding="utf-8")
    resolved = resolve([f"{base}:sgd", mine], ["run.seed=9"])
    optimizer = resolved.config.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.momentum) == ("sgd", 0.5, 0.125)
    assert resolved.config.run.seed == 9
    assert resolved.origins["optimizer.momentum"] == "mine.yaml"
    assert resolved.origins["optimizer.name"] == "base.yaml:sgd"
    turned = resolve([mine, f"{base}:sgd"], []).config
    assert (turned.optimizer.momentum, turned.run.seed) == (0.75, 7)


@pytest.mark.parametrize("nothing", [None, "", [], [""]])
def test_no_file_is_the_default_configuration(nothing: str | list[str] | None) -> None:
    assert resolve(nothing, []).config == Config()


def test_a_file_whose_name_has_a_colon_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run:3.yaml"
    path.write_text("run: {seed: 3}\nvariants: {more: {run: {seed: 4}}}\n", encoding="utf-8")
    assert resolve(path, []).config.run.seed == 3
    assert resolve(f"{path}:more", []).config.run.seed == 4


def test_an_unknown_variant_is_refused_with_those_that_there_are(base: Path) -> None:
    message = refusal(f"{base}:arcfac")
    assert "no variant 'arcfac'" in message
    assert f"did you mean {base}:arcface? It has sgd, arcface, unchanged" in message
    assert "it has sgd, arcface, unchanged" in refusal(f"{base}:proxy_nca")


def test_mistakes_in_variants_name_file_and_key(tmp_path: Path) -> None:
    def written(text: str) -> str:
        (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "bad.yaml")

    assert "the file has no variant 'x'; it has none" in refusal(f"{written('run: {}')}:x")
    assert "variants holds a list" in refusal(written("variants: [a]"))
    assert "variant a is 3; expected sections" in refusal(f"{written('variants: {a: 3}')}:a")
    unknown = written("variants: {a: {optimizer: {lr: 1}}}")
    assert resolve(unknown, []).config == Config()
    assert "bad.yaml:a: unknown key 'optimizer.lr'; did you mean" in refusal(f"{unknown}:a")
    nested = written("data: {variants: {a: {}}}")
    assert "unknown key 'data.variants'" in refusal(nested)
    within = written("variants: {a: {variants: {}}}")
    assert "unknown key 'variants'" in refusal(f"{within}:a")
    assert "names no variant" in refusal(f"{unknown}:")


def test_a_file_that_is_not_there_is_named_without_its_variant(tmp_path: Path) -> None:
    assert f"--config {tmp_path}/absent.yaml cannot be read" in refusal(f"{tmp_path}/absent.yaml:a")
    assert f"--config {tmp_path}/absent.yaml cannot be read" in refusal(f"{tmp_path}/absent.yaml")


def test_the_option_may_be_given_again_between_overrides(base: Path) -> None:
    parser = argparse.ArgumentParser()
    add_config_option(parser)
    parser.add_argument("overrides", nargs="*")
    words = ["--config", f"{base}:sgd", "run.seed=1", "--config", str(base), "run.seed=2"]
    arguments = parser.parse_intermixed_args(words)
    assert arguments.config == [f"{base}:sgd", str(base)]
    assert resolve(arguments.config, arguments.overrides).config.run.seed == 2
    assert parser.parse_intermixed_args([]).config == []
