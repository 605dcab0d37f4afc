"""A scripted episode goes on where it was left, and whatever else it went on from is found."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest

from broker.protocol.commands import PartialHead
from broker.protocol.partials import Partial, pack_continue, pack_handover, unpack_continue
from broker.protocol.trajectory import PolicyVersion, Segment, Ticket, Trajectory, VersionRun
from tests.chaos import script
from tests.chaos.episode import Episode, WrongEpisodeError, digest_of, examine, stints_of
from tests.unit.broker.samples import make_ticket

SEED = 3
OLD, NEW = PolicyVersion(1, 4), PolicyVersion(1, 5)


def ticket_of_turns(num_turns: int, nth: int = 0) -> Ticket:
    keys = (f"r/train/{n}/0" for n in range(1000))
    found = [key for key in keys if len(script.turn_ends(SEED, key)) == num_turns]
    return make_ticket(found[nth])


def sent(ticket: Ticket, partial: Partial) -> Partial:
    """As the next actor gets it."""
    return unpack_continue(pack_continue(ticket, pack_handover(ticket.ticket_id, partial)))[1]


def left_at(ticket: Ticket, share: float, begun: Partial | None = None) -> Partial:
    """What an actor that serves OLD leaves."""
    episode = Episode(SEED, ticket, begun)
    while not episode.ended and episode.next_end <= share:
        episode.sample(episode.next_end, OLD)
    episode.spent_s += 1.5
    episode.sample(share, OLD)
    return sent(ticket, episode.partial())


def finished(ticket: Ticket, begun: Partial | None = None) -> Trajectory:
    episode = Episode(SEED, ticket, begun)
    while not episode.ended:
        episode.sample(episode.next_end, NEW)
    return episode.trajectory("actor-1")


def changed(trajectory: Trajectory, **arrays: Any) -> Trajectory:
    segment = dataclasses.replace(trajectory.segments[0], **arrays)
    return dataclasses.replace(trajectory, segments=(segment,))


def test_an_episode_is_its_turns() -> None:
    ticket = ticket_of_turns(3)
    ids_T, mask_T = script.trace(SEED, ticket.ticket_id)
    ends = script.turn_ends(SEED, ticket.ticket_id)
    assert mask_T.sum() == ends[-1] == script.num_tokens(SEED, ticket.ticket_id)
    assert ids_T.size == script.NUM_PROMPT + 2 * script.NUM_OBSERVED + ends[-1]
    trajectory = finished(ticket)
    assert (trajectory.head.num_turns, trajectory.num_sampled) == (3, ends[-1])
    assert examine(SEED, trajectory) == []


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.5, 2 / 3, 0.99])
def test_what_goes_on_elsewhere_is_the_same_prefix_and_then_another_version(share: float) -> None:
    ticket = ticket_of_turns(3)
    partial = left_at(ticket, share)
    (begun,), num_begun = partial.segments, partial.num_sampled
    trajectory = finished(ticket, partial)
    (segment,) = trajectory.segments
    size = begun.token_ids_T.size
    assert np.array_equal(segment.token_ids_T, script.trace(SEED, ticket.ticket_id)[0])
    assert np.array_equal(segment.logprobs_T[:size], begun.logprobs_T)
    assert segment.version_runs == (VersionRun(*OLD, num_begun), VersionRun(*NEW, segment.num_sampled - num_begun))
    assert examine(SEED, trajectory) == [digest_of(begun, size)]
    assert (partial.head.turn is None) == (num_begun in script.turn_ends(SEED, ticket.ticket_id))


def test_it_may_go_on_more_than_once_and_a_stint_without_a_token_is_none() -> None:
    ticket = ticket_of_turns(4)
    first = left_at(ticket, 0.3)
    idle = left_at(ticket, 0.3, first)
    assert (idle.head.total_s, idle.segments[0].version_runs) == (3.0, first.segments[0].version_runs)
    second = left_at(ticket, 0.6, idle)
    prefixes = examine(SEED, finished(ticket, second))
    assert prefixes == [digest_of(part, part.token_ids_T.size) for part in (first.segments[0], second.segments[0])]


def test_two_stints_of_one_version_are_told_apart() -> None:
    """What was made anew is not what was handed over, though it is the same episode under the same policy."""
    ticket = ticket_of_turns(2)
    one, other = left_at(ticket, 0.5), left_at(ticket, 0.5)
    assert np.array_equal(one.segments[0].token_ids_T, other.segments[0].token_ids_T)
    sizes = {part.segments[0].token_ids_T.size for part in (one, other)}
    assert len({digest_of(part.segments[0], size) for part in (one, other) for size in sizes}) == 2
    trajectory, stranger = finished(ticket, one), finished(ticket, other)
    mixed = np.concatenate(
        [stranger.segments[0].logprobs_T[: (size := sizes.pop())], trajectory.segments[0].logprobs_T[size:]]
    )
    with pytest.raises(WrongEpisodeError, match="log-probs"):
        examine(SEED, changed(trajectory, logprobs_T=mixed))


def test_a_partial_of_another_ticket_or_a_later_attempt_is_found() -> None:
    ticket, other = ticket_of_turns(2), ticket_of_turns(2, nth=1)
    again = msgspec.structs.replace(ticket, attempt=1)
    partial = left_at(again, 0.5)
    for stranger in (other, ticket):
        with pytest.raises(WrongEpisodeError, match="the partial is of"):
            Episode(SEED, stranger, partial)
    Episode(SEED, again, partial)
    theirs = dataclasses.replace(left_at(other, 0.5), snapshot=partial.snapshot)
    with pytest.raises(WrongEpisodeError, match="tokens are not"):
        Episode(SEED, again, theirs)


def test_a_partial_whose_counts_or_state_do_not_fit_its_tokens_is_found() -> None:
    ticket = ticket_of_turns(2)
    partial, later = left_at(ticket, 0.3), left_at(ticket, 0.6)
    more_turns = msgspec.structs.replace(partial.head, num_turns=1)
    for wrong in (
        dataclasses.replace(partial, head=more_turns),
        dataclasses.replace(partial, head=PartialHead()),
        dataclasses.replace(partial, snapshot=later.snapshot),
        dataclasses.replace(partial, snapshot=b"state"),
        dataclasses.replace(partial, segments=(*partial.segments, *partial.segments)),
    ):
        with pytest.raises(WrongEpisodeError):
            Episode(SEED, ticket, wrong)
    Episode(SEED, ticket, partial)


def test_a_trajectory_with_a_wrong_token_version_turn_or_end_is_found() -> None:
    ticket = ticket_of_turns(2)
    trajectory = finished(ticket, left_at(ticket, 0.5))
    (segment,) = trajectory.segments
    first, second = segment.version_runs
    moved = (first._replace(num_tokens=first.num_tokens - 1), second._replace(num_tokens=second.num_tokens + 1))
    ids_T = segment.token_ids_T.copy()
    ids_T[-1] += 1
    short = slice(0, segment.token_ids_T.size - 1)
    cut = Segment(
        segment.token_ids_T[short],
        segment.loss_mask_T[short],
        segment.logprobs_T[short],
        (first, second._replace(num_tokens=second.num_tokens - 1)),
    )
    head = msgspec.structs.replace(trajectory.head, num_turns=1)
    lonely = msgspec.structs.replace(trajectory.head, reward_components={"8": float(stints_of(trajectory)[0].salt)})
    for wrong in (
        changed(trajectory, version_runs=moved),
        changed(trajectory, token_ids_T=ids_T),
        dataclasses.replace(trajectory, segments=(cut,)),
        dataclasses.replace(trajectory, segments=(segment, segment)),
        dataclasses.replace(trajectory, head=head),
        dataclasses.replace(trajectory, head=lonely),
    ):
        with pytest.raises(WrongEpisodeError):
            examine(SEED, wrong)
    assert len(examine(SEED, trajectory)) == 1
