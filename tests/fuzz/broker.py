"""`python -m tests.fuzz.broker --messages 1000000`: hostile input against live processes while honest peers work.

Three real processes are attacked at once: a broker with an honest learner and honest actors, where the attackers are
actors and operators; a second broker whose only peers are attackers, learners among them; and a relay from which an
honest receiver pulls weights. Afterwards every process must be alive, have logged no traceback and end cleanly, every
honest ticket must have arrived once, and the second broker must still carry a full round of honest work.
The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from broker.client import LearnerClient
from broker.process.config import save_settings
from broker.process.lifecycle import ErgonError
from broker.process.settings import BrokerSection, MetricsSection, RunSection, Settings, WeightsSection
from broker.protocol.commands import Role
from broker.protocol.trajectory import PolicyVersion
from broker.weights.publisher import WeightPublisher
from broker.weights.subscriber import WeightSubscriber
from tests.fuzz import corpus
from tests.fuzz.attack import Attackers
from tests.fuzz.honest import Actors, Learner, Receiver
from tests.integration.weights.ends import random_tensors
from tests.ports import free_ports

RUN_ID = "fuzz"
HEARTBEAT_S, LIVENESS = 0.5, 20
STEP = 50  # messages to one target before it is the next one's turn
WARM_SHARE = 0.1  # of all messages, before memory counts as settled
SNAPSHOT_BYTES = 2 << 20
FINAL_TICKETS = 200


class Target:
    """One process under attack."""

    def __init__(self, directory: Path, process: str) -> None:
        port, upstream_port, broker_metrics, relay_metrics = free_ports(4)
        directory.mkdir(parents=True)
        self.name, self.port, self.upstream_port = directory.name, port, upstream_port
        timers = {"heartbeat_s": HEARTBEAT_S, "liveness": LIVENESS}
        settings = Settings(
            run=RunSection(name=RUN_ID, directory=directory),
            # Attackers that are actors lease tickets and let them run out: honest ones get them soon, and always.
            broker=BrokerSection(port=port, lease_s=2.0, max_attempts=1_000_000, min_free_mb=0, **timers),
            weights=WeightsSection(port=upstream_port, relay_port=port, chunk_bytes=1 << 20, **timers),
            metrics=MetricsSection(broker_port=broker_metrics, relay_port=relay_metrics),
        )
        save_settings(settings, directory / "run.toml")
        command = [sys.executable, "-m", "broker", process, "--config", str(directory / "run.toml")]
        self._log = directory / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self.settled_mib = 0.0

    @property
    def endpoint(self) -> str:
        """Where its clients connect."""
        return f"tcp://127.0.0.1:{self.port}"

    def wait(self, connect: Callable[[float], object]) -> None:
        """Call it with its patience in seconds. Raises AssertionError with the end of the log where nobody answers."""
        try:
            connect(60)
        except ErgonError as error:
            self.check()
            raise AssertionError(f"{self.name} does not answer: {self._log.read_text()[-3000:]}") from error

    def check(self) -> None:
        """Raise AssertionError with the end of its log where it has died."""
        if self._process.poll() is not None:
            raise AssertionError(f"{self.name} died with {self._process.returncode}: {self._log.read_text()[-3000:]}")

    def memory_mib(self, key: str = "VmRSS") -> float:
        """Resident memory now, or VmHWM, its peak."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

    def end(self) -> int:
        """SIGTERM; how many crashes its end and its log show."""
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(30)
        tracebacks = self._log.read_text().count("Traceback")
        if code != 0 or tracebacks:
            print(
                f"{self.name}: exit code {code}, {tracebacks} tracebacks\n{self._log.read_text()[-6000:]}",
                file=sys.stderr,
            )
        return (code != 0) + tracebacks

    def kill(self) -> None:
        """Leave nothing behind."""
        self._process.kill()
        self._process.wait()


def learner(target: Target) -> LearnerClient:
    """A connected learner."""
    client = LearnerClient(target.endpoint, RUN_ID, heartbeat_s=HEARTBEAT_S, liveness=LIVENESS)
    target.wait(client.connect)
    return client


def work_alone(target: Target) -> int:
    """After the attackers have left: a learner and actors do a round of work. How many tickets arrived."""
    client = learner(target)
    client.cancel()  # tickets that attackers issued
    peer = Learner(client, prefix="final", most=FINAL_TICKETS)
    actors = Actors(target.endpoint, RUN_ID, HEARTBEAT_S, LIVENESS)
    for thread in (actors, peer):
        thread.start()
    peer.join(120)
    peer.finish(1)
    actors.finish()
    client.close()
    return sum(peer.arrived.values())


def attack(targets: tuple[Target, ...], num_messages: int, seed: int) -> tuple[int, Counter[str]]:
    """Send that many messages, target by target; how many connections were made, and what was answered."""
    rng = random.Random(seed)
    shared, alone, relay = targets
    everyone = tuple(Role)
    crowd = (
        Attackers(shared.port, RUN_ID, (Role.ACTOR, Role.OPERATOR), corpus.experience, rng),
        Attackers(alone.port, RUN_ID, everyone, corpus.experience, rng),
        Attackers(relay.port, RUN_ID, everyone, corpus.weight, rng),
    )
    next_word = time.monotonic() + 10
    while (sent := sum(attackers.num_sent for attackers in crowd)) < num_messages:
        for target, attackers in zip(targets, crowd, strict=True):
            attackers.step(STEP)
            target.check()
            if sent >= WARM_SHARE * num_messages and not target.settled_mib:
                target.settled_mib = target.memory_mib()
        if time.monotonic() > next_word:
            next_word += 10
            print(f"{sent:,} messages; MiB: {[round(t.memory_mib()) for t in targets]}", file=sys.stderr, flush=True)
    answers: Counter[str] = Counter()
    for attackers in crowd:
        answers.update(attackers.answers)
        attackers.close()
    return sum(attackers.num_connections for attackers in crowd), answers


def fuzz(directory: Path, num_messages: int, seed: int) -> dict[str, object]:
    """The whole of it; the summary. Raises AssertionError where a process died or an honest peer came to harm."""
    targets = tuple(
        Target(directory / name, process)
        for name, process in (("broker", "serve"), ("broker-alone", "serve"), ("relay", "relay"))
    )
    shared, alone, relay = targets
    publisher = WeightPublisher(
        f"tcp://127.0.0.1:{relay.upstream_port}",
        RUN_ID,
        chunk_bytes=1 << 20,
        heartbeat_s=HEARTBEAT_S,
        liveness=LIVENESS,
    )
    started = time.monotonic()
    try:
        publisher.publish(PolicyVersion(1, 0), random_tensors(SNAPSHOT_BYTES, seed))
        client = learner(shared)
        peer = Learner(client)
        actors = Actors(shared.endpoint, RUN_ID, HEARTBEAT_S, LIVENESS)
        subscriber = WeightSubscriber(
            relay.endpoint, RUN_ID, "honest", role="actor", heartbeat_s=HEARTBEAT_S, liveness=LIVENESS
        )
        relay.wait(subscriber.wait_connected)
        receiver = Receiver(subscriber, directory)
        for thread in (peer, actors, receiver):
            thread.start()
        learner(alone).close()  # it is up
        connections, answers = attack(targets, num_messages, seed)
        attack_s = time.monotonic() - started
        peer.finish(120)
        actors.finish()
        receiver.finish()
        status = client.status()
        client.close()
        subscriber.close()
        final = work_alone(alone)
        memory = {t.name: (t.settled_mib, t.memory_mib(), t.memory_mib("VmHWM")) for t in targets}
        crashes = sum(target.end() for target in targets)
    finally:
        for target in targets:
            target.kill()
        publisher.close()
    return {
        "messages": num_messages,
        "connections": connections,
        "seconds": round(attack_s, 1),
        "crashes": crashes,
        "answers": dict(answers.most_common()),
        "settled_mb": {name: round(settled, 1) for name, (settled, _, _) in memory.items()},
        "end_mb": {name: round(end, 1) for name, (_, end, _) in memory.items()},
        "peak_mb": {name: round(peak, 1) for name, (_, _, peak) in memory.items()},
        "honest_issued": peer.issued,
        "honest_arrived": len(peer.arrived),
        "honest_twice": sum(num > 1 for num in peer.arrived.values()),
        "honest_statuses": dict(actors.statuses),
        "honest_fetches": receiver.num_fetched,
        "afterwards_arrived": final,
        "afterwards_asked": FINAL_TICKETS,
        "store_full": status.full,
        "seed": seed,
    }


def main() -> None:
    """Parse the command line, run, print; exit code 1 where anything was harmed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.broker", description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000, help="how many")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="of all chance")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="ergon-fuzz-") as directory:
        summary = fuzz(Path(directory), arguments.messages, arguments.seed)
    print(json.dumps(summary))
    whole = summary["honest_issued"] == summary["honest_arrived"] and not summary["honest_twice"]
    sys.exit(0 if whole and not summary["crashes"] else 1)


if __name__ == "__main__":
    main()
