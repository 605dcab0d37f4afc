"""A segment's messages as a page has them: cut where the version changes, every character once, tokens as well."""

from __future__ import annotations

import numpy as np
import pytest

from broker.protocol.trajectory import Segment, VersionRun
from deploy.report.transcripts import messages, token_versions

TEXTS = ["<", "ab", "", "é", "cd", "e", "f", ">"]


def segment(mask: list[bool], *runs: tuple[int, int]) -> Segment:
    count = len(mask)
    logprobs = np.where(mask, -0.5, 0.0).astype(np.float32)
    named = tuple(VersionRun(1, version, size) for version, size in runs)
    return Segment(np.arange(count, dtype=np.int32), np.asarray(mask), logprobs, named)


def reading(*spans: tuple[str, int, int]) -> dict[str, object]:
    said = {"role": "assistant", "first_token": 0, "end_token": len(TEXTS), "spans": [list(span) for span in spans]}
    return {"pieces": TEXTS, "messages": [said]}


def test_a_turn_is_cut_where_the_version_changes_and_where_its_kind_does() -> None:
    mask = [False, True, True, True, True, False, True, False]
    found = segment(mask, (7, 3), (8, 2))
    assert token_versions(found) == ["", "1.7", "1.7", "1.7", "1.8", "", "1.8", ""]
    (message,) = messages(found, reading(("text", 1, 5), ("call", 5, 8)))
    assert [(piece.kind, piece.text, piece.version, piece.begins_version) for piece in message.pieces] == [
        ("text", "abé", "1.7", False),
        ("text", "c", "1.8", True),
        ("call", "d", "1.8", False),
        ("call", "e", "", False),  # what the actor wrote
        ("call", "f", "1.8", False),
    ]
    assert (message.versions, message.num_sampled) == (["1.7", "1.8"], 5)
    assert [token.logprob for token in message.tokens] == [None, -0.5, -0.5, -0.5, -0.5, None, -0.5, None]


@pytest.mark.parametrize("cut", range(1, 8))
def test_every_character_is_shown_once(cut: int) -> None:
    mask = [False, True, True, True, True, True, True, False]
    (message,) = messages(segment(mask, (1, 2), (2, 1), (3, 3)), reading(("text", 1, cut), ("thinking", cut, 8)))
    assert "".join(piece.text for piece in message.pieces) == "abécdef"
    kinds = "".join(piece.kind[0] * len(piece.text) for piece in message.pieces)
    assert len(kinds) == 7
