"""Sinks: which numbers go there, and that a sink that fails or hangs costs its own lines and nothing else."""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from broker.process.lifecycle import ErgonError
from broker.process.sink_settings import SinksSection, check_sinks
from learner import metrics
from learner.sinks.fanout import Sinks
from learner.sinks.points import Points, points_of

PLACE = {"time": 12.5, "phase": "train", "step": 3, "version": 5, "lineage": 1}


def line(event: str = "step", **fields: Any) -> dict[str, Any]:
    return {"event": event, **PLACE, **fields}


def test_a_step_is_numbers_by_name_at_its_step() -> None:
    thinking = {"8-16": {"reward": 0.5}}
    made = points_of(
        line(reward_mean=0.25, reward_by_kind={"a*p": 1}, thinking=thinking, error="x", overrun_price=None)
    )
    assert made == Points(
        "step",
        3,
        12.5,
        {
            "train/reward_mean": 0.25,
            "train/reward_by_kind/a*p": 1.0,
            "train/thinking/8-16/reward": 0.5,
            "train/version": 5.0,
        },
    )


@pytest.mark.parametrize(
    ("record", "axis", "at", "values"),
    [
        (line("warm_start", number=7, of=9, loss=0.5), "warm_start", 7, {"warm_start/loss": 0.5}),
        (line("evaluation", evaluation="step-2", greedy=0.5), "step", 2, {"eval/greedy": 0.5}),
        (line("evaluation", evaluation="after", sampled=1.0), "step", 3, {"eval/sampled": 1.0}),
        (line("evaluation", evaluation="before", greedy=0.1), "step", 3, {"eval/before/greedy": 0.1}),
        (
            line("evaluation", evaluation="after", sampled_curve=[{"budget": 0, "reward": 0.5, "episodes": 5}]),
            *("step", 3),
            {"eval/sampled_curve/0/reward": 0.5, "eval/sampled_curve/0/episodes": 5.0},
        ),
        (line("alarm", kind="entropy", raised=True, value=1.0), "step", 3, {"alarm/entropy": 1.0}),
        (line("refused", error="x"), "step", 3, {"train/refused": 1.0}),
    ],
)
def test_every_event_has_its_curves(record: Mapping[str, Any], axis: str, at: int, values: dict[str, float]) -> None:
    made = points_of(record)
    assert made is not None
    assert (made.axis, made.at, dict(made.values)) == (axis, at, values)


def test_phases_and_the_summary_are_no_curves() -> None:
    assert points_of(line("phase", detail="x")) is None
    assert points_of(line("summary", summary={"steps": 3})) is None


class FakeSink:
    name = "tensorboard"

    def __init__(self, on_write: Callable[[Points], None] = lambda _: None, on_open: Callable[[], None] = lambda: None):
        self.on_write, self.on_open = on_write, on_open
        self.taken: list[int] = []
        self.closed = False

    def open(self) -> None:
        self.on_open()

    def write(self, points: Points) -> None:
        self.on_write(points)
        self.taken.append(points.at)

    def close(self) -> None:
        self.closed = True


def lost(reason: str) -> float:
    return metrics.SINK_LOST.labels("tensorboard", reason)._value.get()  # type: ignore[no-any-return]


def offer(sinks: Sinks, steps: range) -> None:
    for step in steps:
        sinks.offer(line() | {"step": step})


def test_a_sink_that_fails_loses_its_lines_alone_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    def fail(points: Points) -> None:
        if 2 <= points.at < 5:
            raise RuntimeError("no route")

    failing, fine, before = FakeSink(fail), FakeSink(), lost("failed")
    sinks = Sinks([failing, fine])
    with caplog.at_level(logging.INFO):
        offer(sinks, range(8))
        sinks.close()
    assert failing.taken == [0, 1, 5, 6, 7]
    assert fine.taken == list(range(8))
    assert lost("failed") - before == 3
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]
    assert "RuntimeError: no route" in caplog.text
    assert "takes lines again" in caplog.text
    assert failing.closed
    assert fine.closed


def test_a_sink_that_does_not_open_is_tried_again_later_and_not_at_every_line(caplog: pytest.LogCaptureFixture) -> None:
    tries = []

    def fail() -> None:
        tries.append(1)
        raise OSError("no network")

    sink, before = FakeSink(on_open=fail), lost("failed")
    sinks = Sinks([sink])
    offer(sinks, range(5))
    sinks.close()
    assert len(tries) == 1
    assert lost("failed") - before == 5
    assert caplog.text.count("loses lines") == 1
    assert not sink.closed


def test_a_sink_that_hangs_holds_nobody_and_what_it_loses_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    begun, go = threading.Event(), threading.Event()

    def hang(_points: Points) -> None:
        begun.set()
        go.wait()

    hanging, before = FakeSink(hang), (lost("full"), lost("closed"))
    sinks = Sinks([hanging], capacity=2, patience_s=0.05)
    offer(sinks, range(1))
    assert begun.wait(10)
    offer(sinks, range(1, 10))  # two wait, seven are lost, nothing blocks
    assert lost("full") - before[0] == 7
    assert caplog.text.count("loses lines") == 1
    sinks.close()
    assert lost("closed") - before[1] == 2
    assert "sink left behind" in caplog.text
    go.set()


def test_a_missing_library_is_refused_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sinks(SinksSection())
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    check_sinks(SinksSection())
    with pytest.raises(
        ErgonError,
        match=r"sinks\.tensorboard = true needs .*Python package tensorboard,.*pip install 'ergon\[tensorboard\]'",
    ):
        check_sinks(SinksSection(tensorboard=True))
    with pytest.raises(ErgonError, match=r"sinks\.wandb = 'offline' needs .*pip install 'ergon\[wandb\]'"):
        check_sinks(SinksSection(wandb="offline"))
