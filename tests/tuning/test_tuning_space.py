"""Search files: what a space may hold, and what is refused before the first trial."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_dml.config_loading import resolve
from dist_dml.errors import UsageError
from dist_dml.tune import check_metrics, without_confirming_images
from dist_dml.tuning.space import check_space, load_search, overrides_of

REPOSITORY = Path(__file__).resolve().parents[2]
RATE = "space: {optimizer.learning_rate: {log_uniform: [1e-4, 1e-1]}}\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "search.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", "holds list; expected sections"),
        ("space: {}", "space is empty"),
        ("space: {loss.scale: {uniform: [1, 2], choice: [3]}}", "give one of uniform"),
        ("space: {loss.scale: {uniform: [3, 2]}}", "low comes first"),
        ("space: {loss.scale: {log_uniform: [0, 2]}}", "log_uniform.0: .*greater than 0"),
        ("space: {loss.scale: {choice: []}}", "choice has no values"),
        ("space: {loss.scale: {log_uniform: [1, 2], step: 1}}", "step goes with uniform"),
        ("space: {loss.scale: {normal: [1, 2]}}", "space.loss.scale.normal: Extra inputs"),
        (RATE + "budget: {trials: 0}", "budget.trials"),
        (RATE + "stop: {reduction: 1}", "give more than 1"),
        (RATE + "trial: {gpus: 1.5}", "above 1 give a whole number"),
        (RATE + "confirm: {seeds: 1}", "an interval needs 2 or more"),
        (RATE + "confirm: {seeds: 3}", "seeds without metric"),
        (RATE + "start: [{optimizer.learning_rate: 1}]", "start: .* is not of the space"),
        (RATE + "start: [{loss.scale: 1}]", "start: loss.scale=1 is not of the space"),
        (
            "space: {loss.scale: {uniform: [1, 2], when: {loss.name: [arcface]}}}",
            "when names loss.name, which the space does not have before it",
        ),
        (
            "space:\n  loss.name: {choice: [arcface, cosface]}\n"
            "  loss.scale: {uniform: [1, 2], when: {loss.name: [l1]}}",
            "which loss.name never is",
        ),
        ("space: !!python/object:os.system {}", "is none of a plain value"),
    ],
)
def test_wrong_search_files_are_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        load_search(written(tmp_path, text))
    assert "\n" not in str(refused.value)


def test_an_absent_search_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_search(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("space: {optimizer.rate: {uniform: [0, 1]}}", "unknown key .*optimizer.rate"),
        ("space: {optimizer.learning_rate: {uniform: [-1, 1]}}", "space.optimizer.learning_rate"),
        ("space: {loss.name: {choice: [cross_entropy, arcfase]}}", "arcfase"),
    ],
)
def test_keys_and_values_that_no_configuration_takes_are_refused(
    tmp_path: Path, text: str, words: str
) -> None:
    search = load_search(written(tmp_path, text))
    with pytest.raises(UsageError, match=words):
        check_space(search, [], [])


def test_a_conditional_key_is_tried_where_it_is_active(tmp_path: Path) -> None:
    text = (
        "space:\n  loss.name: {choice: [cross_entropy, arcface]}\n"
        "  loss.angle_margin: {uniform: [0.1, 0.6], when: {loss.name: [arcface]}}\n"
    )
    # Cross-entropy refuses a margin, ArcFace takes it.
    with pytest.raises(UsageError, match="margin"):
        resolve(None, ["loss.angle_margin=0.3"])
    check_space(load_search(written(tmp_path, text)), [], [])


def test_values_travel_through_the_command_line_as_they_are() -> None:
    chosen = {
        "optimizer.learning_rate": 1.2345678901234567e-05,
        "loss.label_smoothing": 0.1,
        "loss.name": "cross_entropy",
        "data.batch_size": 48,
        "optimizer.betas": [0.8, 0.99],
        "loss.bias": True,
        "loss.similarity": "linear",
    }
    config = resolve(None, overrides_of(chosen)).config
    assert config.optimizer.learning_rate == chosen["optimizer.learning_rate"]
    assert list(config.optimizer.betas) == chosen["optimizer.betas"]
    assert (config.data.batch_size, config.loss.bias) == (48, True)


@pytest.mark.parametrize("metric", ["nothing/cosine/map_at_r", "unseen/cosine/recall_at_3"])
def test_a_metric_that_is_not_measured_is_refused(tmp_path: Path, metric: str) -> None:
    config = resolve(str(REPOSITORY / "configs/glyphs_tune.yaml"), []).config
    search = load_search(written(tmp_path, RATE))
    with pytest.raises(UsageError, match=r"is not measured; name one of .*unseen/cosine/map_at_r"):
        check_metrics(search, metric, config)


def test_confirming_on_the_images_that_have_chosen_is_refused(tmp_path: Path) -> None:
    config = resolve(str(REPOSITORY / "configs/glyphs_tune.yaml"), []).config
    text = RATE + "confirm: {seeds: 2, metric: validation/cosine/recall_at_1}"
    search = load_search(written(tmp_path, text))
    with pytest.raises(UsageError, match="by which the search has chosen"):
        check_metrics(search, "validation/cosine/map_at_r", config)


def test_images_that_confirm_are_not_evaluated_in_the_search(tmp_path: Path) -> None:
    file = str(REPOSITORY / "configs/glyphs_tune.yaml")
    config = resolve(file, []).config
    confirming = RATE + "confirm: {seeds: 2, metric: unseen/cosine/map_at_r}"
    search = load_search(written(tmp_path, confirming))
    words = without_confirming_images(search, "validation/cosine/map_at_r", config)
    (kept,) = resolve(file, words).config.evaluation.protocols
    assert kept == config.evaluation.protocols[0]
    assert kept.name == "validation"
    # Without a confirmation nothing is kept from anybody.
    assert without_confirming_images(load_search(written(tmp_path, RATE)), "", config) == ()


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs/search").glob("*.yaml")))
def test_the_spaces_of_the_repository_fit_their_configurations(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    [config] = {
        word.rstrip(")")
        for line in lines
        if line.startswith("#") and "--config" in line
        for word in [line.split("--config ")[1].split()[0]]
    }
    assert any(str(path.relative_to(REPOSITORY)) in line for line in lines)
    search = load_search(path)
    plain = check_space(search, [str(REPOSITORY / config)], [])
    check_metrics(search, search.metric or plain.checkpoint.best_metric, plain)
