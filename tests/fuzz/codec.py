"""`python -m tests.fuzz.codec [libFuzzer options]`: coverage-guided fuzzing of all that decodes bytes.

Needs atheris, which nothing else does: `pip install atheris`. One input is a list of frames, each with a length before
it. Whatever comes in, only ProtocolError may come out; and what was accepted must say the same after another round.
"""

from __future__ import annotations

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

with atheris.instrument_imports(include=["broker.protocol", "msgpack"]):
    from broker.protocol import weight_messages as weights
    from broker.protocol.codec import trajectory_from_message, trajectory_to_message
    from broker.protocol.commands import COMMANDS, parse_body
    from broker.protocol.errors import ProtocolError
    from broker.protocol.frames import decode, encode

from broker.protocol.commands import Role
from tests.fuzz import corpus
from tests.fuzz.mutate import mutate

READERS = {
    "WATCH": weights.read_have,
    "ANNOUNCE": weights.read_announce,
    "MANIFEST": weights.read_manifest_request,
    "CHUNK": weights.read_chunk_request,
    "CHUNK_REPLY": weights.read_chunk,
    "MANIFEST_REPLY": weights.read_manifest,
}
SEEDS = 2000


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
    again = decode([bytes(frame) for frame in encode(message)])
    if again.command != message.command or len(again.arrays) != len(message.arrays):
        raise AssertionError("a message changes when it is encoded again")
    try:
        if message.command in READERS:
            READERS[message.command](message)
            return
        spec = COMMANDS.get(message.command)
        if spec is not None:
            parse_body(message, spec.body)
            if message.command in ("TRAJECTORY", "DELIVER"):
                trajectory = trajectory_from_message(message)
                trajectory_from_message(trajectory_to_message(trajectory))
    except ProtocolError:
        return


def main() -> None:
    """Seed the corpus with valid and almost valid messages, then let libFuzzer go on."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="ergon-corpus-") as directory:
        for index in range(SEEDS):
            valid = corpus.weight if index % 4 == 0 else corpus.experience
            frames = mutate(rng, valid(rng, "fuzz", rng.choice(tuple(Role))))
            if sum(map(len, frames)) < 4096:
                (Path(directory) / f"{index:05d}").write_bytes(join(frames))
        atheris.Setup([sys.argv[0], directory, "-max_len=4096", *sys.argv[1:]], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
