"""An episode that goes from one actor to another: what of it travels, and whether it may still be gone on with.

    interrupted -> record, account, unfinished turn and the environment's snapshot -> Partial
    Partial -> the same record, account and turn, and an episode that the environment has restored

Owns what an interrupted episode is and how old a partial may be. Never samples, leases or sends.
"""

from __future__ import annotations

from typing import Final

from actors.record import Record
from actors.sampler import Account, Sampler, Turn
from broker.protocol.commands import MAX_SNAPSHOT_BYTES, PartialHead, UnfinishedTurn
from broker.protocol.partials import Partial
from broker.protocol.trajectory import PolicyVersion

SNAPSHOT_LIMIT_S: Final = 2.0  # for the environment to say its state, while the actor drains


class HandoverError(Exception):
    """An interrupted episode cannot be handed over; its ticket begins anew."""


class EpisodeInterruptedError(Exception):
    """The episode was interrupted; this is what it is so far."""

    def __init__(self, partial: Partial) -> None:
        super().__init__(f"interrupted after {partial.num_sampled} tokens")
        self.partial = partial


def make_partial(record: Record, sampler: Sampler, total_s: float, snapshot: bytes) -> Partial:
    """The partial of an interrupted episode. total_s: of its deadline, used up. Raises HandoverError where there is
    nothing worth handing over, or too much of it."""
    if not record.num_sampled:
        raise HandoverError("nothing was sampled yet")
    if len(snapshot) > MAX_SNAPSHOT_BYTES:
        raise HandoverError(f"its snapshot has {len(snapshot)} bytes; at most {MAX_SNAPSHOT_BYTES} travel")
    account, turn = sampler.account, sampler.unfinished
    head = PartialHead(
        num_turns=record.num_turns,
        num_tool_calls=record.num_tool_calls,
        num_malformed=record.num_malformed,
        num_thinking_tokens=account.num_thinking_tokens,
        num_overrun_tokens=account.num_overrun_tokens,
        num_forced_stops=account.num_forced_stops,
        turn=None if turn is None else UnfinishedTurn(num_tokens=len(turn.ids), began_open=turn.began_open),
        total_s=total_s,
        model_s=record.model_s,
        tool_s=record.tool_s,
    )
    return Partial(head, record.all_segments(), snapshot)


def take_up(partial: Partial, record: Record, sampler: Sampler) -> None:
    """Make a fresh record and sampler those of the episode that was interrupted."""
    head = partial.head
    record.take_up(partial.segments)
    record.num_turns, record.num_tool_calls = head.num_turns, head.num_tool_calls
    record.num_malformed = head.num_malformed
    record.model_s, record.tool_s = head.model_s, head.tool_s
    sampler.account = Account(head.num_thinking_tokens, head.num_overrun_tokens, head.num_forced_stops)
    if head.turn is not None:
        start = len(record.ids) - head.turn.num_tokens
        sampler.unfinished = Turn(head.turn.began_open, record.ids[start:], record.mask[start:])


def is_stale(partial: Partial, serving: PolicyVersion, max_staleness: int | None) -> bool:
    """Whether its oldest token is of another history than the version that is served, or more versions older than
    training allows (None: any number): a learner would throw it away."""
    oldest = partial.oldest_version
    if oldest is None or max_staleness is None:
        return False
    return oldest.lineage != serving.lineage or serving.version - oldest.version > max_staleness
