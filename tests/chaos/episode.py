"""A scripted episode that can be left anywhere and gone on with elsewhere, and what proves that it was.

Its tokens are drawn from ticket and turn. The log-prob of a sampled token says which version sampled it and in which
stint: what one actor does of an episode between taking it up and ending it or handing it over. A stint has a salt that
nobody else can know, so a prefix that was made anew, or is of another attempt or ticket, is not taken for the one that
was handed over. Never sleeps, sends or writes.
"""

from __future__ import annotations

import random
import time
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from broker.protocol.commands import PartialHead, UnfinishedTurn
from broker.protocol.partials import Partial
from broker.protocol.trajectory import (
    Outcome,
    PolicyVersion,
    Segment,
    Ticket,
    Trajectory,
    TrajectoryHead,
    VersionRun,
)
from tests.chaos import script

NUM_SALTS = 1 << 30
NUM_LOGPROBS = 1 << 12  # so that each is exact as float32


class WrongEpisodeError(Exception):
    """A partial or a trajectory is not what its ticket's episode can have become."""


class Stint(NamedTuple):
    """`start`: tokens in the trace when it began."""

    start: int
    salt: int


class Snapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a scripted environment says of its state."""

    ticket_id: str
    attempt: int
    num_tokens: int
    stints: tuple[Stint, ...]


class Episode:
    """One ticket's episode, from where it was `begun` or from its beginning. Raises WrongEpisodeError for a partial
    that is of another ticket or of a later attempt, or not what it can have become.

    spent_s: seconds that it took so far, of all stints.
    """

    def __init__(self, seed: int, ticket: Ticket, begun: Partial | None = None) -> None:
        self._seed, self._ticket = seed, ticket
        self._ids_T, self._mask_T = script.trace(seed, ticket.ticket_id)
        self._sampled_N = np.flatnonzero(self._mask_T)  # the places of what is sampled
        self._ends = script.turn_ends(seed, ticket.ticket_id)
        self.spent_s = 0.0
        self._stints: tuple[Stint, ...] = ()
        no_floats = np.zeros(script.NUM_PROMPT, np.float32)
        self._segment = Segment(self._ids_T[: no_floats.size], self._mask_T[: no_floats.size], no_floats, ())
        if begun is not None:
            self._take_up(begun)
        self._stints += (Stint(self._segment.token_ids_T.size, random.SystemRandom().randrange(NUM_SALTS)),)

    @property
    def num_sampled(self) -> int:
        """Tokens sampled so far."""
        return self._segment.num_sampled

    @property
    def num_turns(self) -> int:
        """Turns that have ended."""
        return sum(end <= self.num_sampled for end in self._ends)

    @property
    def next_end(self) -> float:
        """The share of the whole at which the present turn ends."""
        return self._ends[self.num_turns] / self._ends[-1]

    @property
    def ended(self) -> bool:
        """Whether there is no further turn."""
        return self.num_turns == len(self._ends)

    def sample(self, share: float, version: PolicyVersion) -> None:
        """Go on to this share of the whole: sampled by `version`, and answered where that ends a turn."""
        old, most = self._segment, self._ends[-1]
        num = max(0, min(most, int(share * most + 1e-6)) - old.num_sampled)
        if not num:
            return
        total = old.num_sampled + num
        upto = int(self._sampled_N[total]) if total < most else self._ids_T.size
        runs = list(old.version_runs)
        if runs and runs[-1][:2] == version:
            num += runs.pop().num_tokens
        runs.append(VersionRun(*version, num))
        ids_T, mask_T = self._ids_T[:upto], self._mask_T[:upto]
        new = slice(old.token_ids_T.size, upto)
        logprobs_T = np.concatenate([old.logprobs_T, logprobs(ids_T, mask_T, tuple(runs), self._stints)[new]])
        # What was taken up stays as it came, whatever it should be.
        ids_T = np.concatenate([old.token_ids_T, ids_T[new]])
        mask_T = np.concatenate([old.loss_mask_T, mask_T[new]])
        self._segment = Segment(ids_T, mask_T, logprobs_T, tuple(runs))

    def partial(self) -> Partial:
        """The episode as it is left; the stint is over."""
        ticket, num_turns = self._ticket, self.num_turns
        began = self._ends[num_turns - 1] if num_turns else 0
        turn = UnfinishedTurn(num_tokens=self.num_sampled - began) if self.num_sampled > began else None
        head = PartialHead(num_turns=num_turns, turn=turn, total_s=self.spent_s, model_s=self.spent_s)
        size = self._segment.token_ids_T.size
        stints = tuple(stint for stint in self._stints if stint.start < size)  # one that sampled nothing is none
        snapshot = Snapshot(ticket.ticket_id, ticket.attempt, size, stints)
        return Partial(head, (self._segment,), msgspec.json.encode(snapshot))

    def trajectory(self, actor_id: str) -> Trajectory:
        """The record of the episode, which has ended."""
        head = TrajectoryHead(
            ticket=self._ticket,
            kind="scripted",
            outcome=Outcome.COMPLETED,
            reward=script.reward(self._seed, self._ticket),
            reward_components={str(stint.start): float(stint.salt) for stint in self._stints},
            num_turns=self.num_turns,
            timings_s={"total": self.spent_s, "model": self.spent_s, "tool": 0.0},
            actor_id=actor_id,
            finished_at=max(0.0, time.time()),
        )
        return Trajectory(head, (self._segment,))

    def _take_up(self, begun: Partial) -> None:
        ticket = self._ticket
        try:
            snapshot = msgspec.json.decode(begun.snapshot, type=Snapshot)
        except msgspec.MsgspecError as error:
            raise WrongEpisodeError(f"{ticket.ticket_id}: its snapshot cannot be read: {error}") from error
        if snapshot.ticket_id != ticket.ticket_id or snapshot.attempt > ticket.attempt:
            found, own = (snapshot.ticket_id, snapshot.attempt), (ticket.ticket_id, ticket.attempt)
            raise WrongEpisodeError(f"{ticket.ticket_id}: the partial is of {found}, the ticket {own}")
        if len(begun.segments) != 1:
            raise WrongEpisodeError(f"{ticket.ticket_id}: a partial of {len(begun.segments)} segments; it has one")
        (self._segment,) = begun.segments
        _check(self._seed, ticket.ticket_id, self._segment, snapshot.stints)
        self._stints, self.spent_s = snapshot.stints, begun.head.total_s
        expected = self.partial()
        if begun.head != expected.head or snapshot.num_tokens != self._segment.token_ids_T.size:
            raise WrongEpisodeError(f"{ticket.ticket_id}: {begun.head} and {snapshot} of {expected.head}")


def stints_of(trajectory: Trajectory) -> tuple[Stint, ...]:
    """Who says to have sampled it, in order."""
    return tuple(sorted(Stint(int(start), int(salt)) for start, salt in trajectory.head.reward_components.items()))


def examine(seed: int, trajectory: Trajectory) -> list[str]:
    """The digest of each prefix that was handed over. Raises WrongEpisodeError unless the trajectory is this ticket's
    whole episode: its tokens and mask, bit for bit, its turns, and who sampled each token."""
    key = trajectory.ticket.ticket_id
    if len(trajectory.segments) != 1:
        raise WrongEpisodeError(f"{key}: {len(trajectory.segments)} segments; it has one")
    (segment,), stints = trajectory.segments, stints_of(trajectory)
    _check(seed, key, segment, stints)
    whole = script.turn_ends(seed, key)
    if (segment.num_sampled, trajectory.head.num_turns) != (whole[-1], len(whole)):
        found = f"{segment.num_sampled} tokens in {trajectory.head.num_turns} turns"
        raise WrongEpisodeError(f"{key}: {found}; it has {whole[-1]} in {len(whole)}")
    return [digest_of(segment, stint.start) for stint in stints[1:]]


def digest_of(segment: Segment, num_tokens: int) -> str:
    """What the first tokens of a segment are: ids, mask, log-probs and who sampled them."""
    digest = xxhash.xxh3_128()
    for array in (segment.token_ids_T, segment.loss_mask_T, segment.logprobs_T):
        digest.update(array[:num_tokens].tobytes())
    left = int(np.count_nonzero(segment.loss_mask_T[:num_tokens]))
    for run in segment.version_runs:
        if left > 0:
            digest.update(repr((*run[:2], min(left, run.num_tokens))).encode())
        left -= run.num_tokens
    return digest.hexdigest()


def logprobs(
    ids_T: npt.NDArray[np.int32], mask_T: npt.NDArray[np.bool_], runs: tuple[VersionRun, ...], stints: tuple[Stint, ...]
) -> npt.NDArray[np.float32]:
    """float32 [T]: of each token, by who sampled it; 0 where the mask is False."""
    salts_T = np.zeros(ids_T.size, np.int64)
    for stint, (start, end) in zip(stints, pairwise([*(stint.start for stint in stints), ids_T.size]), strict=True):
        salts_T[start:end] = stint.salt
    numbers = np.array([run.lineage * 1009 + run.version * 7 for run in runs], np.int64)
    versions_N = np.repeat(numbers, np.array([run.num_tokens for run in runs], np.int64))
    made_T = np.zeros(ids_T.size, np.float32)
    number_N = (ids_T[mask_T].astype(np.int64) * 31 + salts_T[mask_T] + versions_N) % NUM_LOGPROBS
    made_T[mask_T] = -1.0 - number_N / NUM_LOGPROBS
    return made_T


def _check(seed: int, ticket_id: str, segment: Segment, stints: tuple[Stint, ...]) -> None:
    """Raise WrongEpisodeError unless the segment is a prefix of this ticket's episode that these stints sampled."""
    ids_T, mask_T = script.trace(seed, ticket_id)
    size = segment.token_ids_T.size
    if not np.array_equal(segment.token_ids_T, ids_T[:size]) or not np.array_equal(segment.loss_mask_T, mask_T[:size]):
        raise WrongEpisodeError(f"{ticket_id}: the {size} tokens are not the episode's")
    starts = [stint.start for stint in stints]
    if starts[:1] != [script.NUM_PROMPT] or any(a >= b for a, b in pairwise([*starts, size])):
        raise WrongEpisodeError(f"{ticket_id}: stints at {starts} of {size} tokens")
    if not np.array_equal(segment.logprobs_T, logprobs(ids_T[:size], mask_T[:size], segment.version_runs, stints)):
        raise WrongEpisodeError(f"{ticket_id}: its log-probs are not those of the versions and stints that it names")
