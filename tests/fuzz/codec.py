"""`python -m tests.fuzz.codec [libFuzzer options]`: coverage-guided fuzzing of all that decodes bytes.

Needs atheris, which nothing else does: `pip install atheris`. One input is a list of frames, each with a length before
it. Whatever comes in, only ProtocolError may come out; and what was accepted must say the same after another round.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit(
        "the coverage-guided fuzz needs atheris, which is not among the locked packages; type: pip install atheris"
    )

with atheris.instrument_imports(include=["broker.protocol"]):
    from broker.protocol import weight_messages as weights
    from broker.protocol.codec import Parcel, pack_trajectories, pick, read_parcel, unpack_trajectories
    from broker.protocol.commands import COMMANDS, Deliver, TrajectoryBody, parse_body
    from broker.protocol.errors import ProtocolError
    from broker.protocol.frames import Message, decode, encode
    from broker.protocol.partials import read_handover, unpack_continue

from broker.protocol.commands import Role
from tests.fuzz import corpus
from tests.fuzz.mutate import mutate

PARCELS = {body.COMMAND: body for body in (TrajectoryBody, Deliver)}
BODIES = {
    *(spec.body for spec in COMMANDS.values()),
    *(weights.Hello, weights.Welcome, weights.Watch, weights.Announce),
    *(weights.ManifestRequest, weights.ManifestReply, weights.Push, weights.ChunkRequest, weights.ChunkReply),
}
SEEDS = 3000
MAX_BYTES = 8192  # of one input


def join(frames: list[bytes]) -> bytes:
    """Frames as one input: two bytes of length before each."""
    return b"".join(len(frame[:65_535]).to_bytes(2, "big") + frame[:65_535] for frame in frames)


def split(data: bytes) -> list[bytes]:
    """The frames of an input; the last one takes what is left."""
    frames = []
    while len(data) >= 2:
        length = int.from_bytes(data[:2], "big")
        frames.append(data[2 : 2 + length])
        data = data[2 + length :]
    return frames


def one_input(data: bytes) -> None:
    """All that a server or a client does with frames before it looks at its state."""
    try:
        message = decode(split(data))
    except ProtocolError:
        return
    if not _equal(decode([bytes(frame) for frame in encode(message)]), message):
        raise AssertionError("a message changes when it is encoded again")
    for body in BODIES:  # whatever command it claims to be
        with contextlib.suppress(ProtocolError):
            facts = parse_body(message, body)
            if parse_body(facts.pack(), body) != facts:
                raise AssertionError(f"a {body.COMMAND} changes when it is packed again")
    readers = (weights.read_chunk, weights.read_manifest, weights.read_push, read_handover, unpack_continue)
    for read in readers:
        with contextlib.suppress(ProtocolError):
            read(message)
    if message.command in PARCELS:
        _read_parcel(message, PARCELS[message.command])


def _read_parcel(message: Message, body: type[Parcel]) -> None:
    """What is accepted says the same after it was packed again, and after it was taken apart."""
    try:
        content = read_parcel(message, body)
    except ProtocolError:
        return
    trajectories = unpack_trajectories(message, body)
    if not _equal(pack_trajectories(trajectories, body), pick(message, content, range(len(content.items)))):
        raise AssertionError("a parcel changes when it is packed again")
    for index, trajectory in enumerate(trajectories):
        one = pick(message, content, [index])
        read_parcel(one, body)
        if not _equal(one, pack_trajectories([trajectory], body)):
            raise AssertionError(f"item {index} of a parcel is not the same alone")
    if not _equal(pack_trajectories(trajectories[::-1], body), pick(message, content, range(len(trajectories))[::-1])):
        raise AssertionError("a parcel taken apart and turned round is another one")


def _equal(one: Message, other: Message) -> bool:
    return [bytes(frame) for frame in encode(one)] == [bytes(frame) for frame in encode(other)]


def mutate_input(data: bytes, max_size: int, seed: int) -> bytes:
    """Another input: of a parcel, or of a new message, a mutation that knows what it changes; else one of bytes."""
    rng = random.Random(seed)
    kind = rng.random()
    try:
        if kind < 0.3:
            message = decode(split(data))
            read_parcel(message, PARCELS.get(message.command, TrajectoryBody))
            return join(mutate(rng, message))[:max_size]
    except ProtocolError:
        kind = rng.random()
    return join(mutate(rng, _valid(rng)))[:max_size] if kind < 0.2 else atheris.Mutate(data, max_size)


def _valid(rng: random.Random) -> Message:
    role = rng.choice(tuple(Role))
    choices = (
        lambda: corpus.weight(rng, "fuzz", role),
        lambda: corpus.experience(rng, "fuzz", role),
        lambda: corpus.parcel(rng, rng.choice(tuple(PARCELS.values()))),
    )
    return rng.choice(choices)()


def main() -> None:
    """Seed the corpus with valid and almost valid messages, then let libFuzzer go on."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="ergon-corpus-") as directory:
        for index in range(SEEDS):
            frames = mutate(rng, _valid(rng))
            if sum(map(len, frames)) < MAX_BYTES:
                (Path(directory) / f"{index:05d}").write_bytes(join(frames))
        options = [sys.argv[0], directory, f"-max_len={MAX_BYTES}", *sys.argv[1:]]
        atheris.Setup(options, one_input, custom_mutator=mutate_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
