"""The simulation of many actors: its script, what is full first, the report and the picture."""

from __future__ import annotations

import itertools
import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import zmq

from broker.protocol import weight_messages
from broker.protocol.commands import ErrorBody, Heartbeat, Lease, TicketBody, Welcome, parse_body
from broker.protocol.common import Body
from broker.protocol.errors import ErrorCode
from broker.protocol.frames import Message, decode, encode
from broker.protocol.trajectory import PolicyVersion
from tests.bench.exchange.load import RUN_ID, Job, make_ticket
from tests.bench.rollouts.engines import TURN_TOKENS
from tests.bench.rollouts.environment import NUM_TURNS
from tests.bench.scaling.fleet import Actor
from tests.bench.scaling.picture import draw
from tests.bench.scaling.profile import GPU, MEASURED, Profile, Script
from tests.bench.scaling.receiver import Receiver
from tests.bench.scaling.report import (
    Bottleneck,
    Cell,
    bottleneck,
    link_bytes_per_s,
    machine_full,
    markdown,
    relays_needed,
    summary,
)

BUSIEST = {"broker": 0.0003, "relay": 0.0002, "learner": 0.0001}  # of a core, by actor


def cell(actors: int, delivered: float = 1.0, profile: str = "measured", rate: float = 3.0) -> Cell:
    shares = {part: share * actors for part, share in BUSIEST.items()}
    return Cell(
        profile=profile,
        actors=actors,
        in_flight=72 * actors,
        offered=rate * actors,
        finished=rate * actors,
        durable=rate * actors * delivered,
        delivered=rate * actors * delivered,
        p50_ms=2.0,
        p99_ms=9.0,
        busiest=shares,
        cores={part: 1.5 * share for part, share in shares.items()} | {"actors": 0.001 * actors},
        late_s=0.0,
        idle=0.01,
        delta_bytes=1e6,
        versions=3,
        lag_p50_s=0.2,
        lag_p99_s=0.5,
        missed=0,
        pulled=0,
        lost=0,
        not_taken=0,
        staleness=2.0,
        load="1.0",
    )


@pytest.mark.parametrize("profile", [MEASURED, GPU], ids=lambda profile: profile.name)
def test_an_actor_keeps_its_engine_full_and_no_fuller(profile: Profile) -> None:
    script = Script(profile, seed=1)
    tokens = statistics.fmean(episode.sampled for episode in itertools.islice(script.fresh(), 4096))
    # Sampled tokens a second are the engine's, whatever the tools take.
    assert script.per_s * tokens == pytest.approx(profile.tokens_per_s, rel=0.05)
    assert script.episodes > profile.batch


def test_a_thousand_gpus_make_what_is_said_of_them() -> None:
    script = Script(GPU, seed=0)
    assert 1000 * script.per_s == pytest.approx(50, rel=0.1)
    assert 1000 * script.per_s * script.mean_bytes == pytest.approx(7e6, rel=0.1)


def test_measured_episodes_have_the_turns_of_the_rollout_benchmark() -> None:
    low, high = (NUM_TURNS * bound for bound in TURN_TOKENS)
    for episode in itertools.islice(Script(MEASURED, seed=2).fresh(), 500):
        assert low <= episode.sampled <= high
        assert episode.context == episode.sampled
        assert episode.seconds > episode.sampled * MEASURED.batch / MEASURED.tokens_per_s


def test_running_episodes_are_met_at_any_moment_of_their_time() -> None:
    """Of a process that renews itself, what is left is half of E[d^2] / E[d] on average."""
    script = Script(MEASURED, seed=3)
    seconds = [episode.seconds for episode in itertools.islice(script.fresh(), 20_000)]
    left = [episode.seconds for episode in itertools.islice(script.running(), 20_000)]
    expected = statistics.fmean(d * d for d in seconds) / statistics.fmean(seconds) / 2
    assert statistics.fmean(left) == pytest.approx(expected, rel=0.05)


def test_the_same_seed_draws_the_same_script() -> None:
    one, other = (list(itertools.islice(Script(MEASURED, seed=4).fresh(), 50)) for _ in range(2))
    assert one == other
    assert one != list(itertools.islice(Script(MEASURED, seed=5).fresh(), 50))


def test_the_bottleneck_is_projected_from_what_was_kept_up_with() -> None:
    assert bottleneck([cell(10), cell(1000), cell(3000, delivered=0.5)]) == Bottleneck(
        "broker", pytest.approx(1000 / 0.3), measured=False
    )
    seen = bottleneck([cell(1000), cell(4000, delivered=0.8)])
    assert (seen.part, seen.measured) == ("broker", True)
    assert bottleneck([cell(4000, delivered=0.5)]).actors == pytest.approx(1 / 0.0003)


def test_the_machine_is_full_where_all_parts_together_take_it() -> None:
    cells = [cell(10), cell(300), cell(1000)]
    assert machine_full(cells, 2) == 1000
    assert machine_full(cells[:2], 2) is None


def test_a_relay_sends_every_actor_every_version() -> None:
    assert link_bytes_per_s(1000, 1e6, 10.0) == 1e8
    assert relays_needed(1000, 0.05e9, 60.0) == 2  # 0.83 GB/s, of 0.625 each
    assert relays_needed(1000, 1e6, 10.0) == 1


def test_the_summary_names_the_bottleneck_of_each_profile() -> None:
    told = summary([cell(1000), cell(10), cell(100, profile="gpu", rate=0.05)], 2)
    assert told["measured"]["first_bottleneck"] == "broker"
    assert told["measured"]["full_at_actors"] == 3333
    assert list(told["measured"]["cells"]) == [10, 1000]
    assert told["gpu"]["cells"][100]["offered"] == 5.0


def test_the_report_says_what_was_kept_up_with() -> None:
    text = markdown([cell(1000, delivered=0.9), cell(100)], "two cores", 2)
    assert "| 100 | 7,200 | 300.0 | 300.0 | 2 / 9 |" in text
    assert "Kept up with: 100." in text
    assert "was full with 1,000." in text
    assert "| 7B | 0.05 | 0.83 | 2 |" in text


@dataclass
class Drawn:
    lines: int
    texts: list[str]


def drawn(text: str) -> Drawn:
    root = ElementTree.fromstring(text)
    name = "{http://www.w3.org/2000/svg}"
    return Drawn(len(root.findall(f".//{name}polyline")), [each.text or "" for each in root.iter(f"{name}text")])


def test_the_picture_has_a_line_for_each_profile_and_part() -> None:
    cells = [cell(n) for n in (10, 100, 1000)] + [cell(n, profile="gpu", rate=0.05) for n in (100, 1000)]
    found = drawn(draw(cells))
    assert found.lines == 2 * 2 + 3
    assert {"actors", "10", "1,000", "broker", "relay", "learner"} <= set(found.texts)
    assert drawn(draw(cells[:1])).lines == 2 + 3


class Servers:
    """Two sockets in the place of broker and relay, and what was said to them."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.broker, self.relay = self.context.socket(zmq.ROUTER), self.context.socket(zmq.ROUTER)
        self.ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in (self.broker, self.relay)]

    def hear(self, socket: zmq.Socket[bytes]) -> tuple[bytes, Message]:
        assert socket.poll(5000)
        routing, *frames = socket.recv_multipart()
        return routing, decode(frames)

    def say(self, socket: zmq.Socket[bytes], routing: bytes, body: Body) -> None:
        socket.send_multipart([routing, *encode(body.pack())])


@pytest.fixture
def servers() -> Iterator[Servers]:
    opened = Servers()
    yield opened
    opened.broker.close(0)
    opened.relay.close(0)
    opened.context.term()


WELCOME = Welcome(run_id=RUN_ID, heartbeat_s=1.0, liveness=15, lease_s=30.0)
UNKNOWN = ErrorBody(code=ErrorCode.UNKNOWN_PEER.value, message="say HELLO", fatal=False, about="HEARTBEAT")


def test_an_actor_that_the_broker_knows_no_more_says_hello_and_what_it_holds(servers: Servers) -> None:
    actor = Actor(servers.context, *servers.ports, "actor-0", PolicyVersion(1, 1))
    broker = servers.broker
    routing, first = servers.hear(broker)
    servers.say(broker, routing, WELCOME)
    actor.dealer.poll(5000)
    actor.receive()
    servers.hear(broker)  # its leases, none
    actor.lease(2)
    servers.hear(broker)
    ticket = make_ticket(Job("j", 900, 1, 1.0, 1, 0), 0)
    servers.say(broker, routing, TicketBody(tickets=(ticket,)))
    actor.dealer.poll(5000)
    actor.receive()
    actor.beat()
    assert parse_body(servers.hear(broker)[1], Heartbeat).leases == (ticket.ticket_id,)
    servers.say(broker, routing, UNKNOWN)
    actor.dealer.poll(5000)
    actor.receive()
    assert servers.hear(broker)[1] == first
    servers.say(broker, routing, WELCOME)
    actor.dealer.poll(5000)
    actor.receive()
    assert parse_body(servers.hear(broker)[1], Heartbeat).leases == (ticket.ticket_id,)
    assert parse_body(servers.hear(broker)[1], Lease).credit == 1  # one of two has come
    assert actor.num_lost == 1
    actor.dealer.close(0)
    actor.weights.dealer.close(0)


def test_a_receiver_that_the_relay_knows_no_more_says_hello_and_what_it_holds(servers: Servers) -> None:
    receiver = Receiver(servers.context, servers.ports[1], "actor-0", PolicyVersion(1, 4))
    relay = servers.relay
    routing, first = servers.hear(relay)
    welcome = weight_messages.Welcome(run_id=RUN_ID, heartbeat_s=1.0, liveness=15)
    for num_lost in (0, 1):
        servers.say(relay, routing, welcome)
        receiver.dealer.poll(5000)
        receiver.receive()
        assert parse_body(servers.hear(relay)[1], weight_messages.Watch).have == (1, 4)
        assert receiver.num_lost == num_lost
        servers.say(relay, routing, UNKNOWN)
        receiver.dealer.poll(5000)
        receiver.receive()
        assert servers.hear(relay)[1] == first
    receiver.dealer.close(0)
