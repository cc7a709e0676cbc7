"""Progress on stderr: few lines without a terminal, the right time left, and the items themselves unchanged."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import pytest

from flyweight.cli.output import bytes_text, print_json, seconds_text
from flyweight.cli.progress import Bars, Lines, working


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def slow(clock: Clock, count: int, each: float) -> Iterator[int]:
    for number in range(count):
        clock.now += each
        yield number


def test_lines_every_ten_seconds_with_time_left() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = Lines(stream, clock)
    assert list(lines.track(slow(clock, 9, 4.0), "train", total=9)) == list(range(9))
    # items take 4 s each: a line after 12, 24 and 36 s
    assert stream.getvalue().splitlines() == [
        "train: 33 % (3 of 9), 24 s left",
        "train: 67 % (6 of 9), 12 s left",
        "train: 100 % (9 of 9), 0 s left",
        "train: done in 36 s",
    ]


def test_what_was_done_before_counts_for_the_share_and_not_for_the_speed() -> None:
    clock, stream = Clock(), io.StringIO()
    list(Lines(stream, clock).track(slow(clock, 3, 10.0), "train", total=10, done=7))
    assert stream.getvalue().splitlines()[0] == "train: 80 % (8 of 10), 20 s left"


def test_notes_of_a_running_task_are_thinned_out() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = Lines(stream, clock)
    lines.note("before")
    for number in lines.track(slow(clock, 8, 4.0), "train", total=8):
        lines.note(f"loss {number}")
    lines.note("after")
    lines.note("at once")
    told = [line for line in stream.getvalue().splitlines() if not line.startswith("train")]
    # the first at 4 s, the next ones at least 10 s apart (16 and 28 s), and the last one of all
    assert told == ["before", "loss 0", "loss 3", "loss 6", "loss 7", "after", "at once"]


def test_short_work_says_nothing() -> None:
    clock, stream = Clock(), io.StringIO()
    assert list(Lines(stream, clock).track([1, 2, 3], "quick")) == [1, 2, 3]
    assert stream.getvalue() == ""


def test_unknown_total() -> None:
    clock, stream = Clock(), io.StringIO()
    list(Lines(stream, clock).track(slow(clock, 1, 11.0), "read"))
    assert stream.getvalue().splitlines()[0] == "read: 1 done"


def test_bars_yield_the_items_and_clean_up() -> None:
    bars = Bars()
    outer = []
    for item in bars.track([1, 2], "outer"):
        assert list(bars.track(iter("ab"), "[inner]", total=5, done=3)) == ["a", "b"]
        bars.note("loss [0.5]")
        outer.append(item)
    assert outer == [1, 2]
    assert not bars.bars.tasks
    for _ in bars.track(range(10), "left early"):
        break
    bars.close()


def test_bars_end_when_the_work_fails() -> None:
    bars = Bars()
    with pytest.raises(ValueError, match="boom"):
        for _ in bars.track(range(3), "fails"):
            raise ValueError("boom")
    bars.close()
    assert not bars.bars.live.is_started


def test_chatter_on_stdout_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with working() as progress:
        print("a library says hello")
        progress.note("half way")
    print_json({"a": (1, float("nan"))})
    shown = capsys.readouterr()
    assert shown.out == '{"a":[1,null]}\n'
    assert shown.err == "a library says hello\nhalf way\n"
    assert sys.stdout is not sys.stderr


def test_units() -> None:
    assert [bytes_text(n) for n in (0, 999, 1000, 1_234_567, 3e12)] == ["0 B", "999 B", "1.0 kB", "1.2 MB", "3.0 TB"]
    assert [seconds_text(s) for s in (0.4, 59.4, 75, 7_380)] == ["0 s", "59 s", "1 min 15 s", "2 h 3 min"]
