"""Configuration: defaults <- YAML <- arguments, and one line for every mistake."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dist_dml.cli import main
from dist_dml.config import Config
from dist_dml.config_loading import config_hash, differences, flatten, resolve, to_yaml
from dist_dml.errors import UsageError

DEFAULTS = dict(flatten(Config().model_dump()))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | None, *overrides: str) -> str:
    """The message of a configuration that is refused; always one line."""
    with pytest.raises(UsageError) as caught:
        resolve(path, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-3", 1e-3), ("1E5", 1e5), ("2.5e-1", 0.25), ("1.e-9", 1e-9), ("1e+2", 100.0), ("3", 3.0)],
)
def test_every_usual_form_of_a_number_is_a_number(text: str, number: float, tmp_path: Path) -> None:
    from_file = resolve(written(tmp_path, f"optimizer:\n  learning_rate: {text}\n"), [])
    from_argument = resolve(None, [f"optimizer.learning_rate={text}"])
    assert from_file.config.optimizer.learning_rate == number
    assert from_argument.config == from_file.config


def test_words_of_yaml_1_1_and_dates_are_text(tmp_path: Path) -> None:
    path = written(tmp_path, "run: {resume: no, name: 2026-01-31}\noptimizer: {nesterov: yes}\n")
    config = resolve(path, []).config
    assert (config.run.resume, config.run.name) == ("no", "2026-01-31")
    assert config.optimizer.nesterov is True
    assert resolve(None, ["run.resume=no", "optimizer.nesterov=false"]).config == Config()


def test_an_argument_outranks_the_file_and_the_file_the_default(tmp_path: Path) -> None:
    path = written(tmp_path, "optimizer: {learning_rate: 0.5, momentum: 0.5}\ndata: {path: a}\n")
    resolved = resolve(
        path, ["optimizer.momentum=0.7", "data.image={size: 32}", "optimizer.momentum=0.8"]
    )
    config, origins = resolved.config, resolved.origins
    assert config.optimizer.learning_rate == 0.5
    assert config.optimizer.momentum == 0.8
    assert config.data.image.size == 32
    # A section given as an argument changes the keys it names and no other.
    assert config.data.image.resize == DEFAULTS["data.image.resize"]
    changed = {key: origin for key, origin in origins.items() if origin != "default"}
    assert changed == {
        "optimizer.learning_rate": "experiment.yaml",
        "optimizer.momentum": "argument",
        "data.path": "experiment.yaml",
        "data.image.size": "argument",
    }
    assert set(origins) == set(DEFAULTS)


def test_nothing_after_the_sign_is_the_empty_text() -> None:
    assert resolve(None, ["checkpoint.best_metric="]).config.checkpoint.best_metric == ""


def test_an_empty_file_is_the_default_configuration(tmp_path: Path) -> None:
    assert resolve(written(tmp_path, "# nothing yet\n"), []).config == Config()
    assert resolve(None, []).config == Config()


def test_a_configuration_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.optimizer.learning_rate = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="frozen"):
        config.optimizer = config.optimizer  # pyright: ignore[reportAttributeAccessIssue]


# What is wrong -> what the line says.
BAD_ARGUMENTS = {
    "optimizer.lr=1e-3": r"'optimizer\.lr'; did you mean optimizer\.learning_rate\?",
    "lr=1e-3": r"'lr'; did you mean optimizer\.learning_rate\?",
    "optimizer.wd=0": r"'optimizer\.wd'; did you mean optimizer\.weight_decay\?",
    "learning_rate=1": r"'learning_rate'; did you mean optimizer\.learning_rate\?",
    "optimizer.learning-rate=1": r"did you mean optimizer\.learning_rate\?",
    "optimizr.momentum=1": r"unknown key 'optimizr'; did you mean optimizer\?",
    "data.image.sise=3": r"'data\.image\.sise'; did you mean data\.image\.size",
    "model.batch_size=3": r"'model\.batch_size'; did you mean data\.batch_size",
    "engine.qqq=1": r"'engine\.qqq'; known here: name, zero_stage, precision",
    "optimizer=3": r"optimizer is a section and got 3; set one of its keys: name, learning_rate",
    "optimizer": r"'optimizer' is not understood; override a value as section\.key=value",
    "=3": r"'=3' is not understood",
    "optimizer.learning_rate.x=3": r"optimizer\.learning_rate=.*should be a valid number",
    "optimizer.learning_rate=fast": r"optimizer\.learning_rate='fast': .*valid number",
    "optimizer.learning_rate=0": r"optimizer\.learning_rate=0: .*greater than 0",
    "optimizer.learning_rate=.nan": r"optimizer\.learning_rate=nan: .*finite",
    "optimizer.learning_rate=[1": r"argument .* is not valid YAML at line 1: .*; mend it there",
    "optimizer.betas=[0.9, 1.0]": r"optimizer\.betas\.1=1\.0: .*less than 1",
    "engine.precision=float16": r"engine\.precision='float16': .*'bfloat16' or 'float64'",
    "engine.zero_stage=3": r"engine\.zero_stage=3: .*0, 1 or 2",
    "data.batch_size=1.5": r"data\.batch_size=1\.5: .*integer",
    "evaluation.protocols=[]": r"evaluation\.protocols=\[\]: .*at least 1 item",
    "evaluation.distances=[]": r"evaluation\.distances=\[\]: .*at least 1 item",
    "engine={name: deepspeed, precision: float64}": r"not for engine\.name=deepspeed; use ddp",
    "run.seed=-1": r"run\.seed=-1: .*greater than or equal to 0",
    "run.name=null": r"run\.name=None: .*string",
    "schedule.milestones=[0.5, 2]": r"schedule\.milestones\.1=2: .*less than 1",
    "evaluation.recall_at=[1, 0]": r"evaluation\.recall_at\.1=0: .*equal to 1",
    "evaluation.protocols=[{name: a, quer: b}]": r"protocols\.0\.quer'; known here: name, query",
    "evaluation.protocols=[{query: b}]": r"evaluation\.protocols\.0\.name=.*required",
    # The validators over several keys: each names the keys and the remedy.
    "data.image.mean=[0.5]": r"data\.image\.mean has 1 .*data\.image\.channels=3; give one value",
    "data.image.std=[1, 1]": r"data\.image\.std has 2 .*data\.image\.channels=3; give one value",
    "data.image.size=300": r"data\.image\.resize=256 .*data\.image\.size=300; make resize",
    "data.augment.zoom=[2, 1]": r"data\.augment\.zoom=\(2\.0, 1\.0\) runs backwards; swap",
    "data.augment.crop_ratio=[2, 1]": r"data\.augment\.crop_ratio=.*swap",
    "data.augment.crop_scale=[0.5, 2]": r"data\.augment\.crop_scale=.* exceeds 1",
    "optimizer={name: sgd, nesterov: true, momentum: 0}": r"optimizer\.nesterov=true .*"
    r"optimizer\.momentum above 0",
    "training.accumulate=256": r"training\.accumulate=256 exceeds data\.batch_size=128",
}


@pytest.mark.parametrize("argument", BAD_ARGUMENTS)
def test_a_bad_argument_is_refused_in_one_line_that_names_the_key(argument: str) -> None:
    assert re.search(BAD_ARGUMENTS[argument], refusal(None, argument))


BAD_FILES = {
    "optimizer: {lr: 1}": r"experiment\.yaml: unknown key 'optimizer\.lr'; did you mean optimizer",
    "1: 2": r"experiment\.yaml: unknown key '1'; known here: run, data",
    "- a": r"experiment\.yaml holds a list; expected sections such as `data:`",
    "optimizer:": r"optimizer is a section and got None",
    "run:\n  name: a\n  seed: 1\n  name: b": r"at line 4: the key 'name' is there twice",
    "run:\n  seed: 1\ndata:\n  path: x\nrun: {}": r"at line 5: the key 'run' is there twice",
    "run:\n\tname: a": r"experiment\.yaml is not valid YAML at line 2: .*mend it there",
    "run: {name: a\ndata: b": r"not valid YAML at line 2",
    "run: {name: !!python/object/apply:os.getcwd []}": r"1: the tag .*getcwd. is none of a pla",
    "? [1, 2]\n: 3": r"not valid YAML at line 1",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line_with_the_place(text: str, tmp_path: Path) -> None:
    assert re.search(BAD_FILES[text], refusal(written(tmp_path, text)))


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    assert "No such file or directory" in refusal(tmp_path / "absent.yaml")
    assert "directory" in refusal(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("run: {name: café}\n".encode("latin-1"))
    assert "not UTF-8" in refusal(latin)


def test_several_mistakes_are_counted() -> None:
    message = refusal(None, "data.batch_size=0", "training.epochs=0", "run.seed=-1")
    assert message.endswith("(and 2 more)")


def models(kind: Any) -> Iterator[Any]:
    """A section and all sections below it."""
    yield kind
    for field in kind.model_fields.values():
        if hasattr(field.annotation, "model_fields"):
            yield from models(field.annotation)


def test_every_section_is_frozen_and_refuses_unknown_keys() -> None:
    for model in models(Config):
        assert model.model_config["frozen"], model
        assert model.model_config["extra"] == "forbid", model


OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "run.name": st.text(
            st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"]), min_size=1
        )
        | st.sampled_from(["1e-3", "no", "on", "12", "null", "~", "2026-01-31", "1:30", "true"]),
        "run.seed": st.integers(0, 2**63 - 1),
        "optimizer.learning_rate": st.floats(1e-30, 1e30),
        "optimizer.nesterov": st.booleans(),
        "data.augment.crop_scale": st.tuples(st.floats(1e-6, 0.5), st.floats(0.5, 1.0)),
        "evaluation.recall_at": st.lists(st.integers(1, 10**6), max_size=4),
        "evaluation.protocols": st.lists(
            st.fixed_dictionaries({"name": st.sampled_from(["unseen", "no"])}),
            min_size=1,
            max_size=2,
        ),
        "checkpoint.best_metric": st.sampled_from(["", "seen/l2/nmi", "=", "#"]),
    },
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(OVERRIDES)
@example({"run.name": "1e-3"})
@example({"run.name": "no"})
@example({"run.name": "2026-01-31"})
def test_a_configuration_written_as_yaml_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    # JSON is YAML, and quotes every text.
    texts = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    config = resolve(None, texts).config
    assert config.run.name == values.get("run.name", "run")
    assert config.optimizer.learning_rate == values.get("optimizer.learning_rate", 1e-3)
    path = tmp_path_factory.mktemp("written") / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert resolve(path, []).config == config
    # Other readers use plain PyYAML: it must see the same values.
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == config.model_dump(mode="json")


def test_the_hash_ignores_where_a_run_lives_and_nothing_else() -> None:
    base = config_hash(Config())
    assert re.fullmatch(r"[0-9a-f]{16}", base)
    for place in ("run.name=other", "run.root=elsewhere", "run.resume=auto"):
        assert config_hash(resolve(None, [place]).config) == base
    for change in (
        "run.seed=1",
        "data.path=x",
        "optimizer.learning_rate=2e-3",
        "evaluation.recall_at=[1]",
        "tracking.every_steps=11",
        "engine.name=ddp",
    ):
        assert config_hash(resolve(None, [change]).config) != base, change
    # The hash is stored with runs and checkpoints: it must not differ between spellings.
    spelled = resolve(None, ["optimizer.learning_rate=0.001", "data.batch_size=128"]).config
    assert config_hash(spelled) == base


def test_differences_are_the_keys_that_differ() -> None:
    other = resolve(None, ["run.seed=3", "data.image.size=8"]).config
    assert differences(Config(), other) == [("run.seed", 0, 3), ("data.image.size", 224, 8)]


def test_config_show_prints_every_value_with_its_origin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "data: {image: {size: 32}}\n")
    assert main(["config", "show", "--config", str(path), "optimizer.learning_rate=1e-2"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^    size: 32 +# experiment\.yaml$", shown, re.MULTILINE)
    assert re.search(r"^  learning_rate: 0\.01 +# argument$", shown, re.MULTILINE)
    assert re.search(r"^  momentum: 0\.9 +# default$", shown, re.MULTILINE)
    config = resolve(path, ["optimizer.learning_rate=1e-2"]).config
    assert shown.splitlines()[-1] == f"# hash {config_hash(config)}"
    # What is shown is itself a configuration file.
    assert resolve(written(tmp_path, shown), []).config == config


def test_config_show_names_the_origin_of_a_mappings_entries(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for asked in ("tracking.tags={team: x}", "tracking.tags.team=x"):
        assert main(["config", "show", asked]) == 0
        shown = capsys.readouterr().out
        assert re.search(r"^  tags:\n    team: x +# argument$", shown, re.MULTILINE)
    assert main(["config", "show", "--changed", "tracking.tags={team: x}"]) == 0
    assert re.search(
        r"^tracking:\n  tags:\n    team: x +# arg", capsys.readouterr().out, re.MULTILINE
    )


def test_config_show_changed_prints_only_what_is_not_a_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config", "show", "--changed", "data.image.size=32"]) == 0
    lines = [line.split("#")[0].rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[:-1] == ["data:", "  image:", "    size: 32"]


def test_config_diff_prints_the_keys_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = written(tmp_path, "optimizer: {name: sgd}\nrun: {seed: 3}\n")
    second = tmp_path / "second.yaml"
    second.write_text("run: {seed: 3, name: b}\n", encoding="utf-8")
    assert main(["config", "diff", str(first), str(second)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["run.name        run -> b", "optimizer.name  sgd -> adamw"]
    assert main(["config", "diff", str(first), str(first)]) == 0
    assert capsys.readouterr().out == "no differences\n"


def test_config_schema_describes_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    keys = 0
    for name, section in {"Config": schema, **schema["$defs"]}.items():
        assert section["additionalProperties"] is False
        for key, entry in section["properties"].items():
            if "$ref" in entry:
                assert schema["$defs"][entry["$ref"].rsplit("/", 1)[-1]]["description"]
            else:
                assert len(entry.get("description", "")) > 5, f"{name}.{key} has no description"
                keys += 1
    assert keys >= len(DEFAULTS)


def test_where_a_run_stands_is_a_difference_and_no_other_run() -> None:
    alone = resolve(None, []).config
    below = resolve(None, ["tracking.parent=0a", "tracking.tags={team: x}"]).config
    assert config_hash(alone) == config_hash(below)
    for first, second in ((alone, below), (below, alone)):
        found = {key: values for key, *values in differences(first, second)}
        assert set(found) == {"tracking.parent", "tracking.tags.team"}
        assert found["tracking.tags.team"] == [None, "x"][:: 1 if first is alone else -1]
