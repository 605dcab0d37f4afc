"""The store of a real broker process: large trajectories in little memory, damage on the disk, a disk that fills up."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from broker.client import ActorClient, LearnerClient
from broker.protocol.commands import TicketState
from broker.protocol.frames import Message, encode
from broker.protocol.trajectory import Segment, Ticket, Trajectory, VersionRun
from broker.store.segments import ALIGNMENT
from tests.integration.broker.conftest import RUN_ID, BrokerProcess
from tests.integration.broker.test_broker_process import Actors, ask_raw, receive
from tests.unit.broker.samples import make_ticket, make_trajectory

BYTES_PER_TOKEN = 9


def large_trajectory(ticket: Ticket, num_bytes: int) -> Trajectory:
    """A trajectory whose arrays have about this many bytes and tell which ticket's they are."""
    num_tokens = num_bytes // BYTES_PER_TOKEN
    token_ids_T = np.arange(num_tokens, dtype=np.int32) ^ (hash(ticket.ticket_id) & 0xFFFF)
    logprobs_T = np.full(num_tokens, -1.5, dtype=np.float32)
    segment = Segment(token_ids_T, np.ones(num_tokens, dtype=np.bool_), logprobs_T, (VersionRun(1, 1, num_tokens),))
    return Trajectory(make_trajectory(ticket).head, (segment,))


class LargeActors(Actors):
    """Actors whose trajectories have `num_bytes`."""

    num_bytes = 1_000_000

    def result_of(self, ticket: Ticket, client: ActorClient) -> Trajectory:
        return large_trajectory(ticket, self.num_bytes)


@contextmanager
def broker_process(directory: Path, **settings: object) -> Iterator[BrokerProcess]:
    broker = BrokerProcess(directory, **settings)  # type: ignore[arg-type]
    try:
        yield broker
    finally:
        broker.kill()


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def memory_mb(pid: int, field: str) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


async def pass_through(broker: BrokerProcess, learner: LearnerClient, actor: ActorClient, num_bytes: int) -> None:
    """One trajectory from actor to learner and its ack."""
    ticket = await asyncio.wait_for(actor.lease(), 60)
    sent = large_trajectory(ticket, num_bytes)
    assert await asyncio.wait_for(actor.send(sent), 200) == "accepted"
    got = await asyncio.to_thread(learner.receive, 200)
    assert isinstance(got, Trajectory)
    assert got.ticket.ticket_id == ticket.ticket_id
    assert np.array_equal(got.segments[0].token_ids_T, sent.segments[0].token_ids_T)
    assert np.array_equal(got.segments[0].logprobs_T, sent.segments[0].logprobs_T)
    assert await asyncio.to_thread(learner.ack, [ticket.ticket_id]) == 1


async def test_a_trajectory_of_157_mb_is_never_held_twice(tmp_path: Path) -> None:
    num_bytes = 157_000_000
    with broker_process(tmp_path, lease_s=120.0, liveness=600) as broker:
        learner = broker.learner()
        learner.resume([])
        learner.issue([make_ticket("small"), make_ticket("t1"), make_ticket("t2")])
        actor = ActorClient(broker.endpoint, RUN_ID, "actor-0")
        await actor.connect()
        assert broker.process is not None
        await pass_through(broker, learner, actor, 100_000)
        before_mb = memory_mb(broker.process.pid, "VmRSS")
        for _ in range(2):
            await pass_through(broker, learner, actor, num_bytes)
        growth_mb = memory_mb(broker.process.pid, "VmHWM") - before_mb
        print(f"peak memory of the broker grew by {growth_mb:.0f} MiB for a trajectory of {num_bytes >> 20} MiB")
        assert growth_mb < 1.3 * num_bytes / 2**20
        await actor.close()
        learner.close()


def test_many_large_results_at_once_are_let_in_one_after_the_other(tmp_path: Path) -> None:
    num, num_bytes = 8, 40_000_000
    with broker_process(tmp_path, max_inflight_mb=1, fsync="interval", lease_s=120.0, liveness=600) as broker:
        learner = broker.learner()
        learner.resume([])
        actors = LargeActors(broker.endpoint, num=num, width=1)
        actors.num_bytes = num_bytes
        actors.start()
        wait_for(lambda: learner.status().peers.get("actor") == num, "eight actors")
        assert broker.process is not None
        before_mb = memory_mb(broker.process.pid, "VmRSS")
        learner.issue([make_ticket(f"t{n}") for n in range(num)])
        received = receive(learner, num)
        assert Counter(received) == Counter(f"t{n}" for n in range(num))
        growth_mb = memory_mb(broker.process.pid, "VmHWM") - before_mb
        print(f"peak memory of the broker grew by {growth_mb:.0f} MiB for {num} trajectories of {num_bytes >> 20} MiB")
        assert growth_mb < 3 * num_bytes / 2**20  # one on its way in, one on its way out
        actors.finish()
        learner.close()


async def test_an_offer_whose_send_was_cancelled_holds_nobody_up(tmp_path: Path) -> None:
    with broker_process(tmp_path, max_inflight_mb=1, liveness=600) as broker:
        learner = broker.learner()
        learner.resume([])
        learner.issue([make_ticket(f"t{n}") for n in range(3)])
        actor = ActorClient(broker.endpoint, RUN_ID, "actor-0")
        await actor.connect()
        tickets = [await asyncio.wait_for(actor.lease(), 30) for _ in range(3)]
        for ticket in tickets[:2]:
            sending = asyncio.create_task(actor.send(large_trajectory(ticket, 3_000_000)))
            await asyncio.sleep(0)  # it has sent its offer, and no answer can be here
            assert ticket.ticket_id in actor._parcels
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
        assert await asyncio.wait_for(actor.send(large_trajectory(tickets[2], 3_000_000)), 60) == "accepted"
        await actor.close()
        learner.close()


def test_a_damaged_result_is_sampled_again_and_never_delivered(tmp_path: Path) -> None:
    ids = [f"t{n}" for n in range(6)]
    with broker_process(tmp_path, blob_bytes=16) as broker:
        learner = broker.learner()
        learner.resume([])
        learner.issue([make_ticket(ticket_id) for ticket_id in ids])
        learner.close()
        actors = Actors(broker.endpoint, num=1)
        actors.start()
        wait_for(lambda: actors.statuses["accepted"] == len(ids), "six results")
        actors.finish()
        broker.kill()
        (segment,) = (tmp_path / RUN_ID / "broker" / "blobs").iterdir()
        segment.write_bytes(bytes(byte ^ 1 for byte in segment.read_bytes()[: 6 * ALIGNMENT]))
        broker.start()
        learner = broker.learner(window=4)
        learner.resume([])
        assert learner.receive(1.0) is None
        status = learner.status()
        assert status.total("damaged") == len(ids)
        assert status.count(TicketState.ISSUED) == len(ids)
        assert "ergon_broker_damaged_total 6.0" in broker.http("/metrics")
        actors = Actors(broker.endpoint, num=1)
        actors.start()
        for _ in ids:
            item = learner.receive(60)
            assert isinstance(item, Trajectory)
            assert item.ticket.attempt == 0
            assert item.segments[0].token_ids_T.tolist() == list(range(6))
            learner.ack([item.ticket.ticket_id])
        assert learner.status().count(TicketState.ACKED) == len(ids)
        actors.finish()
        learner.close()


def test_the_bytes_on_their_way_to_a_learner_are_bounded(tmp_path: Path) -> None:
    num, num_bytes = 12, 1 << 20
    with broker_process(tmp_path) as broker:
        learner = LearnerClient(broker.endpoint, RUN_ID, window=64, window_bytes=4 * num_bytes)
        learner.connect(30)
        learner.resume([])
        learner.issue([make_ticket(f"t{n}") for n in range(num)])
        actors = LargeActors(broker.endpoint, num=1)
        actors.start()
        wait_for(lambda: learner.status().total("accepted") == num, "twelve results")
        wait_for(lambda: len(learner._inbox) >= 4, "four of them here")
        assert learner.status().count(TicketState.ASSIGNED) == num  # by items all of them might come
        assert len(learner._inbox) <= 5
        received = receive(learner, num)
        assert Counter(received) == Counter(f"t{n}" for n in range(num))
        actors.finish()
        learner.close()


def test_with_fsync_interval_a_killed_broker_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    num = 30
    with broker_process(tmp_path, fsync="interval", blob_bytes=16) as broker:
        learner = broker.learner(window=1)
        learner.resume([])
        assert learner.issue([make_ticket(f"t{n}") for n in range(num)]) == num
        actors = Actors(broker.endpoint, num=1)
        actors.start()
        wait_for(lambda: actors.statuses["accepted"] == num, "thirty results")
        broker.kill()
        actors.finish()
        broker.start()
        received: list[str] = []
        while len(received) < num:
            received += receive(learner, 1)
            learner.ack(received[-1:])
        assert Counter(received) == Counter(f"t{n}" for n in range(num))
        learner.close()


def test_a_message_beyond_the_brokers_limit_is_refused_and_named(tmp_path: Path) -> None:
    with broker_process(tmp_path, max_message_mb=1) as broker:
        broker.learner().close()  # it is up
        frames = [bytes(frame) for frame in encode(Message("TRAJECTORY", arrays=(np.zeros(1 << 20, dtype=np.uint8),)))]
        error = ask_raw(broker.endpoint, frames)
        assert error.code == "BAD_FRAME"
        assert "at most 1048576 are allowed" in error.message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MiB; only root can mount one."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if os.geteuid() != 0:
        pytest.skip("a small disk needs root: mounting a tmpfs of 40 MiB")
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(directory)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_disk_that_really_fills_stops_leases_and_loses_nothing(small_disk: Path) -> None:
    num = 60
    ids = [f"t{n}" for n in range(num)]
    with broker_process(small_disk, lease_s=30.0) as broker:
        learner = broker.learner(window=1)
        learner.resume([])
        learner.issue([make_ticket(ticket_id) for ticket_id in ids])
        actors = LargeActors(broker.endpoint, num=2)
        actors.start()
        wait_for(lambda: not json.loads(broker.http("/healthz"))["ok"], "60 MB fit into 40 MiB")
        status = learner.status()
        assert status.full
        assert status.peers.get("actor", 0) == 0
        assert "ergon_broker_store_full 1.0" in broker.http("/metrics")
        num_stored = status.count(TicketState.DELIVERED) + status.count(TicketState.ASSIGNED)
        assert 15 < num_stored < num
        assert actors.statuses["accepted"] <= num_stored  # what was acknowledged is there

        broker.kill()
        broker.start()
        again = learner.status()
        assert again.count(TicketState.DELIVERED) + again.count(TicketState.ASSIGNED) >= num_stored
        received: list[str] = []
        while len(received) < num:
            received += receive(learner, 1)
            learner.ack(received[-1:])
        assert Counter(received) == Counter(ids)
        assert learner.status().count(TicketState.ACKED) == num
        wait_for(lambda: bool(json.loads(broker.http("/healthz"))["ok"]), "room was made")
        statuses = actors.finish()
        assert statuses["accepted"] + statuses["late"] == num
        more = [f"u{n}" for n in range(20)]  # what was freed is used again
        learner.issue([make_ticket(ticket_id) for ticket_id in more])
        actors = LargeActors(broker.endpoint, num=2)
        actors.start()
        again_received: list[str] = []
        while len(again_received) < len(more):
            again_received += receive(learner, 1)
            learner.ack(again_received[-1:])
        assert Counter(again_received) == Counter(more)
        actors.finish()
        learner.close()


def test_leases_stop_before_the_disk_is_full(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    with broker_process(small_disk, min_free_mb=20) as broker:
        learner = broker.learner()
        learner.resume([])
        ballast.write_bytes(bytes(20 << 20))
        wait_for(lambda: learner.status().leases_on_hold, "leases on hold")
        learner.issue([make_ticket("t0")])
        actors = Actors(broker.endpoint, num=1)
        actors.start()
        assert learner.receive(1.0) is None
        assert json.loads(broker.http("/healthz"))["leases_on_hold"] is True
        shown = broker.http("/metrics")
        assert "ergon_broker_leases_on_hold 1.0" in shown
        free_bytes = float(shown.partition("\nergon_broker_store_free_bytes ")[2].split()[0])
        assert 0 < free_bytes < 20 << 20
        ballast.unlink()
        assert receive(learner, 1) == ["t0"]
        assert not learner.status().leases_on_hold
        actors.finish()
        learner.close()
