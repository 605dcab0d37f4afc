"""The hostile messages themselves: the same for the same seed, mostly wrong, and wrong in every layer."""

from __future__ import annotations

import random
from collections import Counter

from broker.protocol.codec import unpack_trajectories
from broker.protocol.commands import COMMANDS, Role, parse_body
from broker.protocol.errors import ProtocolError
from broker.protocol.frames import decode
from broker.protocol.partials import read_handover, unpack_continue
from tests.fuzz import corpus
from tests.fuzz.mutate import mutate

NUM = 6000


def hostile(seed: int, num: int) -> list[list[bytes]]:
    rng = random.Random(seed)
    return [mutate(rng, corpus.experience(rng, "run", rng.choice(tuple(Role)))) for _ in range(num)]


def test_a_seed_says_which_messages() -> None:
    assert hostile(5, 200) == hostile(5, 200)
    assert hostile(5, 200) != hostile(6, 200)


def test_they_reach_every_layer_and_raise_only_protocol_errors() -> None:
    ends: Counter[str] = Counter()
    for frames in hostile(1, NUM):
        try:
            message = decode(frames)
            spec = COMMANDS.get(message.command)
            if spec is None:
                ends["UNKNOWN_COMMAND"] += 1
                continue
            parse_body(message, spec.body)
            if message.command in ("TRAJECTORY", "DELIVER"):
                unpack_trajectories(message, spec.body)
            if message.command == "HANDOVER":
                read_handover(message)
            if message.command == "CONTINUE":
                unpack_continue(message)
            ends["accepted"] += 1
        except ProtocolError as error:
            ends[error.code.value] += 1
    assert ends["accepted"] > 0.2 * NUM
    assert ends["BAD_MESSAGE"] > 0.2 * NUM
    assert ends["BAD_FRAME"] > 0.05 * NUM
    assert ends["BAD_VERSION"] > 0
    assert ends["UNKNOWN_COMMAND"] > 0
