"""Which cells of the benchmark a command line names."""

from __future__ import annotations

from argparse import ArgumentTypeError

import pytest

from tests.bench.broker import only


def test_cells_are_gathered_by_size_in_their_order() -> None:
    assert only("16MiB/256,2KiB/16,2KiB/1,2KiB/16") == {"16MiB": (256,), "2KiB": (16, 1)}


@pytest.mark.parametrize("text", ["", "2KiB", "2KiB/2", "3KiB/16", "2KiB/16,", "2KiB/x", "2KiB/²"])
def test_a_cell_that_does_not_exist_is_refused_by_name(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match=r"is no cell; allowed: SIZE/ACTORS with a size of 2KiB, .* actors"):
        only(text)
