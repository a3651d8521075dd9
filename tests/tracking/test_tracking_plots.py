"""The curves of a run as a picture."""

import numpy as np

from dist_dml.tracking.plots import running_mean, save_figure, training_curves
from dist_dml.tracking.recorder import Recorder, read_metrics

CERTIFICATE = ("accuracy", "certified_share", "epsilon")


def curves(tmp_path, names: list[str]):
    recorder = Recorder(tmp_path)
    for step in range(1, 40):
        recorder.record(step, step, float(step), dict.fromkeys(names, 1 / step))
    recorder.close()
    return read_metrics(tmp_path)


def test_there_is_a_panel_for_what_was_recorded_and_for_nothing_else(tmp_path):
    names = ["train/loss", "train/images_per_second", "unseen/cosine/map_at_r"]
    figure = training_curves(curves(tmp_path, names), "a run")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["loss, last 0.0256", "scores on unseen classes", "images/s, median 0"]


def test_each_protocol_has_its_panel_with_a_line_per_score_and_distance(tmp_path):
    names = [
        f"{protocol}/{distance}/{score}"
        for protocol in ("unseen", "shop")
        for distance in ("cosine", "l2")
        for score in ("recall_at_1", "map_at_r", "recall_at_8")
    ]
    figure = training_curves(curves(tmp_path, names), "a run")
    panels = {axes.get_title(loc="left"): len(axes.get_lines()) for axes in figure.axes}
    assert panels == {"scores on unseen classes": 4, "scores on shop": 4}


def test_certified_shares_have_a_panel_and_are_not_taken_for_the_training_accuracy(tmp_path):
    names = [
        "train/accuracy",
        *(f"seen/certificate/metric_p0.{i}/{n}" for i in (1, 5) for n in CERTIFICATE),
        *(f"seen/metric_p0.5/{score}" for score in ("recall_at_1", "map_at_r")),
    ]
    recorder = Recorder(tmp_path)
    for name in names:
        value = 0.5 if name == "train/accuracy" else 0.25
        recorder.record(1, 1, 1.0, {name: value})
    recorder.close()
    figure = training_curves(read_metrics(tmp_path), "a run")
    panels = {axes.get_title(loc="left"): len(axes.get_lines()) for axes in figure.axes}
    assert panels == {
        "training accuracy, last 50.0%": 2,
        "scores on seen classes": 1,
        "certified share of held-out images": 2,
    }


def test_a_run_without_records_or_with_a_diverged_loss_can_be_drawn(tmp_path):
    save_figure(training_curves({}, "an empty run"), tmp_path / "report" / "empty.png")
    recorder = Recorder(tmp_path)
    for step in range(1, 5):
        recorder.record(step, step, 0.0, {"train/loss": np.nan, "train/accuracy": np.nan})
    recorder.close()
    save_figure(training_curves(read_metrics(tmp_path), "diverged"), tmp_path / "report" / "d.png")
    for name in ("empty.png", "d.png"):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_the_running_mean_equals_the_mean_of_the_values_up_to_here():
    values = np.random.default_rng(0).normal(size=30)
    for window in (1, 4, 100):
        expected = [values[max(0, i - window + 1) : i + 1].mean() for i in range(30)]
        np.testing.assert_allclose(running_mean(values, window), expected, atol=1e-12)
    holed = np.array([1.0, np.nan, 3.0, np.inf])
    np.testing.assert_array_equal(running_mean(holed, 2), [1.0, 1.0, 3.0, 3.0])
