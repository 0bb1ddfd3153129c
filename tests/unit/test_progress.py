# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import threading
from dataclasses import dataclass

import pytest

from vllm_medusa.progress import SECONDS_BETWEEN_LINES, Progress, lines, progress, track


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


class Minutes(threading.Event):
    """An event whose ``wait`` lets the clock run on and work go on, instead of waiting; it is set after ``count``."""

    def __init__(self, clock: Clock, shown: Progress, count: int) -> None:
        super().__init__()
        self.clock, self.shown, self.count = clock, shown, count
        self.done = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        if self.count == 0:
            self.done.set()
            return super().wait()
        self.count -= 1
        self.clock.now += timeout
        self.shown.advance(steps=10, tokens=6000, loss=2.0)
        return False


def test_a_line_tells_step_loss_speed_and_time_left() -> None:
    clock = Clock()
    shown = Progress("Heads", 500, clock=clock)
    shown.advance(loss=3.0)
    clock.now += 60
    shown.advance(steps=99, tokens=12_000, loss=1.0)
    assert shown.line() == "Heads: 100 of 500, loss 2.900, 200 tokens/s, 0:04:00 left"
    assert shown.line(ended=True) == "Heads: 100 of 500, loss 2.900, 200 tokens/s, after 0:01:00"


def test_what_is_not_known_is_left_out() -> None:
    clock = Clock()
    assert Progress("Heads", 500, clock=clock).line() == "Heads: 0 of 500, after 0:00:00"
    shown = Progress("Converting", clock=clock)
    clock.now += 90
    assert shown.line() == "Converting: after 0:01:30"


def test_steps_of_an_earlier_run_do_not_speed_up_this_one() -> None:
    clock = Clock()
    resumed, skipping = Progress("Heads", 500, done=300, clock=clock), Progress("Prompts", 500, clock=clock)
    skipping.skip_to(300)
    clock.now += 60
    for shown in (resumed, skipping):
        shown.advance(steps=20)
        assert shown.line().endswith(": 320 of 500, 0:09:00 left")


def test_a_line_is_printed_every_half_minute_and_at_the_end() -> None:
    clock, stream = Clock(), io.StringIO()
    shown = Progress("Prompts", 100, clock=clock)
    minutes = Minutes(clock, shown, 3)
    with lines(shown, stream, stop=minutes):
        assert minutes.done.wait(10)
    assert SECONDS_BETWEEN_LINES <= 30
    assert stream.getvalue().splitlines() == [
        "Prompts: 10 of 100, loss 2.000, 200 tokens/s, 0:04:30 left",
        "Prompts: 20 of 100, loss 2.000, 200 tokens/s, 0:04:00 left",
        "Prompts: 30 of 100, loss 2.000, 200 tokens/s, 0:03:30 left",
        "Prompts: 30 of 100, loss 2.000, 200 tokens/s, after 0:01:30",
    ]


def test_work_that_fails_says_nothing_of_its_end() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyError), lines(Progress("Prompts"), stream):
        raise KeyError
    assert stream.getvalue() == ""
    assert "progress" not in [thread.name for thread in threading.enumerate()]


def test_lines_are_for_logs_and_bars_for_terminals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(track("abc", "Letters")) == ["a", "b", "c"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Letters: 3 of 3, after 0:00:0")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress("Letters", 4) as shown:
        shown.advance(steps=2, tokens=5, loss=1.5)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2/4" in captured.err
    assert "loss 1.500" in captured.err
    with progress("Letters", 4, visible=False) as shown:
        shown.advance()
    assert capsys.readouterr() == ("", "")
