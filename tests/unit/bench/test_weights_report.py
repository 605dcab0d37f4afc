"""The weight channel's benchmark: what it computes from its figures, and the wire it shapes."""

from __future__ import annotations

import json
import os
import time

import pytest

from tests.bench.weightchannel.codec import Codec
from tests.bench.weightchannel.crowd import Crowd
from tests.bench.weightchannel.link import FRAMING_BYTES, QUEUE_S, VNET, _Direction
from tests.bench.weightchannel.projection import project, projection_table
from tests.bench.weightchannel.report import Results, markdown, summary
from tests.bench.weightchannel.travel import GIGABIT, LOOPBACK, Travel, Way
from tests.bench.weightchannel.workers import Usage

CODEC = Codec(
    0.004, 269_000_000, 1_345_000, Usage(0.08, 0.075), Usage(0.03, 0.025), Usage(0.01, 0.01), Usage(0.02, 0.02)
)
SLOWER = CODEC._replace(delta_bytes=5_380_000, encode=Usage(0.16, 0.15))


def travel(way: Way, delta_s: float, gloo_s: float) -> Travel:
    parts = (0.08, 0.01, 0.01, 0.03)
    return Travel(way, delta_s, 0.1, 0.1, *parts, 0.05, 0.05, 1.0, gloo_s, True, None, 280.0, 300.0, "load 0.1")


def crowd(relays: int, actors: int, serve_cpu_s: float) -> Crowd:
    return Crowd(relays, actors, 0.1, serve_cpu_s, 1e6 * actors, 0.3, "load 0.1")


def test_the_last_line_has_every_key_and_null_for_what_was_not_measured() -> None:
    results = Results(codecs={(1e-6, False): CODEC, (1e-5, False): SLOWER, (1e-5, True): CODEC})
    results.travels = [travel(LOOPBACK, 0.3, 0.2), travel(GIGABIT, 0.5, 2.5)]
    results.crowds = [crowd(0, 1, 0.0), crowd(0, 64, 9.9), crowd(1, 1, 0.0), crowd(1, 64, 0.02)]
    assert summary(results) == {
        "bytes_ratio_1e-6": 200.0,
        "bytes_ratio_1e-5": 50.0,
        "codec_vs_gloo": 0.95,  # of the learning rate that costs more
        "speedup_1gbit": 5.0,
        "speedup_100mbit": None,
        "pause_ms": None,
        "publish_fraction_of_step": None,
        "publisher_cost_64": 1.2,
        "extra_memory_mb": 300.0,
    }
    assert json.dumps(summary(Results()))
    assert set(summary(Results()).values()) == {None}


def test_the_report_says_what_was_missed() -> None:
    text = markdown(Results(codecs={(1e-6, False): CODEC, (1e-5, False): SLOWER}), "two cores")
    assert "bytes_ratio_1e-6: 200, at least 200 is asked for: met" in text
    assert "bytes_ratio_1e-5: 50, at least 80 is asked for: MISSED" in text
    assert "pause_ms: not measured" in text


def test_the_projection_is_the_measured_figures_times_the_size() -> None:
    rows = {(row.model, row.gbit): row for row in project(CODEC)}
    row = rows["7B", 1]
    assert row.snapshot_gb == pytest.approx(14.0)
    assert row.snapshot_s == pytest.approx(112.0)
    assert row.delta_gb == pytest.approx(0.07)
    assert row.delta_travel_s == pytest.approx(0.56)
    core_s = 14e9 / 269e6 * (0.075 + 0.025 + 2 * 0.01)
    assert row.delta_s(1) == pytest.approx(0.56 + core_s)
    assert row.delta_s(10) == pytest.approx(0.56 + core_s / 10)
    assert rows["70B", 10].delta_travel_s == pytest.approx(0.56)
    assert "Arithmetic, not measured" in projection_table(1e-6, CODEC)


def packets(pair: tuple[int, int]) -> list[bytes]:
    got = []
    while True:
        try:
            got.append(os.read(pair[0], 1 << 17))
        except BlockingIOError:
            return got


def test_the_wire_takes_its_time_and_drops_what_does_not_fit_its_queue() -> None:
    """Pipes in packet mode (O_DIRECT) stand for the devices."""
    source, target = (os.pipe2(os.O_NONBLOCK | os.O_DIRECT) for _ in range(2))
    packet = VNET.pack(0, 0, 0, 0, 0, 0) + bytes(1500)
    on_the_wire_s = (1500 + FRAMING_BYTES) * 8 / 1e6
    way = _Direction(source[0], target[1], bits_per_s=1e6, delay_s=0.02)
    num = 8
    for _ in range(num):
        os.write(source[1], packet)
    before = time.monotonic()
    way.take()
    after = time.monotonic()
    accepted = int(QUEUE_S / on_the_wire_s) + 1
    assert accepted < num
    first = way.next_arrival
    assert before + on_the_wire_s + 0.02 <= first <= after + on_the_wire_s + 0.02
    way.deliver(first - 1e-4)
    assert packets(target) == []
    way.deliver(first)
    assert packets(target) == [packet]
    way.deliver(first + (accepted - 1) * on_the_wire_s + 1e-6)
    assert packets(target) == [packet] * (accepted - 1)
    assert way.next_arrival == float("inf")
    for pipe in (source, target):
        for fd in pipe:
            os.close(fd)
