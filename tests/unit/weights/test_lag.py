"""How far behind a peer counts as, in the metrics of a server."""

from __future__ import annotations

import pytest

from broker.protocol.trajectory import PolicyVersion
from broker.weights.peers import LAG_LABELS, lag_label


@pytest.mark.parametrize(
    ("have", "label"),
    [
        (None, "none"),
        ((3, 17), "0"),
        ((3, 18), "0"),
        ((3, 16), "1"),
        ((3, 15), "2"),
        ((3, 14), "3-4"),
        ((3, 13), "3-4"),
        ((3, 12), "5-8"),
        ((3, 9), "5-8"),
        ((3, 8), "more"),
        ((2, 17), "lineage"),
        ((4, 0), "0"),
    ],
)
def test_labels(have: tuple[int, int] | None, label: str) -> None:
    assert lag_label(have, PolicyVersion(3, 17)) == label
    assert label in LAG_LABELS


def test_nothing_to_be_behind_of() -> None:
    assert lag_label((3, 17), None) == "0"
