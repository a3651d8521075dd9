"""The live line: text, rates, and how it behaves with and without a terminal."""

import io

import pytest

from dist_dml.tracking.live import LiveLine, Progress, format_duration, format_line

PROGRESS = Progress(
    step=250,
    total_steps=1000,
    epoch=3,
    images_per_second=812.4,
    wait_share=0.034,
    loss=1.23456,
    eta_seconds=118.0,
)
TEXT = "step  250/1000  epoch 3  loss 1.2346  812 images/s  waits for data 3%  ETA 1:58"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_line_says_step_epoch_loss_rate_wait_and_eta():
    assert format_line(PROGRESS) == TEXT


def test_the_bar_fills_what_is_left_and_never_more_than_the_terminal():
    line = format_line(PROGRESS, columns=len(TEXT) + 27)
    assert line == " 25% " + "#" * 5 + "-" * 15 + "  " + TEXT
    for columns in range(1, 150):
        assert len(format_line(PROGRESS, columns)) <= columns


def test_what_is_not_known_is_left_out():
    unknown = Progress(0, 10, 1, None, None, None, None)
    assert format_line(unknown) == "step  0/10  epoch 1"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (65.4, "1:05"), (3723, "1:02:03"), (270300, "3d 03:05")]
)
def test_durations_read_like_a_clock(seconds, text):
    assert format_duration(seconds) == text


def test_without_a_terminal_there_is_a_plain_line_per_interval_and_the_last():
    stream, clock = io.StringIO(), Clock()
    live = LiveLine(100, stream, interval_seconds=10.0, clock=clock)
    live.begin(0, 0, 0.0)
    for step in range(1, 101):
        clock.now += 0.4
        live.update(step, 1, step * 64, wait_seconds=step * 0.1, loss=2.0)
    live.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5  # After 1.2 s, about every 10 s, and the last step.
    assert lines[-1].startswith("step 100/100  epoch 1  loss 2.0000  160 images/s")
    assert "waits for data 25%" in lines[-1]
    assert not {"\r", "\x1b"} & set(stream.getvalue())


def test_on_a_terminal_it_redraws_in_place_at_most_five_times_a_second():
    stream, clock = Terminal(), Clock()
    live = LiveLine(1000, stream, clock=clock)
    live.begin(0, 0, 0.0)
    for step in range(1, 1001):
        clock.now += 0.01
        live.update(step, 1, step, 0.0)
    live.close()
    text = stream.getvalue()
    assert 40 <= text.count("\r") <= 52
    assert text.count("\n") == 1
    assert "\x1b" not in text


def test_a_resumed_run_shows_its_real_rate_and_eta():
    stream, clock = io.StringIO(), Clock()
    live = LiveLine(2000, stream, clock=clock)
    live.begin(1000, 128_000, 0.0)
    for step in range(1001, 1011):
        clock.now += 0.5
        live.update(step, 9, step * 128, 0.0)
    live.close()
    last = stream.getvalue().splitlines()[-1]
    assert "256 images/s" in last  # Not 128,000 images in 5 seconds.
    assert "ETA 8:15" in last  # 990 steps of half a second.


def test_an_evaluation_between_steps_does_not_count_as_slow_training():
    stream, clock = io.StringIO(), Clock()
    live = LiveLine(30, stream, clock=clock)
    live.begin(0, 0, 0.0)
    for step in range(1, 11):
        clock.now += 0.1
        live.update(step, 1, step * 10, 0.0)
    clock.now += 60.0
    live.begin(10, 100, 0.0)
    for step in range(11, 21):
        clock.now += 0.1
        live.update(step, 1, step * 10, 0.0)
    live.close()
    assert "100 images/s" in stream.getvalue().splitlines()[-1]


def test_the_rate_follows_the_recent_past():
    stream, clock = io.StringIO(), Clock()
    live = LiveLine(10_000, stream, clock=clock)
    live.begin(0, 0, 0.0)
    for step in range(1, 301):
        clock.now += 1.0 if step <= 200 else 0.5
        live.update(step, 1, step * 100, 0.0)
    live.close()
    assert "200 images/s" in stream.getvalue().splitlines()[-1]


def test_a_message_takes_a_line_of_its_own():
    stream, clock = Terminal(), Clock()
    live = LiveLine(10, stream, clock=clock)
    live.begin(0, 0, 0.0)
    clock.now += 1.0
    live.update(1, 1, 10, 0.0)
    live.message("evaluated")
    live.close()
    assert "\revaluated\n" in stream.getvalue()


def test_a_closed_stream_ends_the_line_and_not_the_run():
    stream, clock = io.StringIO(), Clock()
    live = LiveLine(10, stream, clock=clock)
    live.begin(0, 0, 0.0)
    stream.close()
    for step in range(1, 11):
        clock.now += 11.0
        live.update(step, 1, step, 0.0)
    live.message("goes nowhere")
    live.close()


def test_where_time_ends_the_training_the_line_counts_seconds():
    clock, stream, spent = Clock(), io.StringIO(), [0.0]
    live = LiveLine(
        100_000,
        stream,
        interval_seconds=10.0,
        clock=clock,
        max_seconds=60.0,
        training_seconds=lambda: spent[0],
    )
    live.begin(0, 0, 0.0)
    clock.now, spent[0] = clock.now + 20, 15.0
    live.update(40, 1, 4000, 0.0)
    live.close()
    assert stream.getvalue().startswith("step 40  15/60 s  epoch 1")
    assert stream.getvalue().endswith("ETA 0:45\n")


def test_where_steps_come_to_an_end_first_the_line_counts_steps():
    clock, stream = Clock(), io.StringIO()
    live = LiveLine(50, stream, clock=clock, max_seconds=60.0, training_seconds=lambda: 15.0)
    live.begin(0, 0, 0.0)
    clock.now += 20
    live.update(40, 1, 4000, 0.0)
    live.close()
    assert "step 40/50" in stream.getvalue()
    assert "ETA 0:05" in stream.getvalue()


def test_the_bar_shows_the_share_of_time():
    timed = Progress(40, 100_000, 1, None, None, None, 45.0, (15.0, 60.0))
    line = format_line(timed, columns=80)
    assert line.startswith(" 25% ")
